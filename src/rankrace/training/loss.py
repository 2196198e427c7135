"""Cross-entropy that never holds more than one chunk of logits.

Shapes: M rows (candidates × supervised positions), D model width, V vocabulary.

A 32-layer trunk keeps its graph; the head does not need to. For each chunk of rows the logits are made, the
loss and its gradient with respect to the hidden states are taken, and the logits are freed. One backward then
goes through the trunk from the cached gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankrace.data.pack import IGNORED

Head = Callable[[Tensor], Tensor]
"""Hidden states [M, D] → logits [M, V], row by row."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_MD: Tensor, targets_M: Tensor, head: Head, chunk: int, needs_grad: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, corrects, grads = [], [], []
        weight_grads = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        for h_D, targets in zip(h_MD.split(chunk), targets_M.split(chunk), strict=True):
            with torch.set_grad_enabled(needs_grad):
                h = h_D.detach().requires_grad_(needs_grad)
                logits_MV = head(h)
            corrects.append(logits_MV.detach().argmax(-1) == targets)
            loss, logs_MV = cross_entropy(logits_MV.detach(), targets)
            losses.append(loss)
            if needs_grad:
                grad_MV = cross_entropy_gradient(logs_MV, targets, out=logits_MV.detach())
                grad, *of_weights = torch.autograd.grad(logits_MV, (h, *weights), grad_MV)
                grads.append(grad)
                for mine, new in zip(weight_grads, of_weights, strict=True):
                    mine.add_(new)
                del grad_MV
            del logits_MV, logs_MV  # before those of the next chunk come
        ctx.save_for_backward(*([torch.cat(grads), *weight_grads] if needs_grad else []))
        correct_M = torch.cat(corrects)
        ctx.mark_non_differentiable(correct_M)
        return torch.cat(losses), correct_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_MD, *weight_grads = ctx.saved_tensors  # type: ignore[attr-defined]
        # A row's loss depends on that row alone, so any weighting of rows is a product.
        rows_MD = grad_MD * outputs[0][:, None].to(grad_MD.dtype)
        return rows_MD, None, None, None, None, *(g * outputs[0][0] for g in weight_grads)


def cross_entropy(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(logits) at the targets, 0 where they do not count; and the whole log softmax, at least float32."""
    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    logs_MV = torch.log_softmax(logits_MV, -1, dtype=wide)
    loss_M = -logs_MV.gather(1, targets_M.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_M == IGNORED, 0.0, loss_M), logs_MV


def cross_entropy_gradient(logs_MV: Tensor, targets_M: Tensor, *, out: Tensor) -> Tensor:
    """softmax - onehot, that of the losses' sum with respect to the logits, in the memory of `out`; the logs' memory
    is used on the way."""
    counts_M1 = (targets_M != IGNORED).to(logs_MV.dtype)[:, None]
    grad_MV = logs_MV.exp_().scatter_add_(1, targets_M.clamp(min=0)[:, None], -counts_M1)
    return torch.mul(grad_MV, counts_M1, out=out)


def chunked_cross_entropy(
    h_MD: Tensor, targets_M: Tensor, head: Head, chunk: int = 512, weights: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Losses [M] in nats, and whether the target was the most likely token [M].

    Args:
        weights: the head's parameters, if it trains. The backward then has to weigh all rows alike, since
            their gradient is taken once for the sum of all rows.
    """
    if h_MD.shape[0] == 0:
        return h_MD.sum(-1).float(), targets_M == targets_M
    needs_grad = torch.is_grad_enabled() and h_MD.requires_grad
    return _ChunkedCrossEntropy.apply(h_MD, targets_M, head, chunk, needs_grad, *weights)  # type: ignore[return-value]
