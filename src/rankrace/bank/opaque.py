"""A group of adapted layers as one operation that compilers pass on without looking into it.

So a compiled block is one graph: no return to Python at every group, whose cost on the host was that of the rest of
the block. What the operation reads beside x (candidates, ranks, dropout) and where it adds gradients to are its
group's own affair; the compiler knows the group by a number, and compiles all blocks once.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rankrace.bank.base.own import OwnProduct
from rankrace.bank.linear import Siblings

_groups: "WeakValueDictionary[int, Opaque]" = WeakValueDictionary()


class Opaque:
    """A group for compiled code."""

    def __init__(self, siblings: Siblings) -> None:
        self.siblings = siblings
        self.first, *self.others = siblings.called
        self.widths = [layer.d_out for layer in siblings.layers]
        # A tensor: numbers would be constants of the code, and every block have its own.
        self.number = torch.tensor(max(_groups, default=-1) + 1, device="cpu")
        _groups[int(self.number)] = self
        self.handed: list[Tensor] = []

    def lead(self, x: Tensor) -> Tensor:
        """Of the sibling that is called first; the others' wait for `follow`, in the order of the calls."""
        ys = torch.ops.rankrace.adapted(x, self.number, self.widths, torch.is_grad_enabled())
        self.handed = [ys[i] for i in self.others]
        return ys[self.first]

    def follow(self, x: Tensor) -> Tensor:
        """Of a sibling that is not the first."""
        return self.handed.pop(0)


def can_be_opaque(siblings: Siblings) -> bool:
    """Autograd does not see into the operation, so no layer may bring its own."""
    return not any(isinstance(layer.product, OwnProduct) for layer in siblings.layers)


@torch.library.custom_op(
    "rankrace::adapted", mutates_args=(), schema="(Tensor x, Tensor number, int[] widths, bool trains) -> Tensor[]"
)
def adapted(x: Tensor, number: Tensor, widths: Sequence[int], trains: bool) -> list[Tensor]:
    """The outputs of all siblings. If it `trains`, a backward will come."""
    group = _groups[int(number)]
    if not group.siblings.switch.enabled:
        return [layer.base(x) for layer in group.siblings.layers]
    ys, kept = group.siblings.there(x)
    if trains:
        group.siblings.kept.append(kept)
    return ys


@torch.library.custom_op(
    "rankrace::adapted_backward", mutates_args=(), schema="(Tensor[] gs, Tensor x, Tensor number) -> Tensor"
)
def adapted_backward(gs: Sequence[Tensor], x: Tensor, number: Tensor) -> Tensor:
    """The gradient of x. Those of the factors are added to what the bank has, as a side effect."""
    group = _groups[int(number)]
    gx = group.siblings.back(x, group.siblings.kept.pop(), gs, through=True)
    assert gx is not None
    return gx


@adapted.register_fake
def _(x: Tensor, number: Tensor, widths: Sequence[int], trains: bool) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], D_out) for D_out in widths]


@adapted_backward.register_fake
def _(gs: Sequence[Tensor], x: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, number, _, _ = inputs
    ctx.save_for_backward(x, number)


def _backward(ctx: Any, gs: Sequence[Tensor]) -> tuple[Tensor, None, None, None]:
    return torch.ops.rankrace.adapted_backward(gs, *ctx.saved_tensors), None, None, None


adapted.register_autograd(_backward, setup_context=_save)
