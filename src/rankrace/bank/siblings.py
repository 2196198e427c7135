"""Which layers read the same tensor: q, k and v, gate and up, or whatever they are called in a model."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rankrace.bank.inputs import reading


def find_siblings(
    layers: Mapping[str, nn.Module], run: Callable[[], Any]
) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    """The layers, in their order, with neighbours joined that `run` calls with the very same tensors.

    Returns:
        The groups, and each layer's place in the order of the calls, which need not be that of the definitions.
    """
    read: dict[str, list[Tensor]] = {name: [] for name in layers}
    called: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        read[name].append(x)
        called.setdefault(name, len(called))

    with reading(layers, note):
        run()
    found: list[tuple[str, ...]] = []
    for name in layers:
        if found and same(read[found[-1][0]], read[name]):
            found[-1] += (name,)
        else:
            found.append((name,))
    return found, {name: called.get(name, len(called)) for name in layers}


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """The very same tensors, at least one."""
    return 0 < len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
