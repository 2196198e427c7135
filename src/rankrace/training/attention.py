"""Attention over packed rows: examples lie end to end, and none sees another.

Shapes: K candidates, T tokens of the packed row, M = K·T, N examples in it, L the longest of them, H / G query /
key heads, D head width. All candidates' copies of the row lie end to end in one of M tokens: Transformers calls an
attention function with query [1, H, M, D], key and value [1, G, M, D] and wants [1, M, H, D] back.
"""

from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

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
    read_R: Tensor | None = None
    """[R]: the tokens of all M whose output is read, where not all are: see `lastblock`."""

    cu_seqlens_KN: Tensor = field(init=False)
    """[K·N + 1] int32: the same for all candidates' copies, one behind the other."""

    def __post_init__(self) -> None:
        end = torch.full((1,), self.candidates * self.tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        self.cu_seqlens_KN = torch.cat([self.copies(self.cu_seqlens[:-1], self.tokens), end])

    @cached_property
    def valid_NL(self) -> Tensor:
        """[N, L] bool: which cells of the padded grid hold a token."""
        return torch.arange(self.longest)[None] < torch.tensor(self.lengths_N)[:, None]

    @cached_property
    def ragged_NL(self) -> Tensor | None:
        """The same on the device; None when every example has length L."""
        return None if bool(self.valid_NL.all()) else self.valid_NL.to(self.cu_seqlens.device)

    @cached_property
    def token_KNL(self) -> Tensor:
        """[K·N·L]: the token in each cell of the padded grid; padding cells name the row's first token."""
        length_N = torch.tensor(self.lengths_N)
        start_N = torch.cumsum(length_N, 0) - length_N
        position_L = torch.arange(self.longest)
        token_NL = torch.where(self.valid_NL, start_N[:, None] + position_L[None], 0)
        return self.copies(token_NL.flatten().to(self.cu_seqlens.device), self.tokens)

    @cached_property
    def cell_M(self) -> Tensor:
        """[M]: the cell of each token."""
        cell_NL = torch.arange(self.valid_NL.numel()).view_as(self.valid_NL)
        return self.copies(cell_NL[self.valid_NL].to(self.cu_seqlens.device), self.valid_NL.numel())

    def copies(self, places: Tensor, size: int) -> Tensor:
        """The same places for every candidate, whose part has this size."""
        offset_K = torch.arange(self.candidates, dtype=places.dtype, device=places.device) * size
        return (offset_K[:, None] + places).flatten()


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention runs there."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def cannot_capture(model: PreTrainedModel, longest: int) -> str | None:
    """Why passes of this model cannot be captured as CUDA graphs; None if they can.

    Only flash attention reads boundaries on the device. The padded fallback takes the examples' lengths from the
    host, and a graph would replay those of the row that it was captured with.

    Args:
        longest: example, in tokens.
    """
    if model.device.type != "cuda":
        return f"they are CUDA's, and the model is on the {model.device.type}"
    if not has_flash(model.device, model.dtype):
        return f"flash attention has no {str(model.dtype).removeprefix('torch.')}"
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if not HAS_WINDOW and window is not None and window < longest:
        return f"torch {torch.__version__} has no flash attention with a sliding window (of {window} tokens)"
    return None


def refuse_capture(model: PreTrainedModel, longest: int) -> None:
    """Raises RankraceError where passes cannot be captured."""
    why = cannot_capture(model, longest)
    if why is not None:
        raise RankraceError("CUDA graphs cannot be used", why=why, fix="--cuda-graphs off, or auto")


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
    # No copies: projections have tokens outermost, and rotary embeddings keep their order.
    q_MHD, k_MGD, v_MGD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    causal = bool(module.is_causal)
    window = sliding_window if sliding_window is not None and sliding_window < layout.longest else None
    flash = has_flash(query.device, query.dtype) and (window is None or HAS_WINDOW)
    by_boundaries = varlen if flash else padded
    return by_boundaries(q_MHD, k_MGD, v_MGD, layout, scaling, causal, window)[None], None


def varlen(
    q_MHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, layout: Layout, scaling: float, causal: bool, window: int | None
) -> Tensor:
    """Flash attention over the boundaries; no padding at all."""
    options: dict[str, Any] = {"scale": scaling}
    if HAS_WINDOW:
        reach = -1 if window is None else window - 1
        options["window_size"] = (reach, 0 if causal else reach)
    else:
        options["is_causal"] = causal
    times = q_MHD.shape[1] // k_MGD.shape[1]
    if times > 1:
        if HAS_GQA:
            options["enable_gqa"] = True
        else:
            k_MGD, v_MGD = (x.repeat_interleave(times, 1) for x in (k_MGD, v_MGD))
    cu, L = layout.cu_seqlens_KN, layout.longest
    out_MHD = varlen_attn(q_MHD, k_MGD, v_MGD, cu, cu, L, L, **options)
    assert isinstance(out_MHD, Tensor)
    return out_MHD


def padded(
    q_MHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, layout: Layout, scaling: float, causal: bool, window: int | None
) -> Tensor:
    """The exact fallback for any device and dtype: only the attention itself is padded.

    With the padding on the right, causality alone hides it from every real token.
    """
    L = layout.longest

    def grid(x_MHD: Tensor) -> Tensor:
        return x_MHD.index_select(0, layout.token_KNL).unflatten(0, (-1, L)).transpose(1, 2)

    mask = None
    if window is not None:
        i, j = torch.arange(L, device=q_MHD.device)[:, None], torch.arange(L, device=q_MHD.device)[None]
        mask = (j > i - window) & (j <= i) if causal else (i - j).abs() < window
        mask = mask[None, None]
    if layout.ragged_NL is not None and not causal:
        keys = layout.ragged_NL.repeat(layout.candidates, 1)[:, None, None]
        mask = keys if mask is None else mask & keys
    out = scaled_dot_product_attention(
        grid(q_MHD), grid(k_MGD), grid(v_MGD),
        attn_mask=mask, is_causal=causal and mask is None, scale=scaling,
        enable_gqa=k_MGD.shape[1] != q_MHD.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(0, 1).index_select(0, layout.cell_M)


AttentionInterface.register(NAME, packed_attention)
