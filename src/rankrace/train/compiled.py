"""Fuses what lies between a model's matrix products: norms, rotary embeddings, SwiGLU, residuals, dropout.

Each block of the trunk is compiled; the adapted layers and the attention stay outside, so that a block falls into a
few pieces without any product in them. A group of siblings is left for only once, at its first layer. All blocks
share one compilation, and token counts are dynamic.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from transformers import AttentionInterface

from rankrace.bank import Bank
from rankrace.bank.dropout import dropped
from rankrace.bank.linear import BankLinear, follow
from rankrace.train import attention

NAME = "rankrace_packed_compiled"


def compile_blocks(bank: Bank, backend: str = "inductor") -> None:
    """Compiles the blocks of the bank's model at their next call; `uncompile` undoes it."""
    # Gradients then come in the memory order of what they are gradients of: tokens outermost, as the attention takes
    # its inputs. The default since torch 2.13; before, each of q's and k's was copied into another order and back.
    torch._functorch.config.guess_tangent_strides_as_outputs = True
    AttentionInterface.register(NAME, torch.compiler.disable(attention.packed_attention))
    bank.model.set_attn_implementation(NAME)
    bank.switch.drop = torch.compile(dropped, dynamic=True, backend=backend)
    for siblings in bank.siblings.values():
        first, *others = siblings.layers
        first.forward = torch.compiler.disable(siblings.lead)
        for layer in others:
            layer.forward = follow
    all_blocks = blocks(bank)
    for block in all_blocks:
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend)
    all_blocks[0].forward = with_gradient(all_blocks[0].forward)


def uncompile(bank: Bank) -> None:
    """The eager path again."""
    for module in [*bank.layers.values(), *blocks(bank)]:
        del module.forward
    bank.switch.drop = dropped
    bank.model.set_attn_implementation(attention.NAME)


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
