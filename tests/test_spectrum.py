"""Truncation against the plain SVD of the formed update."""

import sys

import pytest
import torch
from torch import Tensor

from models import tiny
from rankrace.bank import Bank, Candidates, spectrum
from rankrace.bank.threads import in_threads
from rankrace.errors import RankraceError

D_OUT, D_IN, R = 40, 24, 12


def factors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(R, D_IN, dtype=torch.float64), torch.randn(D_OUT, R, dtype=torch.float64)


@pytest.mark.parametrize("multiplier", [1.0, 32 / 12, 0.125])
def test_full_rank_reproduces_the_update(multiplier: float) -> None:
    A, B = factors()
    A_r, B_r = spectrum(A, B, multiplier).truncated(R, 0.7)
    torch.testing.assert_close(0.7 * B_r @ A_r, multiplier * B @ A, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_error_is_the_tail_of_the_singular_values(rank: int) -> None:
    """Eckart-Young: no rank-r matrix is nearer."""
    A, B = factors()
    update = 2.0 * B @ A
    S = torch.linalg.svdvals(update)
    A_r, B_r = spectrum(A, B, 2.0).truncated(rank, 3.0)
    assert A_r.shape == (rank, D_IN)
    assert B_r.shape == (D_OUT, rank)
    error = torch.linalg.norm(update - 3.0 * B_r @ A_r)
    torch.testing.assert_close(error, S[rank:].norm())
    torch.testing.assert_close(A_r.norm(dim=1), B_r.norm(dim=0))  # √S on both sides


def test_zero_padding_and_a_zero_update_are_no_trouble() -> None:
    A, B = factors()
    A[8:], B[:, 8:] = 0, 0
    A_r, B_r = spectrum(A, B, 1.0).truncated(8, 1.0)
    torch.testing.assert_close(B_r @ A_r, B @ A, rtol=0, atol=1e-12)
    A_r, B_r = spectrum(A, torch.zeros_like(B), 1.0).truncated(4, 1.0)
    assert (B_r @ A_r).abs().max() == 0


def test_the_update_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a truncation on wide layers is a factor, not a D_out × D_in matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    Largest.size = max(Largest.size, t.numel())
            return out

    A, B = torch.randn(8, 3000), torch.randn(2000, 8)
    with Largest():
        spectrum(A, B, 1.0).truncated(4, 1.0)
    assert Largest.size <= 3000 * 8


def test_truncations_of_a_candidate_in_the_bank() -> None:
    bank = Bank(tiny("llama"))
    bank.start((8, 12), (4.0, 2.0))
    for layer in bank.layers.values():
        layer.B_KDR.data[1, :, :12].normal_()
    cut = bank.candidates.truncations(1, (2, 12), (5.0, 3.0))
    assert cut.ranks == (2, 12)
    for name, (A, B) in bank.candidates.factors.items():
        update = 2.0 * B[1] @ A[1]
        a, b = cut.factors[name]
        torch.testing.assert_close(3.0 * b[1] @ a[1], update, rtol=0, atol=1e-10)
        S = torch.linalg.svdvals(update)
        torch.testing.assert_close(torch.linalg.norm(update - 5.0 * b[0] @ a[0]), S[2:].norm())
        assert not a[0, 2:].any()


def test_layers_together_are_layers_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fit together, in whatever order their shapes come."""

    def cut_and_lent() -> tuple[Candidates, Tensor]:
        cut = bank.candidates.truncations(0, (2, 12), (5.0, 3.0), allocations=(None, allocation))
        with bank.borrowed(cut):
            assert bank._lent is not None
            return cut, bank._lent.compute.all_KP

    bank = Bank(tiny("llama"))
    bank.start((12,), (4.0,))
    for i, layer in enumerate(bank.layers.values()):
        torch.manual_seed(i)
        layer.B_KDR.data.normal_()
    allocation = {name: i % 3 for i, name in enumerate(bank.layers)}
    together, lent = cut_and_lent()
    monkeypatch.setattr(sys.modules["rankrace.bank.spectrum"], "BATCH_BYTES", 1)  # the package calls a function so
    monkeypatch.setattr("rankrace.bank.loaded.PIECE", 1)
    alone, lent_alone = cut_and_lent()
    assert list(together.factors) == list(alone.factors) == list(bank.layers)
    assert together.layer_ranks == alone.layer_ranks
    for name, pair in together.factors.items():
        for a, b in zip(pair, alone.factors[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(lent, lent_alone, rtol=0, atol=1e-12)
    (A_KRD, _), *_, (_, B_KDR) = together.factors.values()
    for k, s in enumerate((5.0, 3.0)):
        assert torch.equal(lent[k, : A_KRD[k].numel()], A_KRD[k].flatten())
        assert torch.equal(lent[k, -B_KDR[k].numel() :], (s * B_KDR[k]).flatten())


def test_rank_that_is_not_there_is_told_from_rank_that_is_small() -> None:
    """A has rank 9 and B 7 of 12 without a row of zeros; then singular values down to 1e-6 of the largest."""
    A, B = factors()
    A[9:] = A[:3] + A[3:6]
    B[:, :5] = B[:, 5:10] - B[:, 7:12]
    found = spectrum(A, B, 2.0)
    S = torch.linalg.svdvals(2.0 * B @ A)
    rank = int((S / S[0] > 1e-10).sum())
    assert 0 < rank < R
    assert int((found.S_R > 0).sum()) == rank
    torch.testing.assert_close(found.S_R, S[:R], rtol=0, atol=1e-7)
    A_r, B_r = found.truncated(R, 1.0)
    torch.testing.assert_close(B_r @ A_r, 2.0 * B @ A, rtol=0, atol=1e-6)

    graded = torch.logspace(0, -6, R, dtype=torch.float64)
    Q_A, Q_B = (torch.linalg.qr(x)[0] for x in (factors(1)[0].T, factors(1)[1]))
    found = spectrum(graded.sqrt()[:, None] * Q_A.T, Q_B * graded.sqrt(), 1.0)
    torch.testing.assert_close(found.S_R, graded, rtol=1e-4, atol=0)


def test_an_update_that_is_not_finite_is_refused() -> None:
    A, B = factors()
    B[3, 2] = torch.nan
    with pytest.raises(RankraceError, match="not finite"):
        spectrum(A, B, 1.0)


def test_each_piece_takes_one_thread_and_the_number_is_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert in_threads(lambda n: (n, torch.get_num_threads()), range(5)) == [(n, 1) for n in range(5)]
        with pytest.raises(ZeroDivisionError):
            in_threads(lambda n: 1 // n, range(2))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
