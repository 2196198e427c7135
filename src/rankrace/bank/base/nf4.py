"""Weights in 4 bits (NF4; Dettmers et al. 2023), as bitsandbytes keeps them: 4.13 bits a weight.

A weight is made whole for each product, one layer at a time, and let go again. Nothing else is kept for the backward.
"""

import sys
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from rankrace.bank.base.plain import PlainProduct
from rankrace.errors import RankraceError

BLOCK = 64
"""Weights that share a scale."""


class Nf4Product(PlainProduct):
    """Args:
    base: a bitsandbytes Linear4bit, whoever made it.
    """

    def __init__(self, base: Any) -> None:
        if base.weight.quant_state is None or vars(base.weight.quant_state).get("packing_format_for_cpu"):
            raise RankraceError(
                "a Linear4bit layer is not in the layout that training reads",
                why="bitsandbytes packs weights when a layer moves to its device, and on some CPUs packs them anew "
                "when the layer is first used, for inference only",
                fix="give the model as it was loaded, before it was run",
            )
        check_width(base, base.weight.device)
        base.support_avx512bf16_for_cpu = False  # packed anew there is no gradient
        super().__init__(base, lambda: whole(base))


def whole(base: Any) -> Tensor:
    """W [O, D] of a Linear4bit layer, in the type that it was loaded in."""
    return package().functional.dequantize_4bit(base.weight.data, base.weight.quant_state)


def is_4bit(module: object) -> TypeGuard[nn.Linear]:
    """Where nobody has imported bitsandbytes, no layer is its."""
    loaded = sys.modules.get("bitsandbytes")
    return loaded is not None and isinstance(module, loaded.nn.Linear4bit)


def quantized(linear: nn.Linear, device: torch.device) -> nn.Module:
    """The layer in 4 bits on the device, scales in 8 (double quantisation).

    Raises:
        RankraceError: a width at which bitsandbytes is wrong there.
    """
    check_width(linear, device)
    W_OD, nn_4bit = linear.weight, package().nn
    layer = nn_4bit.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=W_OD.dtype, quant_type="nf4", device="meta"
    )
    packed = nn_4bit.Params4bit(
        W_OD.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.weight = packed.to(device)
    layer.bias = linear.bias
    layer.support_avx512bf16_for_cpu = False  # see Nf4Product
    return layer.train(linear.training)


def check_width(linear: nn.Linear, device: torch.device) -> None:
    """bitsandbytes 0.50 takes wrong scales there, in silence (docs/log.md)."""
    if device.type == "cpu" and linear.in_features % BLOCK:
        raise RankraceError(
            f"a layer with {linear.in_features} inputs cannot be kept in NF4 on a CPU",
            why=f"bitsandbytes unpacks rows wrongly there unless {BLOCK} divides their length",
            fix="use a GPU, or leave out --quantize",
        )


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises RankraceError: no package, or it cannot work there."""
    if dtype == torch.float64:
        raise RankraceError(
            "NF4 weights cannot be had in float64",
            why="bitsandbytes unpacks them to 16 or 32 bits",
            fix="use --dtype bfloat16 or float32, or leave out --quantize",
        )
    try:
        package().functional.quantize_4bit(torch.ones(64, dtype=dtype, device=device), quant_type="nf4")
    except RuntimeError as error:  # no kernels for this device, or none that load
        raise RankraceError(
            f"bitsandbytes cannot pack weights on {device}: {str(error).strip().splitlines()[0]}",
            why="NF4 is packed and unpacked by its kernels",
            fix="install a build of bitsandbytes for this device (`python -m bitsandbytes` tells what it found), "
            "or leave out --quantize",
        ) from error


def package() -> Any:
    """bitsandbytes, imported at its first use: it takes a second.

    Raises:
        RankraceError: it is not installed.
    """
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError as error:
        raise RankraceError(
            f"NF4 needs the package bitsandbytes: {error}",
            why="its kernels pack weights into 4 bits and unpack them",
            fix='pip install "rankrace[quant]", or bitsandbytes alone',
        ) from error
    return bitsandbytes
