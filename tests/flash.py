"""A stand-in for torch's flash attention over sequence boundaries, which runs on CUDA only: one operation with a
backward of its own, as compiled code sees it, from the textbook's formulas.

Shapes: M tokens, H / G query / key heads, D head width, L tokens of one example.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def examples_of(cu_seqlens: Tensor, *tensors_MHD: Tensor, heads: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Each example's place, and its part of every tensor as [H, L, D]."""
    for begin, end in pairwise(cu_seqlens.tolist()):
        here = slice(begin, end)
        yield here, [x[here].repeat_interleave(heads // x.shape[1], 1).transpose(0, 1) for x in tensors_MHD]


def probabilities(q_HLD: Tensor, k_HLD: Tensor, causal: bool, scale: float) -> Tensor:
    scores_HLL = q_HLD @ k_HLD.mT * scale
    if causal:
        hidden_LL = torch.ones(scores_HLL.shape[1:], dtype=torch.bool).triu(1)
        scores_HLL = scores_HLL.masked_fill(hidden_LL, float("-inf"))
    return scores_HLL.softmax(-1)


@torch.library.custom_op("rankrace_tests::flash", mutates_args={})
def flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, causal: bool, scale: float) -> Tensor:
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous(), "else the real one would copy them"  # noqa: PT018
    assert int(cu_seqlens.diff().max()) <= longest
    out = torch.empty_like(q)
    for here, (Q, K, V) in examples_of(cu_seqlens, q, k, v, heads=q.shape[1]):
        out[here] = (probabilities(Q, K, causal, scale) @ V).transpose(0, 1)
    return out


@torch.library.custom_op("rankrace_tests::flash_backward", mutates_args={})
def flash_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    assert g.is_contiguous()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for here, (Q, K, V, G) in examples_of(cu_seqlens, q, k, v, g, heads=q.shape[1]):
        P = probabilities(Q, K, causal, scale)
        dP = G @ V.mT
        dS = P * (dP - (P * dP).sum(-1, keepdim=True)) * scale
        dq[here] = (dS @ K).transpose(0, 1)
        for into, per_head in ((dk, dS.mT @ Q), (dv, P.mT @ G)):
            into[here] = per_head.transpose(0, 1).unflatten(1, (into.shape[1], -1)).sum(2)
    return dq, dk, dv


@flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, causal: bool, scale: float) -> Tensor:
    return torch.empty_like(q)


@flash_backward.register_fake
def _(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    *tensors, _, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _back(ctx, g):
    return *torch.ops.rankrace_tests.flash_backward(g, *ctx.saved_tensors, ctx.causal, ctx.scale), *[None] * 4


flash.register_autograd(_back, setup_context=_save)


def varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """With the signature of torch's."""
    return flash(q, k, v, cu_q, max_q, window_size[1] == 0, scale)
