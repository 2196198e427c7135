"""AdamW for a bank: each of its K candidates has its own learning rate, clipping and state.

Shapes: K candidates, P trainable values of one candidate.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rankrace.bank.flat import Flat
from rankrace.device import sent


class Optimizer(Protocol):
    """What the loop wants of one."""

    def step(self, lr_K: Sequence[float]) -> Tensor: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class BankAdamW:
    """AdamW (Loshchilov & Hutter 2019) with the candidate as the outermost dimension of every tensor.

    Candidate k's update is that of `torch.optim.AdamW` after `clip_grad_norm_` on its own values: nothing is
    reduced over candidates, so none can disturb another.

    Args:
        values, gradients: [K, P]; the gradients are cleared by each step.
        clip: limit of each candidate's own gradient norm.
    """

    def __init__(
        self,
        values: Flat,
        gradients: Flat,
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.values, self.gradients = values, gradients
        self.weight_decay, self.clip, self.betas, self.eps = weight_decay, clip, betas, eps
        self.updates = 0
        self.mean, self.square = Flat.like(values.views), Flat.like(values.views)

    @torch.no_grad()
    def step(self, lr_K: Sequence[float]) -> Tensor:
        """One update. Returns the gradient norms [K] before clipping."""
        self.updates += 1
        beta1, beta2 = self.betas
        p, g, m, v = (flat.all_KP for flat in (self.values, self.gradients, self.mean, self.square))
        norm_K = torch.linalg.vector_norm(g, dim=1)
        g.mul_((self.clip / (norm_K + 1e-6)).clamp_(max=1.0)[:, None])
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        lr_K1 = sent(torch.tensor(lr_K, dtype=p.dtype), p.device)[:, None]
        if self.weight_decay:
            p.mul_(1 - lr_K1 * self.weight_decay)
        # In the gradient's memory: m̂ / (√v̂ + ε).
        correction1, correction2 = 1 - beta1**self.updates, 1 - beta2**self.updates
        torch.div(v, correction2, out=g).sqrt_().add_(self.eps)
        torch.div(m, g, out=g)
        p.addcmul_(g, lr_K1, value=-1 / correction1)
        g.zero_()
        return norm_K

    def keep(self, values: Flat, gradients: Flat, indices: Sequence[int]) -> "BankAdamW":
        """The optimiser of the candidates that stay, whose (re-padded) values are given; state kept exactly."""
        new = BankAdamW(
            values, gradients, weight_decay=self.weight_decay, clip=self.clip, betas=self.betas, eps=self.eps
        )
        new.updates = self.updates
        new.mean, new.square = self.mean.kept(indices, values), self.square.kept(indices, values)
        return new

    def resume(self, mean: Mapping[str, Tensor], square: Mapping[str, Tensor], *, updates: int) -> None:
        """Goes on from these moments, named as the values."""
        self.updates = updates
        for name in self.mean.views:
            self.mean.views[name].copy_(mean[name])
            self.square.views[name].copy_(square[name])

    def state(self) -> dict[str, Tensor]:
        """Everything but values and gradients, by name."""
        return {
            "mean": self.mean.all_KP,
            "square": self.square.all_KP,
            "updates": torch.tensor(self.updates),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["updates"])
        self.mean.all_KP.copy_(state["mean"])
        self.square.all_KP.copy_(state["square"])
