"""Fuses what lies between a model's matrix products: norms, rotary embeddings, SwiGLU, residuals, dropout.

Each block of the trunk is compiled into one graph, in which a group of adapted layers is one operation and so is
flash attention. From q, k and v to the attention and back no copy is left: tokens are outermost on the whole way. All
blocks share one compilation, and token counts are dynamic.

What the backward can make again by a pass over memory is not kept for it: normalised inputs, silu(gate)·up.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from transformers import AttentionInterface

from rankrace.bank import Bank
from rankrace.bank.base.fp8 import rounded
from rankrace.bank.dropout import dropped
from rankrace.bank.linear import BankLinear, fix_width
from rankrace.bank.opaque import Opaque, can_be_opaque
from rankrace.training import attention

APART = "rankrace_packed_apart"


def compile_blocks(bank: Bank, backend: str = "inductor") -> None:
    """Compiles the blocks of the bank's model at their next call; `uncompile` undoes it."""
    bank.model.set_attn_implementation(attention.NAME)
    if not attention.has_flash(bank.device, bank.model.dtype):
        # Flash attention is an operation that compiled code can call. The padded fallback is many, of changing sizes.
        AttentionInterface.register(APART, torch.compiler.disable(attention.packed_attention))
        bank.model.set_attn_implementation(APART)
    bank.switch.drop = torch.compile(dropped, dynamic=True, backend=backend)
    bank.switch.rounded = torch.compile(rounded, dynamic=True, backend=backend)
    for siblings in bank.siblings.values():
        if can_be_opaque(siblings):
            group = Opaque(siblings)
            first, *others = (siblings.layers[i] for i in siblings.called)
            first.forward = group.lead  # type: ignore[method-assign]
            for layer in others:
                layer.forward = group.follow  # type: ignore[method-assign]
        else:
            for layer in siblings.layers:
                layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    all_blocks, compiler = blocks(bank), lean(backend)  # one for all, or none would share what another compiled
    for block in all_blocks:
        block.forward = fixed_widths(torch.compile(block.forward, dynamic=True, backend=compiler))
    all_blocks[0].forward = with_gradient(all_blocks[0].forward)


def lean(name: str) -> Callable[..., Any]:
    """The backend, but with little kept for the backward."""
    backend = lookup_backend(name)

    def compile_graph(*args: Any, **kwargs: Any) -> Any:
        # By default what a product or another whole operation of the backward reads is kept, however cheap it is.
        with functorch_config.patch(ban_recompute_materialized_backward=False):
            return backend(*args, **kwargs)

    return compile_graph


def uncompile(bank: Bank) -> None:
    """The eager path again."""
    for module in [*bank.layers.values(), *blocks(bank)]:
        del module.forward
    bank.switch.drop, bank.switch.rounded = dropped, rounded
    bank.model.set_attn_implementation(attention.NAME)


def fixed_widths(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Only the number of tokens changes. A width that is no constant costs divisions for every element."""

    def run(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            for x in value if isinstance(value, tuple) else (value,):  # a tuple: rotary embeddings
                if isinstance(x, Tensor):
                    fix_width(x)
        return forward(*args, **kwargs)

    return run


def with_gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The first block's input needs no gradient. Asking for one spares a second compilation, for one block."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(x.requires_grad_() if torch.is_grad_enabled() else x, *args, **kwargs)

    return run


def blocks(bank: Bank) -> list[nn.Module]:
    """The members of the outermost lists of modules that hold adapted layers: a transformer's blocks."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(m for m in child if any(isinstance(x, BankLinear) for x in m.modules()))
            else:
                visit(child)

    visit(bank.model)
    return found
