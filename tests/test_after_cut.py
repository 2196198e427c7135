"""The study of what follows a cut: each of its arms against the same training made by the trainer itself."""

import pytest
import torch

from benchmarks import after_cut
from benchmarks.after_cut import Arm, again, parts, side_by_side
from benchmarks.study import ALPHA
from examples import examples
from models import tiny
from rankrace.bank import Bank
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.model import PackedModel

WIDE, LR = 8, 0.02
FIRST, LATER, END = 4, 7, 9
RECIPE = Recipe(
    epochs=2, max_steps=None, batch_size=4, micro_tokens=4096, schedule="linear", warmup=0.1, weight_decay=0.1,
    clip=1.0, seed=0,
)  # fmt: skip


def begun() -> Trainer[Bank]:
    bank = Bank(tiny("llama"))
    trainer = Trainer(PackedModel(bank.model, bank, "causal"), examples(24), RECIPE)
    bank.start([WIDE], [ALPHA / WIDE])
    trainer.start(bank.candidates, [LR])
    run(trainer, FIRST)
    return trainer


def run(trainer: Trainer[Bank], until: int) -> None:
    for _ in trainer.run(until):
        pass


def cut(trainer: Trainer[Bank], rank: int) -> None:
    """As a search does it."""
    bank = trainer.bank
    whole = bank.candidates.spectra(0)
    trainer.cut(0, bank.candidates.truncations(0, [rank], [ALPHA / rank], whole), whole, [LR])


def updates(trainer: Trainer[Bank], k: int) -> list[torch.Tensor]:
    """ΔW of every layer."""
    c = trainer.bank.candidates
    return [c.multipliers[k] * (B[k] @ A[k]) for A, B in c.factors.values()]


def test_arms_train_as_if_each_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(after_cut, "WIDE", WIDE)
    arms = [
        Arm(name="kept", rank=WIDE),
        Arm(name="cut-2", rank=2),
        Arm(name="late-3", rank=WIDE, later=3),
        Arm(name="stages-2", rank=5, later=2),
    ]
    trainer = begun()
    side_by_side(trainer, parts(trainer, 0, [None if a.whole else a for a in arms]), [LR] * len(arms))
    run(trainer, LATER)
    again(trainer, arms)
    run(trainer, END)
    for k, (first, later) in enumerate([(None, None), (2, None), (None, 3), (5, 2)]):
        alone = begun()
        if first:
            cut(alone, first)
        run(alone, LATER)
        if later:
            cut(alone, later)
        run(alone, END)
        for mine, expected in zip(updates(trainer, k), updates(alone, 0), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)


def test_an_arm_may_forget() -> None:
    trainer = begun()
    (part,) = parts(trainer, 0, [Arm(name="forgot-2", rank=2, forgets=True)])
    assert not any(t.any() for each in (part.mean, part.square) for t in each.values())
