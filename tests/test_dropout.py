"""Dropout from counters: the hash against plain integers, the masks against a fair coin."""

import math

import pytest
import torch

from rankrace.bank.dropout import DropoutKeys, counter_seed, dropped, mixed


def plain(n: int, key: int) -> int:
    """`mixed` on Python's integers, as unsigned 32-bit ones."""
    n ^= key & 0xFFFFFFFF
    n = (n ^ n >> 16) * 0x7FEB352D & 0xFFFFFFFF
    n ^= key >> 32
    n = (n ^ n >> 15) * 0x846CA68B & 0xFFFFFFFF
    return n ^ n >> 16


def test_the_hash_is_that_of_plain_integers() -> None:
    places = torch.arange(-500, 500, dtype=torch.int32) * 4_000_037
    for key in (0, 1, 0xFFFFFFFF, 1 << 62, counter_seed(3, 4)):
        ours = mixed(places, torch.tensor(key))
        assert ours.dtype == torch.int32
        assert [int(h) & 0xFFFFFFFF for h in ours] == [plain(int(n) & 0xFFFFFFFF, key) for n in places]


def test_without_a_key_the_hash_is_lowbias32() -> None:
    """Its published inverse gives the places back."""
    places = torch.arange(1000, dtype=torch.int32)
    for n, h in zip(places.tolist(), mixed(places, torch.tensor(0)).tolist(), strict=True):
        x = h & 0xFFFFFFFF
        x = (x ^ x >> 16) * 0x43021123 & 0xFFFFFFFF
        x = (x ^ x >> 15 ^ x >> 30) * 0x1D69E2A5 & 0xFFFFFFFF
        assert x ^ x >> 16 == n


def kept(step: int, micro: int, layer: int, p: float, seed: int = 0) -> torch.Tensor:
    keys = DropoutKeys(seed, 8, torch.device("cpu"))
    keys.renew(step, micro)
    return dropped(torch.ones(1, 200, 500), keys.of(layer), p)[0] != 0


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_a_mask_is_a_fair_coin(p: float) -> None:
    """Count, rows, columns and neighbours within 5 standard deviations."""
    keep = kept(0, 0, 0, p).double()
    T, D = keep.shape

    def within(mean: float, expected: float, variance: float, count: int) -> bool:
        return abs(mean - expected) < 5 * math.sqrt(variance / count)

    spread = p * (1 - p)
    assert within(keep.mean().item(), 1 - p, spread, T * D)
    assert all(within(m, 1 - p, spread, D) for m in keep.mean(1).tolist())
    assert all(within(m, 1 - p, spread, T) for m in keep.mean(0).tolist())
    centred = keep - (1 - p)
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert within((a * b).mean().item(), 0, spread**2, a.numel())


def test_masks_of_other_passes_layers_and_seeds_are_others() -> None:
    """Not correlated with the first, nor shifted copies of it."""
    first = kept(0, 0, 0, 0.5).double() * 2 - 1
    for other in (kept(1, 0, 0, 0.5), kept(0, 1, 0, 0.5), kept(0, 0, 1, 0.5), kept(0, 0, 0, 0.5, seed=1)):
        other = other.double() * 2 - 1
        for shift in (0, 1, 7, 500):
            correlation = (first.flatten() * other.flatten().roll(shift)).mean().item()
            assert abs(correlation) < 5 / math.sqrt(first.numel())
    assert torch.equal(kept(0, 0, 0, 0.5), kept(0, 0, 0, 0.5))


def test_candidates_share_a_mask_and_what_stays_is_scaled() -> None:
    keys = DropoutKeys(0, 1, torch.device("cpu"))
    x_KTD = torch.randn(3, 5, 7, dtype=torch.float64)
    all_three = dropped(x_KTD, keys.of(0), 0.25)
    stays = all_three != 0
    assert 0 < stays.sum() < stays.numel()
    torch.testing.assert_close(all_three[stays], x_KTD[stays] / 0.75)
    for k in range(3):
        assert torch.equal(dropped(x_KTD[k : k + 1], keys.of(0), 0.25)[0], all_three[k])


def test_keys_are_renewed_in_place() -> None:
    """A CUDA graph that was captured with them reads the new ones."""
    keys = DropoutKeys(0, 2, torch.device("cpu"))
    address = keys._now_L.data_ptr()
    keys.renew(3, 1)
    before = keys.of(1)
    keys.renew(4, 1)
    assert keys._now_L.data_ptr() == address
    assert not torch.equal(keys.of(1), before)
    keys.renew(3, 1)
    assert torch.equal(keys.of(1), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, as it compiles
def test_compiled_masks_are_the_same_bits() -> None:
    x_KTD = torch.randn(2, 33, 40)
    compiled = torch.compile(dropped, dynamic=True)
    for key in (0, counter_seed(1, 2), (1 << 63) - 1):
        expected = dropped(x_KTD, torch.tensor(key), 0.3)
        ours = compiled(x_KTD, torch.tensor(key), 0.3)
        assert torch.equal(ours != 0, expected != 0)
        torch.testing.assert_close(ours, expected)
