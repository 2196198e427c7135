"""Adapted linear layers: K LoRA candidates over one frozen base, siblings (q, k, v; gate, up) in one product.

Shapes: K candidates, T tokens of one packed row, D_in / D_out the base layer's widths, R the padded rank, ΣR the
sum of the siblings' ranks. Activations carry the candidates outermost: [K, T, D], or any reshape of it that keeps
them outermost (x, y and their gradients g below).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rankrace.bank.base import product_of
from rankrace.bank.base.fp8 import rounded
from rankrace.bank.base.product import InputGradient, Rounding, per_candidate
from rankrace.bank.dropout import DropoutKeys, dropped


@dataclass(kw_only=True)
class BankSwitch:
    """What every layer of one bank must agree on during a forward pass."""

    active: slice = field(default_factory=lambda: slice(0, 0))
    """The candidates that run in this pass."""
    enabled: bool = True
    """False: the plain base model."""
    dropout: float = 0.0
    """0 outside training steps."""
    keys: DropoutKeys
    """Fix the masks of this pass."""
    drop: Callable[[Tensor, Tensor, float], Tensor] = dropped
    """`dropped`, or the same compiled."""
    rounded: Rounding = rounded
    """Likewise, of inputs and gradients where the base is in 8 bits."""

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
        self.product = product_of(base, switch)
        self.index = index
        self.d_in, self.d_out = linear_shape(base)
        self.switch = switch
        self.siblings = Siblings([self], switch)
        self.A_KRD = nn.Parameter(torch.empty(0, 0, self.d_in))
        self.B_KDR = nn.Parameter(torch.empty(0, self.d_out, 0))
        # What the product uses: B with the multiplier in it, in the compute type (Bank.refresh).
        self.compute_sB_KDR = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch.enabled:
            return self.base(x)
        return self.siblings.output(self, x)


@dataclass(kw_only=True)
class Kept:
    """What a group's backward wants beside x."""

    active: slice
    p: float
    h_KTR: Tensor
    """dropout(x) Aᵀ of all siblings."""
    A_KRD: Tensor
    sBs: list[Tensor]
    ways_back: tuple[InputGradient, ...]


