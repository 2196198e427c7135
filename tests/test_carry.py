"""Adam's moments through a cut: they turn as the gradients do."""

import pytest
import torch

from examples import examples
from models import tiny
from rankrace.bank import Bank, carried
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.model import PackedModel


def test_the_mean_turns_with_the_gradient() -> None:
    """A cut is ΔW, or the most of it, in another basis, so its gradients are the old ones, turned; nothing is learnt
    where it has no rank."""
    bank = Bank(tiny("llama").double())
    bank.start((4, 8), (2.0, 3.0))
    for layer in bank.layers.values():
        layer.B_KDR.data[1, :, :8].normal_()
    before = bank.candidates.with_tensors({n: t.clone() for n, t in bank.candidates.tensors().items()})
    whole = before.spectra(1)
    after = before.truncations(1, (8, 3), (5.0, 2.0), whole)
    generator = torch.Generator().manual_seed(0)
    for name, (A, B) in before.factors.items():
        G = torch.randn(B.shape[1], A.shape[2], generator=generator, dtype=torch.float64)  # ∂L/∂ΔW
        mean = {n: torch.zeros_like(t) for n, t in before.tensors().items()}
        mean[f"{name}.A"][1] = 3.0 * B[1].T @ G
        mean[f"{name}.B"][1] = 3.0 * G @ A[1].T
        turned, square = carried(before, 1, whole, after, mean, {n: t.square() for n, t in mean.items()})
        new_A, new_B = after.factors[name]
        for k, new_s in enumerate((5.0, 2.0)):
            torch.testing.assert_close(turned[f"{name}.A"][k], new_s * new_B[k].T @ G, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(turned[f"{name}.B"][k], new_s * G @ new_A[k].T, rtol=1e-9, atol=1e-9)
        assert turned[f"{name}.A"][1, :3].any()
        assert not turned[f"{name}.A"][1, 3:].any()
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


@pytest.mark.parametrize("rank", [8, 3])
def test_a_cut_goes_on_with_the_moments_and_their_count(rank: int) -> None:
    """What the trainer's optimiser then holds are these moments, neither zeros nor a fresh count."""
    recipe = Recipe(epochs=9, max_steps=12, batch_size=4, micro_tokens=99, schedule="constant", warmup=0.0,
                    weight_decay=0.0, clip=1.0, seed=0)  # fmt: skip
    model = tiny("llama").double()
    bank = Bank(model)
    trainer = Trainer(PackedModel(model, bank, "causal"), examples(16), recipe)
    bank.start((8,), (2.0,))
    trainer.start(bank.candidates, [1e-2])
    for _ in trainer.run(5):
        pass
    before, optimizer = bank.candidates, trainer.optimizer
    whole = before.spectra(0)
    cuts = before.truncations(0, (rank,), (5.0,), whole)
    mean, square = carried(before, 0, whole, cuts, optimizer.mean.views, optimizer.square.views)
    trainer.cut(0, cuts, whole, [1e-2])
    assert trainer.optimizer is not optimizer
    assert trainer.optimizer.updates == optimizer.updates
    for found, wanted in ((trainer.optimizer.mean, mean), (trainer.optimizer.square, square)):
        assert any(t.any() for t in wanted.values())
        for name, t in wanted.items():
            torch.testing.assert_close(found.views[name], t, rtol=0, atol=0)
    (losses,) = [loss_K.item() for loss_K in trainer.run(6)]
    assert losses > 0
