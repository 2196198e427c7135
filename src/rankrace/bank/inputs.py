"""What layers read: who sees the tensors that come in, and how large they are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def reading(layers: Mapping[str, nn.Module], read: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Meanwhile `read` is called with a layer's name and input before the layer runs."""

    def reader(name: str) -> Callable[..., None]:
        return lambda module, args: read(name, args[0])

    hooks = [layer.register_forward_pre_hook(reader(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def input_sizes(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, float]:
    """E[x_i²] of each layer's input x [tokens, D_in], over all tokens and entries that `run` calls it with (in the last
    block those alone whose output is read, where that is known).

    An update ΔW with singular values S_i changes the layer's output by E‖ΔW x‖² = E[x_i²]·Σ S_i², if inputs have no
    preferred direction: so much is a singular value worth in one layer beside those of another (`allocate`). 0 for a
    layer that is not called, as an expert may be that no token was sent to.
    """
    total: dict[str, Tensor | float] = dict.fromkeys(layers, 0.0)
    count = dict.fromkeys(layers, 0)

    def read(name: str, x: Tensor) -> None:
        # Squares of bfloat16 are summed in full precision, without a copy of x in it.
        norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
        total[name] += norm.double() ** 2
        count[name] += x.numel()

    with reading(layers, read):
        run()
    return {name: float(total[name]) / max(1, count[name]) for name in layers}