class Siblings:
    """Layers that read the same tensor, in the order of the bank: the first that is called computes for all.

    A layer that is called with another tensor than its siblings were gets its output all the same.

    Args:
        called: the layers' indices in the order in which the model calls them, if it is another.
    """

    def __init__(self, layers: Sequence[BankLinear], switch: BankSwitch, called: Sequence[int] | None = None) -> None:
        self.layers, self.switch = tuple(layers), switch
        self.called = tuple(range(len(self.layers)) if called is None else called)
        self.multiplier_K = torch.empty(0)
        # All siblings' A as one [K, ΣR, D_in] in the compute type, and its gradient: see Bank.install.
        self.compute_A_KRD = torch.empty(0)
        self.A_grad_KRD: Tensor | None = None
        self.forget()

    # --- the equations

    def there(self, x: Tensor) -> tuple[list[Tensor], Kept]:
        """base(x) + s·dropout(x) Aᵀ Bᵀ of each layer, without autograd.

        The adapters' products run per candidate (bmm), never over a concatenation of candidates, where 0·NaN would
        carry one's divergence into the others. They come first, and the base's large products add themselves to them
        (β = 1), if they can: a pass over memory less than the other way round.
        """
        s, layers = self.switch, self.layers
        A, sBs = self.compute_A_KRD[s.active], [layer.compute_sB_KDR[s.active] for layer in layers]
        h_KTR = torch.bmm(self.dropout(per_candidate(x, s.count), s.dropout), A.mT)
        read = layers[0].product.read(x)
        sides = zip(layers, parts(h_KTR, sBs), sBs, strict=True)
        ways_back, ys = zip(*(layer.product.output(read, h, sB) for layer, h, sB in sides), strict=True)
        return list(ys), Kept(active=s.active, p=s.dropout, h_KTR=h_KTR, A_KRD=A, sBs=sBs, ways_back=ways_back)

    def back(self, x: Tensor, kept: Kept, gs: Sequence[Tensor], *, through: bool) -> Tensor | None:
        """Adds the gradients of the factors to the full-precision ones; returns that of x if it is to go `through`.

        x Aᵀ is there, once for all siblings; dropout is drawn again.
        """
        active, h_KTR, sBs = kept.active, kept.h_KTR, kept.sBs
        K, scale_K = len(h_KTR), self.multiplier_K[active, None, None]
        assert self.A_grad_KRD is not None
        gh_KTR = torch.empty_like(h_KTR)
        sides = zip(self.layers, gs, sBs, parts(h_KTR, sBs), parts(gh_KTR, sBs), strict=True)
        for layer, g, sB, h, gh in sides:
            assert layer.B_KDR.grad is not None
            g_KTD, B_grad = per_candidate(g, K), layer.B_KDR.grad[active]
            torch.bmm(g_KTD, sB, out=gh)
            B_grad.addcmul_(torch.bmm(g_KTD.mT, h), scale_K)  # in the wider type of the two
        x_KTD = per_candidate(x, K)
        self.A_grad_KRD[active].add_(torch.bmm(gh_KTR.mT, self.dropout(x_KTD, kept.p)))
        if not through:
            return None
        gx = torch.empty_like(x, memory_format=torch.contiguous_format)
        adds = [partial(way_back, g, gx) for way_back, g in zip(kept.ways_back, gs, strict=True)]
        adapters = partial(self.add_adapters, gh_KTR, kept, per_candidate(gx, K))
        adds.insert(len(adds) if self.layers[0].product.comes_first else 0, adapters)
        for i, add in enumerate(adds):
            add(i == 0)
        return gx

    def add_adapters(self, gh_KTR: Tensor, kept: Kept, gx_KTD: Tensor, fresh: bool) -> None:
        """Adds their part of the gradient of x, or writes it where nothing is yet."""
        if kept.p and not fresh:
            gx_KTD.add_(self.dropout(torch.bmm(gh_KTR, kept.A_KRD), kept.p))
            return
        gx_KTD.baddbmm_(gh_KTR, kept.A_KRD, beta=0 if fresh else 1)
        if kept.p:
            gx_KTD.copy_(self.dropout(gx_KTD, kept.p))

    # --- who asks

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Of all siblings."""
        if not self.switch.enabled:
            return [layer.base(x) for layer in self.layers]
        # A parameter among the arguments: the output has a gradient even where x has none.
        return list(_Adapt.apply(x, self.layers[0].A_KRD, self))  # type: ignore[arg-type]

    def output(self, layer: BankLinear, x: Tensor) -> Tensor:
        """Of one sibling; those of the others are kept until they are called."""
        if layer not in self._ready or x is not self._input or x._version != self._version:
            self._input, self._version = x, x._version
            self._ready = dict(zip(self.layers, self.outputs(x), strict=True))
        y = self._ready.pop(layer)
        if not self._ready:
            self.forget()
        return y

    def dropout(self, x_KTD: Tensor, p: float) -> Tensor:
        """Siblings share one mask, as the parts of a fused qkv layer do."""
        return self.switch.drop(x_KTD.detach(), self.switch.keys.of(self.layers[0].index), p) if p else x_KTD

    def forget(self) -> None:
        """Lets go of outputs that nobody has asked for, and of what a backward wants that never came."""
        self._input: Tensor | None = None
        self._version = 0
        self._ready: dict[BankLinear, Tensor] = {}
        self.kept: list[Kept] = []


def fix_width(x: Tensor) -> None:
    """Code compiled for this tensor may take the last of its sizes for a constant."""
    if x.dim() > 2:
        torch._dynamo.mark_static(x, x.dim() - 1)


class _Adapt(torch.autograd.Function):
    """`Siblings.there` and `Siblings.back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A_KRD: Tensor, siblings: Siblings) -> tuple[Tensor, ...]:
        ys, kept = siblings.there(x)
        ctx.save_for_backward(x, kept.h_KTR, kept.A_KRD, *kept.sBs)  # to be watched for changes in place
        ctx.siblings, ctx.kept = siblings, kept
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *_ = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # autograd's own are let go of likewise
        return ctx.siblings.back(x, kept, gs, through=ctx.needs_input_grad[0]), None, None


def parts(h_KTR: Tensor, sBs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each sibling's share of [K, T, ΣR], as views."""
    return h_KTR.split([sB.shape[2] for sB in sBs], dim=2) if len(sBs) > 1 else (h_KTR,)


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """(D_in, D_out) of a layer the bank can adapt."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    if isinstance(base, Conv1D):  # GPT-2: its weight is [D_in, D_out]
        return base.nx, base.nf
    raise TypeError(f"not an adaptable layer: {type(base).__name__}")
