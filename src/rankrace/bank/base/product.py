"""What every kind of base layer does for the bank."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

InputGradient = Callable[[Tensor, Tensor, bool], Any]
"""(g, gx, fresh): adds g W, the gradient of base(x) with respect to x, to gx, or writes it there if gx is fresh."""
Rounding = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""`fp8.rounded`."""


class Rounds(Protocol):
    """Says by which function rows are rounded to 8 bits: `fp8.rounded`, or the same compiled."""

    rounded: Rounding


class Product(Protocol):
    """y = x Wᵀ + b of one frozen layer, both ways, on which the adapters' products ride."""

    comes_first: bool
    """It cannot add itself to what is there, so on the way back the adapters add themselves to it."""

    def read(self, x: Tensor) -> Any:
        """What `output` wants of x, made once for all layers that read x."""
        ...

    def output(self, read: Any, h_KTR: Tensor, sB_KDR: Tensor) -> tuple[InputGradient, Tensor]:
        """(the way back, base(x) + h sBᵀ), the latter in memory that nobody else reads.

        The way back holds no activations, unless the layer brings an autograd of its own.
        """
        ...


def per_candidate(x: Tensor, K: int) -> Tensor:
    """[K, T, D] of activations in any shape that keeps the candidates outermost."""
    return x.reshape(K, -1, x.shape[-1])


def adapter_product(x: Tensor, h_KTR: Tensor, sB_KDR: Tensor) -> Tensor:
    """h sBᵀ in the shape of base(x); no view of a [K, T, D_out], or compiled code would be made for one K."""
    K, D_out, _ = sB_KDR.shape
    y = x.new_empty(*x.shape[:-1], D_out)
    torch.bmm(h_KTR, sB_KDR.mT, out=y.view(K, -1, D_out))
    return y
