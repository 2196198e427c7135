"""Candidates in the memory that they run in: to be trained, or only to be measured.

Shapes: K candidates, P all parameters of one, P_A those of its factors A, which come first.
"""

import torch
from torch import Tensor, nn

from rankrace.bank.candidates import Candidates
from rankrace.bank.flat import Flat
from rankrace.bank.threads import one_thread

PIECE = 2**22
"""Numbers of one candidate that are copied at once: all of a small model, whose layers one by one would take longer
to launch than to copy; a part of a large one, so that little of it is there twice."""


class Computing:
    """What the products read of K candidates: the factors in the model's type, all A before all B; zeros at first."""

    def __init__(self, candidates: Candidates, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """`tensors`: those of the candidates."""
        first = next(iter(tensors.values()))
        self.ranks = candidates.ranks
        self.multiplier_K = torch.tensor(candidates.multipliers, dtype=first.dtype, device=first.device)
        self.factors = [f"{name}.{ab}" for ab in "AB" for name in candidates.factors]
        shapes = {name: tensors[name].shape[1:] for name in self.factors}
        self.compute = Flat(shapes, len(self.ranks), dtype=dtype, device=first.device)

    def fill(self, values_KP: Tensor, begin: int, *, scaled: bool) -> None:
        """From this place on: factors A as they are, B times the multiplier.

        It joins B in full precision: a ratio such as 32/12 does not exist in bfloat16.
        """
        into_KP = self.compute.all_KP[:, begin : begin + values_KP.shape[1]]
        if scaled:
            torch.mul(values_KP, self.multiplier_K[:, None], out=into_KP)
        else:
            into_KP.copy_(values_KP)


class Lent(Computing):
    """Candidates that are measured: the factors as the products use them, in the model's type, and the heads.

    The factors in full precision are not held, so whoever made them for the occasion can let them go.
    """

    def __init__(self, candidates: Candidates, dtype: torch.dtype) -> None:
        tensors = candidates.tensors()
        super().__init__(candidates, tensors, dtype)
        K, end, half = len(self.ranks), 0, len(self.factors) // 2
        together = max(1, PIECE // max(tensors[name][0].numel() for name in self.factors))
        with one_thread():
            for names, scaled in ((self.factors[:half], False), (self.factors[half:], True)):
                for first in range(0, half, together):
                    piece = [tensors.pop(name).reshape(K, -1) for name in names[first : first + together]]
                    self.fill(torch.cat(piece, dim=1), end, scaled=scaled)
                    end += sum(t.shape[1] for t in piece)
        self.heads = tensors

    def parameter(self, name: str) -> nn.Parameter:
        """Of a head."""
        return nn.Parameter(self.heads[name], requires_grad=False)

    def refresh(self) -> None:
        """They do not change."""


class Loaded(Computing):
    """Candidates that are trained: a few large pieces of memory instead of thousands of small ones.

    `candidates` holds views into `values`; `compute` is what the products use, in the model's type.
    """

    def __init__(self, candidates: Candidates, dtype: torch.dtype) -> None:
        """A copy of these candidates, for a model of this type."""
        self.values = Flat.of(candidates.tensors())
        self.gradients = Flat.like(self.values.views)
        self.candidates = candidates.with_tensors(self.values.views)
        super().__init__(candidates, self.values.views, dtype)
        self._P_A = sum(A[0].numel() for A, _ in candidates.factors.values())

    def parameter(self, name: str) -> nn.Parameter:
        """A view into the values as a parameter, whose gradient is a view into the gradients."""
        parameter = nn.Parameter(self.values.views[name])
        parameter.grad = self.gradients.views[name]
        return parameter

    def refresh(self) -> None:
        """Brings what the products use up to date with the factors."""
        values_KP, P_A, P = self.values.all_KP, self._P_A, self.compute.all_KP.shape[1]
        self.fill(values_KP[:, :P_A], 0, scaled=False)
        self.fill(values_KP[:, P_A:P], P_A, scaled=True)
