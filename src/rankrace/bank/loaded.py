"""Candidates in the memory that they are trained in.

Shapes: K candidates, P all parameters of one, P_A those of its factors A, which come first.
"""

import torch
from torch import nn

from rankrace.bank.candidates import Candidates
from rankrace.bank.flat import Flat


class Loaded:
    """Candidates in the memory that they are trained in: a few large pieces instead of thousands of small ones.

    `candidates` holds views into `values`; `compute` is what the products use, in the model's type.
    """

    def __init__(self, candidates: Candidates, values: Flat, gradients: Flat | None, compute: Flat) -> None:
        self.candidates, self.values, self.compute = candidates, values, compute
        self._gradients = gradients
        self.trainable = gradients is not None
        first = values.all_KP
        self.multiplier_K = torch.tensor(candidates.multipliers, dtype=first.dtype, device=first.device)
        self._P_A = sum(A[0].numel() for A, _ in candidates.factors.values())

    @staticmethod
    def of(candidates: Candidates, dtype: torch.dtype, *, trainable: bool = True) -> "Loaded":
        """A copy of these candidates, for a model of this type."""
        values = Flat.of(candidates.tensors())
        factors = [f"{n}.{ab}" for ab in "AB" for n in candidates.factors]
        shapes = {name: values.views[name].shape[1:] for name in factors}
        return Loaded(
            candidates.with_tensors(values.views),
            values,
            Flat.like(values.views) if trainable else None,
            Flat(shapes, len(candidates.ranks), dtype=dtype, device=values.all_KP.device),
        )

    @property
    def gradients(self) -> Flat:
        assert self._gradients is not None, "borrowed candidates are measured, not trained"
        return self._gradients

    def parameter(self, name: str) -> nn.Parameter:
        """A view into the values as a parameter, whose gradient is a view into the gradients."""
        parameter = nn.Parameter(self.values.views[name])
        if self._gradients is not None:
            parameter.grad = self._gradients.views[name]
        return parameter

    def refresh(self) -> None:
        """Brings what the products use up to date with the factors."""
        values_KP, compute_KP, P_A = self.values.all_KP, self.compute.all_KP, self._P_A
        compute_KP[:, :P_A].copy_(values_KP[:, :P_A])
        # The multiplier joins B in full precision: a ratio such as 32/12 does not exist in bfloat16.
        B_KP = values_KP[:, P_A : compute_KP.shape[1]]
        torch.mul(B_KP, self.multiplier_K[:, None], out=compute_KP[:, P_A:])
