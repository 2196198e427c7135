"""Adam's moments through a cut: they turn as the gradients do."""

import torch

from models import tiny
from rankrace.bank import Bank, carried


def test_the_mean_turns_with_the_gradient() -> None:
    """A cut to the whole rank is the same ΔW in another basis, so its gradients are the old ones, turned."""
    bank = Bank(tiny("llama").double())
    bank.start((4, 8), (2.0, 3.0))
    for layer in bank.layers.values():
        layer.B_KDR.data[1, :, :8].normal_()
    before = bank.candidates.with_tensors({n: t.clone() for n, t in bank.candidates.tensors().items()})
    whole = before.spectra(1)
    after = before.truncations(1, (8,), (5.0,), whole)
    generator = torch.Generator().manual_seed(0)
    for name, (A, B) in before.factors.items():
        G = torch.randn(B.shape[1], A.shape[2], generator=generator, dtype=torch.float64)  # ∂L/∂ΔW
        mean = {n: torch.zeros_like(t) for n, t in before.tensors().items()}
        mean[f"{name}.A"][1] = 3.0 * B[1].T @ G
        mean[f"{name}.B"][1] = 3.0 * G @ A[1].T
        turned, square = carried(before, 1, whole, after, mean, {n: t.square() for n, t in mean.items()})
        new_A, new_B = after.factors[name]
        torch.testing.assert_close(turned[f"{name}.A"][0], 5.0 * new_B[0].T @ G, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(turned[f"{name}.B"][0], 5.0 * G @ new_A[0].T, rtol=1e-9, atol=1e-9)
        assert all((t >= 0).all() for t in square.values())


def test_a_direction_without_weight_carries_nothing() -> None:
    bank = Bank(tiny("llama").double())
    bank.start((4,), (2.0,))  # B = 0: every singular value is 0
    before = bank.candidates
    whole = before.spectra(0)
    after = before.truncations(0, (2,), (2.0,), whole)
    ones = {n: torch.ones_like(t) for n, t in before.tensors().items()}
    for moments in carried(before, 0, whole, after, ones, ones):
        assert all(t.isfinite().all() for t in moments.values())
