"""AdamW for a bank: every tensor holds K candidates, each with its own learning rate, clipping and state."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class BankAdamW:
    """AdamW (Loshchilov & Hutter 2019) with the candidate as the outermost dimension of every parameter.

    Candidate k's update is bit for bit that of `torch.optim.AdamW` after `clip_grad_norm_` on its own slice:
    nothing is reduced over candidates, so none can disturb another.

    Args:
        parameters: tensors [K, …].
        clip: limit of each candidate's own gradient norm.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = list(parameters)
        self.weight_decay, self.clip, self.betas, self.eps = weight_decay, clip, betas, eps
        self.updates = 0
        self.mean = [torch.zeros_like(p) for p in self.parameters]
        self.square = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr_K: Sequence[float]) -> Tensor:
        """One update from the parameters' gradients, which are then cleared.

        Returns:
            The gradient norms [K] before clipping.
        """
        self.updates += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.updates, 1 - beta2**self.updates
        grads = [p.grad for p in self.parameters]
        assert all(g is not None for g in grads), "a parameter of the bank got no gradient"
        lr = torch.tensor(lr_K, dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        squares = torch.stack([g.flatten(1).square().sum(1) for g in grads if g is not None])
        norm_K = squares.sum(0).sqrt()
        scale_K = (self.clip / (norm_K + 1e-6)).clamp(max=1.0)
        for p, g, m, v in zip(self.parameters, grads, self.mean, self.square, strict=True):
            assert g is not None
            per_candidate = (-1, *[1] * (p.dim() - 1))
            g = g * scale_K.view(per_candidate)
            lr_p = lr.view(per_candidate)
            p.mul_(1 - lr_p * self.weight_decay)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.sub_(lr_p * (m / correction1) / ((v / correction2).sqrt() + self.eps))
            p.grad = None
        return norm_K

    def keep(self, parameters: Iterable[nn.Parameter], indices: Sequence[int]) -> "BankAdamW":
        """The optimiser of the remaining candidates, whose (re-padded) parameters are given; state kept exactly."""
        new = BankAdamW(
            parameters, weight_decay=self.weight_decay, clip=self.clip, betas=self.betas, eps=self.eps
        )
        new.updates = self.updates
        index = list(indices)
        for p, m, v, m_new, v_new in zip(
            new.parameters, self.mean, self.square, new.mean, new.square, strict=True
        ):
            cut = tuple(slice(0, n) for n in p.shape[1:])
            m_new.copy_(m[index][(slice(None), *cut)])
            v_new.copy_(v[index][(slice(None), *cut)])
        return new

    def state(self) -> dict[str, Tensor]:
        """Everything but the parameters, by name."""
        mean = {f"mean.{i}": t for i, t in enumerate(self.mean)}
        square = {f"square.{i}": t for i, t in enumerate(self.square)}
        return {**mean, **square, "updates": torch.tensor(self.updates)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["updates"])
        for i, (m, v) in enumerate(zip(self.mean, self.square, strict=True)):
            m.copy_(state[f"mean.{i}"])
            v.copy_(state[f"square.{i}"])
