"""Any other layer: it brings its own autograd."""

import torch
from torch import Tensor, nn

from rankrace.bank.base.product import InputGradient, adapter_product


class OwnProduct:
    """Keeps from the forward whatever the layer's own backward wants."""

    comes_first = False

    def __init__(self, base: nn.Module) -> None:
        self.base = base

    def read(self, x: Tensor) -> Tensor:
        return x

    def output(self, read: Tensor, h_KTR: Tensor, sB_KDR: Tensor) -> tuple[InputGradient, Tensor]:
        with torch.enable_grad():
            x = read.detach().requires_grad_()
            y = self.base(x)

        def through_graph(g: Tensor, gx: Tensor, fresh: bool) -> None:
            (own,) = torch.autograd.grad(y, x, g)
            gx.copy_(own) if fresh else gx.add_(own)

        return through_graph, adapter_product(read, h_KTR, sB_KDR).add_(y.detach())
