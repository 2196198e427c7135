"""Attention that remembers: keys and values of prompts, and of what is written after them, token by token.

Prompts run as packed rows, as in training. Then every prompt has one token in hand, and these make a packed row of N
tokens, each of which sees its own prompt and what was written after it.

Shapes: N prompts, T tokens of a packed row, M cells that are looked at, H / G query / key heads, D head width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rankrace.training.attention import Layout, packed_attention

NAME = "rankrace_remembering"


@dataclass(kw_only=True)
class Cache:
    """Of a batch of prompts. All memory is taken once, so that a step can be a CUDA graph."""

    prompts: int
    """N"""
    cells: int
    """Of each prompt and its answer, at most."""
    reach: int
    """M: how many of them a token in hand may attend to; those behind are empty yet."""
    position_N: Tensor
    """int64: of the token in hand."""
    keys: dict[nn.Module, Tensor] = field(default_factory=dict)
    """[N, cells, G, D] of each attention module."""
    values: dict[nn.Module, Tensor] = field(default_factory=dict)

    def store(self, module: nn.Module, place_T: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> None:
        """Puts tokens into cells, counted through all prompts."""
        for memory, x_TGD in ((self.keys, key_TGD), (self.values, value_TGD)):
            if module not in memory:
                memory[module] = x_TGD.new_zeros(self.prompts, self.cells, *x_TGD.shape[1:])
            memory[module].flatten(0, 1).index_copy_(0, place_T, x_TGD)

    def seen(self, window: int | None) -> Tensor:
        """[N, 1, 1, M] bool: the cells that the token in hand attends to."""
        cell_M, position_N1 = torch.arange(self.reach, device=self.position_N.device), self.position_N[:, None]
        mask_NM = cell_M <= position_N1
        if window is not None:
            mask_NM &= cell_M > position_N1 - window
        return mask_NM[:, None, None]

    def keep(self, indices: Tensor) -> None:
        """Only these prompts."""
        self.prompts, self.position_N = len(indices), self.position_N[indices]
        for memory in (self.keys, self.values):
            for module in memory:
                memory[module] = memory[module][indices]

    @property
    def place_N(self) -> Tensor:
        """The cells of the tokens in hand."""
        return torch.arange(self.prompts, device=self.position_N.device) * self.cells + self.position_N


@dataclass(kw_only=True)
class Filling:
    """Where the tokens of a packed row of prompts go."""

    cache: Cache
    layout: Layout
    place_T: Tensor


def remembering_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Filling | Cache,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface. Query [1, H, T, D], key and value [1, G, T, D]; returns [1, T, H, D]."""
    k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (key, value))
    if isinstance(layout, Filling):
        layout.cache.store(module, layout.place_T, k_TGD, v_TGD)
        return packed_attention(module, query, key, value, attention_mask, scaling=scaling, layout=layout.layout,
                                sliding_window=sliding_window, **others)  # fmt: skip
    layout.store(module, layout.place_N, k_TGD, v_TGD)
    k_NGMD, v_NGMD = (memory[module][:, : layout.reach].transpose(1, 2) for memory in (layout.keys, layout.values))
    # The query heads of a key head stand where a sequence would: no key is copied for them.
    q_NGHD = query[0].transpose(0, 1).unflatten(1, (k_NGMD.shape[1], -1))
    out_NGHD = scaled_dot_product_attention(q_NGHD, k_NGMD, v_NGMD, layout.seen(sliding_window), scale=scaling)
    return out_NGHD.flatten(1, 2)[None], None


AttentionInterface.register(NAME, remembering_attention)
