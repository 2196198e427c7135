"""Fuses what lies between a model's matrix products: norms, rotary embeddings, SwiGLU, residuals.

Each block of the trunk is compiled; the adapted layers and the attention stay outside, so that a block falls into a
few pieces without any product in them. All blocks share one compilation, and token counts are dynamic.
"""

import torch
from torch import nn
from transformers import AttentionInterface

from rankrace.bank import Bank
from rankrace.bank.linear import BankLinear
from rankrace.train.attention import packed_attention

ATTENTION = "rankrace_packed_uncompiled"


def compile_blocks(bank: Bank) -> None:
    """Compiles the blocks of the bank's model at their next call."""
    AttentionInterface.register(ATTENTION, torch.compiler.disable(packed_attention))
    bank.model.set_attn_implementation(ATTENTION)
    for layer in bank.layers.values():
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    # The first block's input needs no gradient: compiling it too would double the compilations for one block.
    for block in blocks(bank)[1:]:
        block.compile(dynamic=True)


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
