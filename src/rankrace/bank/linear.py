"""One adapted linear layer: K LoRA candidates over one frozen base.

Shapes: K candidates, T tokens of one packed row, D_in / D_out the base layer's widths, R the padded rank.
Activations carry the candidates outermost: [K, T, D], or any reshape of it that keeps them outermost.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
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

    The products run per candidate (baddbmm), never over a concatenation of factors, where 0·NaN would carry
    one candidate's divergence into the others.
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

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.switch.enabled:
            return y
        k = self.switch.active
        x_KTD = x.reshape(self.switch.count, -1, self.d_in)
        if self.switch.dropout > 0:
            x_KTD = x_KTD * dropout_mask(
                self.switch, self.index, x_KTD.shape[1], self.d_in, x.device, x.dtype
            )
        # The multiplier joins B in full precision: a ratio such as 32/12 does not exist in bfloat16.
        B_KRD = (self.B_KDR[k] * self.multiplier_K[k, None, None]).to(x.dtype).transpose(1, 2)
        A_KDR = self.A_KRD[k].to(x.dtype).transpose(1, 2)
        y_KTD = y.reshape(self.switch.count, -1, self.d_out)
        return torch.baddbmm(y_KTD, torch.bmm(x_KTD, A_KDR), B_KRD).view(y.shape)


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
