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
from torch.nn.functional import cross_entropy

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
                logits_V = head(h)
                wide_V = logits_V if logits_V.dtype == torch.float64 else logits_V.float()
                loss = cross_entropy(wide_V, targets, reduction="none")
                total = loss.sum()
            losses.append(loss.detach())
            corrects.append(logits_V.detach().argmax(-1) == targets)
            if needs_grad:
                grad, *of_weights = torch.autograd.grad(total, (h, *weights))
                grads.append(grad)
                for mine, new in zip(weight_grads, of_weights, strict=True):
                    mine.add_(new)
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


def chunked_cross_entropy(
    h_MD: Tensor, targets_M: Tensor, head: Head, chunk: int = 256, weights: tuple[Tensor, ...] = ()
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
