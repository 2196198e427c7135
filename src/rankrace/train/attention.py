"""Attention over packed rows: examples lie end to end, and none sees another.

Shapes: K candidates, T tokens of the packed row, N examples in it, L the longest of them, H / G query / key
heads, D head width. Transformers calls an attention function with query [K, H, T, D], key and value
[K, G, T, D] and wants [K, T, H, D] back.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rankrace.errors import RankraceError

NAME = "rankrace_packed"

# torch 2.12 replaced varlen_attn's is_causal by window_size.
CAUSAL: dict[str, Any] = (
    {"window_size": (-1, 0)} if "window_size" in signature(varlen_attn).parameters else {"is_causal": True}
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the examples lie in a packed row, and how to move them to a padded grid and back."""

    cu_seqlens_KN: Tensor
    """[K·N + 1] int32: where each example of each candidate's copy begins."""
    longest: int
    grid_NL: Tensor
    """[N·L]: the token in each cell of the padded grid; padding cells name the example's first token."""
    cell_T: Tensor
    """[T]: the cell of each token."""
    valid_NL: Tensor | None
    """[N, L] bool; None when every example has length L."""

    @staticmethod
    def of(lengths: list[int], candidates: int, device: torch.device) -> "Layout":
        T, N, L = sum(lengths), len(lengths), max(lengths)
        length_N = torch.tensor(lengths)
        start_N = torch.cumsum(length_N, 0) - length_N
        position_L = torch.arange(L)
        valid_NL = position_L[None] < length_N[:, None]
        grid_NL = torch.where(valid_NL, start_N[:, None] + position_L[None], start_N[:, None])
        cell_T = torch.arange(N * L).view(N, L)[valid_NL]
        starts_KN = (torch.arange(candidates)[:, None] * T + start_N[None]).flatten()
        cu_seqlens = torch.cat([starts_KN, torch.tensor([candidates * T])]).to(torch.int32)
        return Layout(
            cu_seqlens_KN=cu_seqlens.to(device),
            longest=L,
            grid_NL=grid_NL.flatten().to(device),
            cell_T=cell_T.to(device),
            valid_NL=None if bool(valid_NL.all()) else valid_NL.to(device),
        )


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
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and window is None:
        return varlen(query, key, value, layout, scaling, causal), None
    return padded(query, key, value, layout, scaling, causal, window), None


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float, causal: bool) -> Tensor:
    """Flash attention over the boundaries; no padding at all."""
    K, H, T, D = q.shape
    repeat = H // k.shape[1]

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(K * T, -1, D)

    k, v = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (k, v))
    cu, L = layout.cu_seqlens_KN, layout.longest
    out = varlen_attn(rows(q), rows(k), rows(v), cu, cu, L, L, scale=scaling, **(CAUSAL if causal else {}))
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
    if layout.valid_NL is not None and not causal:
        keys = layout.valid_NL.repeat(K, 1)[:, None, None]
        mask = keys if mask is None else mask & keys
    out = scaled_dot_product_attention(
        grid(q), grid(k), grid(v),
        attn_mask=mask, is_causal=causal and mask is None, scale=scaling, enable_gqa=k.shape[1] != H,
    )  # fmt: skip
    out = out.transpose(1, 2).reshape(K, -1, H, D)
    return out.index_select(1, layout.cell_T)


AttentionInterface.register(NAME, packed_attention)
