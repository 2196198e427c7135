"""Blocks that keep nothing but their input, and are run again for their gradient (Chen et al. 2016).

A third more work, for the memory of one block in place of all. Exact: a block is a function of its input, of the
bank's values and of the dropout keys, and none of them changes between a pass and its backward. Gradients of what
trains inside are added where they always are; only that of the block's input goes on from here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankrace.bank import Bank
from rankrace.bank.linear import BankLinear
from rankrace.training.compiled import blocks


def recompute_blocks(bank: Bank) -> None:
    """From now on; blocks that are to be compiled have to be so already."""
    for block in blocks(bank):
        # A trained parameter among the arguments: the first block's input has no gradient, its output has.
        trained = next(m for m in block.modules() if isinstance(m, BankLinear))
        block.forward = forgetting(block.forward, trained)


@contextmanager
def recomputing(bank: Bank) -> Iterator[None]:
    """For a while."""
    compiled = {block: block.forward for block in blocks(bank) if "forward" in vars(block)}
    recompute_blocks(bank)
    try:
        yield
    finally:
        for block in blocks(bank):
            del block.forward
        for block, forward in compiled.items():
            block.forward = forward


def forgetting(forward: Callable[..., Any], trained: BankLinear) -> Callable[..., Any]:
    """The same function of its first argument, which alone may have a gradient."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, *args, **kwargs)
        return _Again.apply(x, trained.A_KRD, lambda x: forward(x, *args, **kwargs))

    return run


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run = run
        return run(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (saved,) = ctx.saved_tensors
        x = saved.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, g)
        return (x.grad if ctx.needs_input_grad[0] else None), None, None
