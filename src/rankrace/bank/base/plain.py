"""Layers whose weight is at hand, or is made anew for each product (`nf4`)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from rankrace.bank.base.product import InputGradient, adapter_product, per_candidate


class PlainProduct:
    """Args:
    base: has a bias, or None for one.
    weight: gives W [O, D]; called once on the way there and once on the way back, so that nothing is kept.
    """

    comes_first = False

    def __init__(self, base: Any, weight: Callable[[], Tensor]) -> None:
        self.base, self.weight = base, weight

    def read(self, x: Tensor) -> Tensor:
        return x

    def output(self, read: Tensor, h_KTR: Tensor, sB_KDR: Tensor) -> tuple[InputGradient, Tensor]:
        W_OD = self.weight()
        if self.base.bias is not None:  # it rides on a plain product for nothing, on an adding one it does not
            y = linear(read, W_OD, self.base.bias)
            per_candidate(y, len(h_KTR)).baddbmm_(h_KTR, sB_KDR.mT)
            return self.add_input_gradient, y
        y = adapter_product(read, h_KTR, sB_KDR)
        y.view(-1, W_OD.shape[0]).addmm_(read.reshape(-1, W_OD.shape[1]), W_OD.T)
        return self.add_input_gradient, y

    def add_input_gradient(self, g: Tensor, gx: Tensor, fresh: bool) -> None:
        W_OD = self.weight()
        gx.view(-1, W_OD.shape[1]).addmm_(g.reshape(-1, W_OD.shape[0]), W_OD, beta=0 if fresh else 1)
