"""A small module that each candidate trains in full: a classifier head.

Shapes: K candidates, N examples, D width, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from rankrace.bank.linear import BankSwitch


class _Collect(torch.autograd.Function):
    """The identity, whose backward adds to the parameter's gradient in place: it is a view into a larger one,
    and autograd's own accumulation might replace it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.parameter.grad.add_(grads[0])


class BankHead(nn.Module):
    """K copies of one module, as stacked parameters with the candidates outermost.

    `original` keeps the module as it came; it also serves when the bank is switched off.
    """

    def __init__(self, original: nn.Module, switch: BankSwitch) -> None:
        super().__init__()
        self.original = original
        self.switch = switch
        self.names = tuple(name for name, _ in original.named_parameters())
        # nn.ParameterDict would turn the dots of nested names away.
        self.stacked = nn.ParameterList([nn.Parameter(p.detach().clone()[None]) for p in original.parameters()])

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch.enabled:
            return self.original(x)
        x_KN = x.reshape(self.switch.count, -1, *x.shape[1:])
        parameters = {
            n: _Collect.apply(p)[self.switch.active].to(x.dtype)  # type: ignore[index]
            for n, p in zip(self.names, self.stacked, strict=True)
        }

        def one(candidate: dict[str, Tensor], x_N: Tensor) -> Tensor:
            return functional_call(self.original, candidate, (x_N,))

        y_KN = torch.vmap(one)(parameters, x_KN)
        return y_KN.reshape(-1, *y_KN.shape[2:])
