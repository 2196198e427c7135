"""Which layers read the same tensor: q, k and v, gate and up, or whatever they are called in a model."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rankrace.bank.inputs import reading


def find_siblings(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[tuple[str, ...]]:
    """The layers, in their order, with neighbours joined that `run` calls with the very same tensors."""
    read: dict[str, list[Tensor]] = {name: [] for name in layers}

    with reading(layers, lambda name, x: read[name].append(x)):
        run()
    found: list[tuple[str, ...]] = []
    for name in layers:
        if found and same(read[found[-1][0]], read[name]):
            found[-1] += (name,)
        else:
            found.append((name,))
    return found


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """The very same tensors, at least one."""
    return 0 < len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
