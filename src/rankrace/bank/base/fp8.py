"""Products in 8 bits: both factors in e4m3 (4 exponent bits, 3 of mantissa), with a scale for every row.

    y = s_x·(x̂ Ŵᵀ)·s_W + b,    x ≈ s_x·x̂,  W ≈ s_W·Ŵ,    s = max |row| / 448

The way back goes through the very same Ŵ: gx = (g·s_W) Ŵ, where g·s_W is rounded, row by row again. e4m3 serves for
gradients too: a row's own scale gives them range enough, and e5m2 has a bit of mantissa less. A row is a token of one
candidate, so that none of the candidates can spoil another's scale.

The chip reads 8-bit factors along the summed dimension only, so Ŵ lies there twice, once transposed: two bytes a
weight, as bfloat16 has. FP8 is for time, not for memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankrace.bank.base.product import InputGradient, Rounding, Rounds, per_candidate
from rankrace.errors import RankraceError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
TINY = 1e-30
"""A scale at least: that of a row of zeros."""
STEP = 16
"""Widths have to be multiples of this."""
OLDEST = (8, 9)
"""Compute capability of the first chips with 8-bit products and a scale for each row."""


def rounded(x_TD: Tensor, column_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 [T, D] and their scales [T, 1] in float32.

    Args:
        column_D: factors of the columns that come first.
    """
    x_TD = x_TD if column_D is None else x_TD * column_D
    largest_T1 = torch.linalg.vector_norm(x_TD, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale_T1 = (largest_T1 / LARGEST).clamp(min=TINY)
    return (x_TD / scale_T1).to(E4M3, memory_format=torch.contiguous_format), scale_T1


class Fp8Linear(nn.Linear):
    """A frozen layer. Its weight is Ŵ; not meant to be saved."""

    transposed_DO: Tensor
    scale_O: Tensor
    ones_D: Tensor

    def __init__(self, W_OD: Tensor, bias: Tensor | None) -> None:
        D_out, D_in = W_OD.shape
        super().__init__(D_in, D_out, bias=False, device="meta")
        W_hat_OD, scale_O1 = rounded(W_OD)
        self.weight = nn.Parameter(W_hat_OD, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]  # a parameter, or None
        for name, tensor in {
            "transposed_DO": W_hat_OD.T.contiguous(),
            "scale_O": scale_O1.flatten(),
            "ones_D": torch.ones(D_in, device=W_OD.device),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def product(self, x_hat_TD: Tensor, scale_T1: Tensor, y_TO: Tensor) -> None:
        """Writes x Wᵀ + b to y."""
        _multiply(x_hat_TD, self.weight.T, scale_T1, self.scale_O[None], y_TO, self.bias)

    def input_gradient(self, g: Tensor, gx_TD: Tensor, rounding: Rounding) -> None:
        """Writes g W to gx."""
        g_hat_TO, scale_T1 = rounding(g.reshape(-1, self.out_features), self.scale_O)
        _multiply(g_hat_TO, self.transposed_DO.T, scale_T1, self.ones_D[None], gx_TD, None)

    def forward(self, input: Tensor) -> Tensor:
        """Without an adapter."""
        return _alone(input, self)  # pyright: ignore[reportCallIssue]  # by its decorator


def _multiply(
    a_TD: Tensor, b_DO: Tensor, scale_T1: Tensor, scale_1O: Tensor, out_TO: Tensor, bias: Tensor | None
) -> None:
    # Fast accumulation: less than the rounding of the factors costs, and without it rows' scales are slow.
    torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a_TD, b_DO, scale_a=scale_T1, scale_b=scale_1O, bias=bias, out_dtype=out_TO.dtype, use_fast_accum=True,
        out=out_TO,
    )  # fmt: skip


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Fp8Linear) -> Tensor:
        ctx.layer = layer
        y = x.new_empty(*x.shape[:-1], layer.out_features)
        layer.product(*rounded(x.reshape(-1, layer.in_features)), y.view(-1, layer.out_features))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gx = g.new_empty(*g.shape[:-1], ctx.layer.in_features)
        ctx.layer.input_gradient(g, gx.view(-1, gx.shape[-1]), rounded)
        return gx, None


@torch.compiler.disable
def _alone(x: Tensor, layer: Fp8Linear) -> Tensor:
    return _Alone.apply(x, layer)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Read:
    """An input, and its rows in 8 bits."""

    x: Tensor
    hat_TD: Tensor
    scale_T1: Tensor


class Fp8Product:
    """The 8-bit product cannot add itself to anything."""

    comes_first = True

    def __init__(self, base: Fp8Linear, switch: Rounds) -> None:
        self.base, self.switch = base, switch

    def read(self, x: Tensor) -> Read:
        hat_TD, scale_T1 = self.switch.rounded(x.detach().reshape(-1, x.shape[-1]), None)
        return Read(x=x, hat_TD=hat_TD, scale_T1=scale_T1)

    def output(self, read: Read, h_KTR: Tensor, sB_KDR: Tensor) -> tuple[InputGradient, Tensor]:
        y = read.x.new_empty(*read.x.shape[:-1], self.base.out_features)
        self.base.product(read.hat_TD, read.scale_T1, y.view(-1, y.shape[-1]))
        per_candidate(y, len(h_KTR)).baddbmm_(h_KTR, sB_KDR.mT)
        return self.add_input_gradient, y

    def add_input_gradient(self, g: Tensor, gx: Tensor, fresh: bool) -> None:
        own = gx if fresh else torch.empty_like(gx)
        self.base.input_gradient(g, own.view(-1, own.shape[-1]), self.switch.rounded)
        if not fresh:
            gx.add_(own)


def quantized(linear: nn.Linear, device: torch.device) -> Fp8Linear:
    """The layer in 8 bits on the device.

    Raises:
        RankraceError: a width that the products do not take.
    """
    if linear.in_features % STEP or linear.out_features % STEP:
        raise RankraceError(
            f"a layer of {linear.in_features} × {linear.out_features} has no 8-bit product",
            why=f"the chip wants widths that are multiples of {STEP}",
            fix="use --quantize nf4 or none for this model",
        )
    bias = None if linear.bias is None else nn.Parameter(linear.bias.to(device), requires_grad=False)
    return Fp8Linear(linear.weight.detach().to(device), bias).train(linear.training)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises RankraceError: no 8-bit products there, or not with such results."""
    if device.type not in ("cpu", "cuda"):
        raise RankraceError(
            f"there are no 8-bit products on {device.type}",
            why="torch has them for CUDA, and on the CPU",
            fix="leave out --quantize",
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        raise RankraceError(
            f"{torch.cuda.get_device_name(device)} has no 8-bit products",
            why="they came with compute capability 8.9 (Ada, Hopper)",
            fix="use --quantize nf4 where memory is short, or leave it out",
        )
    wanted = (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32)
    if dtype not in wanted:
        raise RankraceError(
            f"8-bit products on {device.type} do not come out in {str(dtype).removeprefix('torch.')}",
            why="torch's kernels with a scale for each row give other types",
            fix="use --dtype bfloat16, or leave out --quantize",
        )
    if device.type == "cpu":
        _try(device, dtype)


def _try(device: torch.device, dtype: torch.dtype) -> None:
    one = torch.ones(STEP, STEP, dtype=dtype, device=device)
    try:
        Fp8Linear(one, None)(one)
    except RuntimeError as error:
        raise RankraceError(
            f"torch {torch.__version__} has no 8-bit products with a scale for each row on {device.type}",
            why=f"it says: {str(error).splitlines()[0][:200]}",
            fix="use torch 2.13 or later, or leave out --quantize",
        ) from error
