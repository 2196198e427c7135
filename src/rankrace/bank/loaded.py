"""Candidates in the memory that they run in: to be trained, or only to be measured.

Shapes: K candidates, P all parameters of one, P_A those of its factors A, which come first.
"""

import torch
from torch import Tensor, nn

from rankrace.bank.candidates import Candidates
from rankrace.bank.flat import Flat


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


class Lent(Computing):
    """Candidates that are measured: the factors as the products use them, in the model's type, and the heads.

    The factors in full precision are not held, so whoever made them for the occasion can let them go.
    """

    def __init__(self, candidates: Candidates, dtype: torch.dtype) -> None:
        tensors = candidates.tensors()
        super().__init__(candidates, tensors, dtype)
        for name in self.factors:
            t = tensors.pop(name)
            # The multiplier joins B in full precision: a ratio such as 32/12 does not exist in bfloat16.
            self.compute.views[name].copy_(t * self.multiplier_K[:, None, None] if name.endswith(".B") else t)
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
        values_KP, compute_KP, P_A = self.values.all_KP, self.compute.all_KP, self._P_A
        compute_KP[:, :P_A].copy_(values_KP[:, :P_A])
        B_KP = values_KP[:, P_A : compute_KP.shape[1]]  # scaled in full precision: see Lent
        torch.mul(B_KP, self.multiplier_K[:, None], out=compute_KP[:, P_A:])
