"""Dropout that is drawn where it is used, from counters: no random state, and nothing to keep for the backward.

Whether an element stays is a hash of its place and of a key for (seed, layer, step, micro-batch), in 32-bit integer
arithmetic: the same bits on every device, compiled or not, and for every candidate. The keys live on the device, so
that a CUDA graph draws new masks at each replay.

Shapes: K candidates, T tokens of a packed row, D width, L layers.
"""

import torch
from torch import Tensor

BITS = 24
"""Of the hash decide: p is rounded to a multiple of 2⁻²⁴."""


class DropoutKeys:
    """A key of 63 bits for every layer, renewed for each pass."""

    def __init__(self, seed: int, layers: int, device: torch.device) -> None:
        self._fixed_L = torch.tensor([counter_seed(seed, layer) for layer in range(layers)], device=device)
        self._now_L = self._fixed_L.clone()

    def renew(self, step: int, micro: int) -> None:
        """The keys of this step and micro-batch, in the same memory."""
        torch.bitwise_xor(self._fixed_L, counter_seed(step, micro), out=self._now_L)

    def of(self, layer: int) -> Tensor:
        """As a tensor of its own: a compiled function is compiled anew for views at other places."""
        return self._now_L[layer].clone()


def dropped(x_KTD: Tensor, key: Tensor, p: float) -> Tensor:
    """x·m/(1-p), where m is 0 with probability p and else 1; each candidate has the same m [T, D].

    It is its own derivative: the gradient of x is that of the result, dropped with the same key.
    """
    _, T, D = x_KTD.shape
    place_TD = torch.arange(T * D, dtype=torch.int32, device=x_KTD.device).view(T, D)
    keep_TD = mixed(place_TD, key) & ((1 << BITS) - 1) >= round(p * (1 << BITS))
    return torch.where(keep_TD, x_KTD / (1 - p), 0.0)


def mixed(n: Tensor, key: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every bit of input and key reaches every bit of the result.

    The rounds of lowbias32 (C. Wellons, "Prospecting for hash functions", 2018) with the key's halves before the
    first and the second one: with a single half, masks of two keys would be shuffled copies of each other.
    """
    n = n ^ key.to(torch.int32)
    n = (n ^ (n >> 16 & 0xFFFF)) * 0x7FEB352D ^ (key >> 32).to(torch.int32)
    n = (n ^ (n >> 15 & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return n ^ (n >> 16 & 0xFFFF)


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
