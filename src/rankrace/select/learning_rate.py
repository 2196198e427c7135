"""A learning rate for each rank."""

from collections.abc import Mapping, Sequence
from typing import Literal

Scaling = Literal["lora", "rslora"]
REFERENCE_RANK = 16
"""The rank that --lr is meant for."""


def default_lr(width: int, scaling: Scaling = "lora") -> float:
    """5e-4·(2000/width)^0.78: LoRA's best peak rate by model width ("LoRA Without Regret", 2025), found with α/r.

    With another multiplier the reference rank takes (s(r₀)·r₀ / α)^-1/2 of it, by the same rule as `lr_for`.
    """
    return 5e-4 * (2000 / width) ** 0.78 * (multiplier(REFERENCE_RANK, 1.0, scaling) * REFERENCE_RANK) ** -0.5


def multiplier(rank: int, alpha: float, scaling: Scaling) -> float:
    """s of ΔW = s·B A: α/r, or α/√r for rsLoRA (Kalajdzievski 2023)."""
    return alpha / rank if scaling == "lora" else alpha / rank**0.5


def lr_for(rank: int, lr: float, alpha: float, scaling: Scaling, override: Mapping[int, float]) -> float:
    """lr(r) = lr·(s(r)·r / (s(r₀)·r₀))^-1/2, with r₀ = 16; the user's own value for a rank comes first.

    With α/r the product s(r)·r is α for every rank, and so is the learning rate.
    """
    if rank in override:
        return override[rank]
    size = multiplier(rank, alpha, scaling) * rank
    reference = multiplier(REFERENCE_RANK, alpha, scaling) * REFERENCE_RANK
    return lr * (size / reference) ** -0.5


def scale_at(rank: int, scale: float, tried_at: int) -> float:
    """What a smaller rank takes over of a rate multiplied at a larger one: max(1, scale·(rank / tried_at)^(1/6)).

    Small ranks stand less of a raised rate: in the sweeps of docs/selection.md rank 1 is best at half of what suits
    rank 64, which is 64^(1/6); and runs that took a raised rate over whole ended up to 0.17 nats behind. A lowered
    one is taken over whole.
    """
    return scale if scale <= 1 else max(1.0, scale * (rank / tried_at) ** (1 / 6))


def rates_tried(lr_scales: Sequence[float]) -> tuple[float, ...]:
    """The multiples that are compared first, by size; the rate as given, 1, is always among them."""
    return tuple(sorted({1.0, *lr_scales}))
