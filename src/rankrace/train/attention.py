"""Attention over packed rows: examples lie end to end, and none sees another.

Shapes: K candidates, T tokens of the packed row, N examples in it, L the longest of them, H / G query / key
heads, D head width. Transformers calls an attention function with query [K, H, T, D], key and value
[K, G, T, D] and wants [K, T, H, D] back.
"""

from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rankrace.errors import RankraceError

NAME = "rankrace_packed"

_PARAMETERS = signature(varlen_attn).parameters
# What torch 2.11 does not have yet is done by hand there.
HAS_WINDOW, HAS_GQA = "window_size" in _PARAMETERS, "enable_gqa" in _PARAMETERS


@dataclass(kw_only=True)  # not frozen: a compiled block would be compiled anew for every content of one
class Layout:
    """Where the examples lie in a packed row, and how to move them to a padded grid and back."""

    cu_seqlens: Tensor
    """[N + 1] int32: where each example begins, and the end."""
    lengths_N: list[int]
    tokens: int
    """T"""
    longest: int
    """L"""
    candidates: int
    """K"""

    @cached_property
    def cu_seqlens_KN(self) -> Tensor:
        """[K·N + 1] int32: the same for all candidates' copies, one behind the other."""
        device, K, T = self.cu_seqlens.device, self.candidates, self.tokens
        offsets_K1 = torch.arange(K, dtype=torch.int32, device=device)[:, None] * T
        end = torch.full((1,), K * T, dtype=torch.int32, device=device)
        return torch.cat([(offsets_K1 + self.cu_seqlens[:-1]).flatten(), end])

    @cached_property
    def valid_NL(self) -> Tensor:
        """[N, L] bool: which cells of the padded grid hold a token."""
        return torch.arange(self.longest)[None] < torch.tensor(self.lengths_N)[:, None]

    @cached_property
    def ragged_NL(self) -> Tensor | None:
        """The same on the device; None when every example has length L."""
        return None if bool(self.valid_NL.all()) else self.valid_NL.to(self.cu_seqlens.device)

    @cached_property
    def grid_NL(self) -> Tensor:
        """[N·L]: the token in each cell of the padded grid; padding cells name the row's first token."""
        length_N = torch.tensor(self.lengths_N)
        start_N = torch.cumsum(length_N, 0) - length_N
        position_L = torch.arange(self.longest)
        cells_NL = torch.where(self.valid_NL, start_N[:, None] + position_L[None], 0)
        return cells_NL.flatten().to(self.cu_seqlens.device)

    @cached_property
    def cell_T(self) -> Tensor:
        """[T]: the cell of each token."""
        cells_NL = torch.arange(self.valid_NL.numel()).view_as(self.valid_NL)
        return cells_NL[self.valid_NL].to(self.cu_seqlens.device)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, by sequence boundaries instead of a mask."""
    if layout is None or attention_mask is not None or softcap is not None:
        raise RankraceError(
            f"{type(module).__name__} cannot run on packed rows",
            why="its attention uses a mask or a soft cap of its own, or does not pass the sequence boundaries on",
            fix="use a model whose attention goes through Transformers' attention interface",
        )
    causal = bool(module.is_causal)
    window = sliding_window if sliding_window is not None and sliding_window < layout.longest else None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and (window is None or HAS_WINDOW):
        return varlen(query, key, value, layout, scaling, causal, window), None
    return padded(query, key, value, layout, scaling, causal, window), None


def varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float, causal: bool, window: int | None
) -> Tensor:
    """Flash attention over the boundaries; no padding at all."""
    K, H, T, D = q.shape
    options: dict[str, Any] = {"scale": scaling}
    if HAS_WINDOW:
        reach = -1 if window is None else window - 1
        options["window_size"] = (reach, 0 if causal else reach)
    else:
        options["is_causal"] = causal
    if k.shape[1] != H:
        if HAS_GQA:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(K * T, -1, D)

    cu, L = layout.cu_seqlens_KN, layout.longest
    out = varlen_attn(rows(q), rows(k), rows(v), cu, cu, L, L, **options)
    assert isinstance(out, Tensor)
    return out.view(K, T, H, D)


def padded(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float, causal: bool, window: int | None
) -> Tensor:
    """The exact fallback for any device and dtype: only the attention itself is padded.

    With the padding on the right, causality alone hides it from every real token.
    """
    K, H, _, D = q.shape
    L = layout.longest

    def grid(x: Tensor) -> Tensor:
        heads = x.shape[1]
        x = x.transpose(1, 2).index_select(1, layout.grid_NL)  # [K, N·L, heads, D]
        return x.reshape(-1, L, heads, D).transpose(1, 2)

    mask = None
    if window is not None:
        i, j = torch.arange(L, device=q.device)[:, None], torch.arange(L, device=q.device)[None]
        mask = (j > i - window) & (j <= i) if causal else (i - j).abs() < window
        mask = mask[None, None]
    if layout.ragged_NL is not None and not causal:
        keys = layout.ragged_NL.repeat(K, 1)[:, None, None]
        mask = keys if mask is None else mask & keys
    out = scaled_dot_product_attention(
        grid(q), grid(k), grid(v),
        attn_mask=mask, is_causal=causal and mask is None, scale=scaling, enable_gqa=k.shape[1] != H,
    )  # fmt: skip
    out = out.transpose(1, 2).reshape(K, -1, H, D)
    return out.index_select(1, layout.cell_T)


AttentionInterface.register(NAME, packed_attention)
