"""One adapted linear layer: K LoRA candidates over one frozen base.

Shapes: K candidates, T tokens of one packed row, D_in / D_out the base layer's widths, R the padded rank.
Activations carry the candidates outermost: [K, T, D], or any reshape of it that keeps them outermost.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


@dataclass(kw_only=True)
class BankSwitch:
    """What every layer of one bank must agree on during a forward pass."""

    active: slice = field(default_factory=lambda: slice(0, 0))
    """The candidates that run in this pass."""
    enabled: bool = True
    """False: the plain base model."""
    dropout: float = 0.0
    """0 outside training steps."""
    seed: int = 0
    step: int = 0
    micro: int = 0
    """(seed, step, micro) and the layer's index fix its dropout mask."""

    @property
    def count(self) -> int:
        return self.active.stop - self.active.start


class BankLinear(nn.Module):
    """y = base(x) + s_k · dropout(x) A_kᵀ B_kᵀ for each candidate k (Hu et al. 2021, equation 3).

    A_KRD [K, R, D_in] and B_KDR [K, D_out, R] are PEFT's lora_A and lora_B. A candidate of rank r < R has
    zeros in its last R - r rows of A and columns of B. That is exact: their gradients are zero, and AdamW
    leaves a zero with zero gradient alone.
    """

    def __init__(self, base: nn.Module, index: int, switch: BankSwitch) -> None:
        super().__init__()
        self.base = base
        self.index = index
        self.d_in, self.d_out = linear_shape(base)
        self.switch = switch
        self.A_KRD = nn.Parameter(torch.empty(0, 0, self.d_in))
        self.B_KDR = nn.Parameter(torch.empty(0, self.d_out, 0))
        self.multiplier_K = torch.empty(0)
        # What the products use: A, and B with the multiplier in it, in the compute type (Bank.refresh).
        self.compute_A_KRD = torch.empty(0)
        self.compute_sB_KDR = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch.enabled:
            return self.base(x)
        out_KTD = _Adapt.apply(x.reshape(self.switch.count, -1, self.d_in), self.A_KRD, self.B_KDR, self)
        return out_KTD.view(*x.shape[:-1], self.d_out)  # type: ignore[union-attr]


class _Adapt(torch.autograd.Function):
    """base(x) + s·x Aᵀ Bᵀ, with its own backward.

    The adapters' products run per candidate (bmm), never over a concatenation of factors, where 0·NaN would carry
    one candidate's divergence into the others, and end in the memory of the base's product. Saved are x (shared by
    all layers that read it) and x Aᵀ; masks of dropout are drawn again. Gradients of the factors are added to the
    full-precision ones at once.
    """

    @staticmethod
    def forward(ctx: Any, x_KTD: Tensor, A_KRD: Tensor, B_KDR: Tensor, layer: BankLinear) -> Tensor:
        s = layer.switch
        active = s.active
        A, sB = layer.compute_A_KRD[active], layer.compute_sB_KDR[active]
        ctx.dropped = s.dropout > 0
        mask_TD = layer_mask(layer, x_KTD) if ctx.dropped else None
        ctx.base, y_KTD = base_product(layer.base, x_KTD)
        h_KTR = torch.bmm(x_KTD if mask_TD is None else x_KTD * mask_TD, A.transpose(1, 2))
        ctx.save_for_backward(x_KTD, h_KTR, A, sB)
        ctx.layer, ctx.active, ctx.factors = layer, active, (A_KRD, B_KDR)
        return y_KTD.baddbmm_(h_KTR, sB.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_KTD,) = grads
        x_KTD, h_KTR, A, sB = ctx.saved_tensors
        mask_TD = layer_mask(ctx.layer, x_KTD) if ctx.dropped else None
        gh_KTR = torch.bmm(g_KTD, sB)
        dropped_KTD = x_KTD if mask_TD is None else x_KTD * mask_TD
        scale_K = ctx.layer.multiplier_K[ctx.active, None, None]
        A_grad, B_grad = (p.grad[ctx.active] for p in ctx.factors)
        A_grad.add_(torch.bmm(gh_KTR.transpose(1, 2), dropped_KTD))
        B_grad.addcmul_(torch.bmm(g_KTD.transpose(1, 2), h_KTR).to(B_grad.dtype), scale_K)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        gx_KTD = ctx.base(g_KTD)
        if mask_TD is None:
            gx_KTD.baddbmm_(gh_KTR, A)
        else:
            gx_KTD.add_(torch.bmm(gh_KTR, A).mul_(mask_TD))
        return gx_KTD, None, None, None


def base_product(base: nn.Module, x_KTD: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(g ↦ the gradient of base(x) with respect to x, base(x)), both in memory that nobody else reads.

    Plain layers keep nothing for it but their weight. Any other (a quantised one) brings its own autograd.
    """
    if type(base) is nn.Linear or type(base) is Conv1D:
        W_OD = base.weight if type(base) is nn.Linear else base.weight.T
        y_KTD = torch.nn.functional.linear(x_KTD, W_OD, base.bias)
        return lambda g_KTD: g_KTD @ W_OD, y_KTD
    with torch.enable_grad():
        x = x_KTD.detach().requires_grad_()
        y = base(x)
    return lambda g_KTD: torch.autograd.grad(y, x, g_KTD)[0].clone(), y.detach().clone()


def layer_mask(layer: BankLinear, x_KTD: Tensor) -> Tensor:
    """The layer's dropout mask in this pass."""
    return dropout_mask(layer.switch, layer.index, x_KTD.shape[1], layer.d_in, x_KTD.device, x_KTD.dtype)


def dropout_mask(
    switch: BankSwitch, layer: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[T, D_in], 0 or 1/(1-p): the same for every candidate, whichever others run beside it."""
    seed = counter_seed(switch.seed, layer, switch.step, switch.micro)
    generator = torch.Generator("cpu").manual_seed(seed)
    keep_TD = torch.rand(tokens, width, generator=generator) >= switch.dropout
    return keep_TD.to(device=device, dtype=dtype).div_(1 - switch.dropout)


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """(D_in, D_out) of a layer the bank can adapt."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    if isinstance(base, Conv1D):  # GPT-2: its weight is [D_in, D_out]
        return base.nx, base.nf
    raise TypeError(f"not an adaptable layer: {type(base).__name__}")


def counter_seed(*counters: int) -> int:
    """One 63-bit seed from several counters (splitmix64 steps), so that no random state needs to be kept."""
    mask = (1 << 64) - 1
    z = 0
    for c in counters:
        z = (z + c + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return z >> 1
