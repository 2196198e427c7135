"""The average of what is trained, against the sum that it stands for; and through checkpoints.

Shapes: K candidates, P trainable values, T steps.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples import examples
from models import tiny
from rankrace.bank import Bank
from rankrace.bank.flat import Flat
from rankrace.select.ending import Difference, Ending, end
from rankrace.select.grid import Grid
from rankrace.select.objective import Held, Objective, log2_penalty
from rankrace.select.opening import Opening
from rankrace.select.race import Race
from rankrace.select.search import Search, Setting
from rankrace.select.statistics import paired_difference
from rankrace.session import Session
from rankrace.training.average import LATENESS, Average
from rankrace.training.checkpoint import load_checkpoint, save_checkpoint
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.model import PackedModel

T = 40


def walk(average: Average, values: Flat, steps: int, seed: int = 0) -> list[Tensor]:
    """Values that wander; each is taken in."""
    generator, seen = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        values.all_KP.add_(torch.randn(values.all_KP.shape, generator=generator, dtype=values.all_KP.dtype))
        average.add()
        seen.append(values.all_KP.clone())
    return seen


def flat(K: int = 2, R: int = 8) -> Flat:
    return Flat({"A": (R, 3), "B": (5, R)}, K, dtype=torch.float64, device=torch.device("cpu"))


def weighted(seen: list[Tensor]) -> Tensor:
    """Step i weighs as i·(i+1)·…·(i+η−1), which is i^η but for lower powers."""
    assert LATENESS == 3
    weights = [i * (i + 1) * (i + 2) for i in range(1, len(seen) + 1)]
    return sum((w * x for w, x in zip(weights, seen, strict=True)), torch.zeros(())) / sum(weights)


def test_it_is_the_weighted_sum_at_every_step() -> None:
    values = flat()
    average, seen = Average(values), []
    for step in range(T):
        seen += walk(average, values, 1, seed=step)
        torch.testing.assert_close(average.mean.all_KP, weighted(seen), rtol=1e-12, atol=1e-12)
    assert torch.equal(Average(values).mean.all_KP, torch.zeros_like(values.all_KP))


def test_the_first_value_is_its_own_average_and_the_last_half_weighs_most() -> None:
    values = flat()
    average = Average(values)
    (first,) = walk(average, values, 1)
    assert torch.equal(average.mean.all_KP, first)
    weights = [i * (i + 1) * (i + 2) for i in range(1, 401)]
    assert sum(weights[200:]) / sum(weights) == pytest.approx(15 / 16, abs=0.01)


def test_who_stays_keeps_its_average_bit_for_bit() -> None:
    """In another order, with less padding, and on from there."""
    wide, narrow = flat(3, 16), flat(2, 8)
    for name in ("A", "B"):  # ranks up to 8: the rest is padding
        (wide.views[name][:, 8:] if name == "A" else wide.views[name][..., 8:]).zero_()
    average = Average(wide)
    generator = torch.Generator().manual_seed(0)

    def move(values: Flat, candidates: list[int]) -> None:
        drawn = torch.randn(3, 8, 3, generator=generator, dtype=torch.float64)
        values.views["A"][:, :8] += drawn[candidates]
        values.views["B"][..., :8] -= drawn.mT[candidates, :1].expand(-1, 5, -1)

    for _ in range(5):
        move(wide, [0, 1, 2])
        average.add()
    for name, view in narrow.views.items():
        kept = wide.views[name][[2, 0]]
        view.copy_(kept[:, :8] if name == "A" else kept[..., :8])
    fewer = average.keep(narrow, [2, 0])
    for _ in range(5):
        state = generator.get_state()
        move(wide, [0, 1, 2])
        generator.set_state(state)
        move(narrow, [2, 0])
        average.add()
        fewer.add()
    assert fewer.steps == average.steps == 10
    assert torch.equal(fewer.mean.views["A"], average.mean.views["A"][[2, 0], :8])
    assert torch.equal(fewer.mean.views["B"], average.mean.views["B"][[2, 0], :, :8])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_lost_in_one_candidate_changes_no_bit_of_the_others(bad: float) -> None:
    values, clean = flat(3), flat(3)
    average, plain = Average(values), Average(clean)
    walk(average, values, 5)
    walk(plain, clean, 5)
    values.all_KP[1, 4] = bad
    walk(average, values, 5, seed=1)
    walk(plain, clean, 5, seed=1)
    assert torch.equal(average.mean.all_KP[[0, 2]], plain.mean.all_KP[[0, 2]])
    assert not average.mean.all_KP[1, 4].isfinite()
    assert int((~average.mean.all_KP.isfinite()).sum()) == 1


# --- as what a run delivers


@pytest.mark.parametrize("ahead", [True, False])
def test_the_better_of_average_and_last_step_is_left_in_the_bank(ahead: bool, search: Search) -> None:
    search.follow = True
    list(search.run())
    trainer, held = search.trainer, search.held
    values, average = trainer.bank.values.all_KP, trainer.average
    assert average is not None
    assert 0 < average.steps < 20
    good, bad = clearly_apart(search)
    average.mean.all_KP.copy_(good if ahead else bad)
    values.copy_(good)
    (expected,) = search.direct()
    values.copy_(bad if ahead else good)
    found = end(trainer, search.examples, held.cluster_N, expected.loss_N + 0.5 * held.tokens_N)
    assert found.averaged == ahead
    assert found.gain is not None
    assert found.gain.se < abs(found.gain.nats) == (found.gain.nats if ahead else -found.gain.nats)
    assert torch.equal(values, good)
    assert found.rise is not None
    assert (found.rise.nats, found.rise.se) == (pytest.approx(-0.5), pytest.approx(0.0, abs=1e-9))


def clearly_apart(search: Search) -> tuple[Tensor, Tensor]:
    """The better and the worse of two states of the winner whose losses differ by more than their paired error."""
    held, values = search.held, search.trainer.bank.values.all_KP
    before = values.clone()
    (first,) = search.direct()
    for seed in range(100):
        other = before + torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
        values.copy_(other)
        (second,) = search.direct()
        nats, se = paired_difference(second.loss_N, first.loss_N, held.tokens_N, held.cluster_N)
        if abs(nats) > 1.5 * se:
            return (before, other) if nats > 0 else (other, before)
    raise AssertionError("no two states differ")


def test_within_the_error_the_last_step_stays(search: Search) -> None:
    search.follow = True
    list(search.run())
    assert search.trainer.average is not None
    last = search.trainer.bank.values.all_KP.clone()
    search.trainer.average.mean.all_KP.copy_(last)
    ending = end(search.trainer, search.examples, search.held.cluster_N)
    assert ending == Ending(averaged=False, gain=Difference(nats=0.0, se=0.0))
    assert torch.equal(search.trainer.bank.values.all_KP, last)


@pytest.mark.parametrize(("look_at", "kept"), [(19, True), (20, False)])
def test_a_choice_at_the_last_step_leaves_nothing_to_average(look_at: int, kept: bool, search: Search) -> None:
    grid = Grid(ranks=(2, 4), look_step=look_at, refine=False, objective=search.strategy.objective)  # type: ignore[attr-defined]
    search.strategy, search.follow = grid, True
    search.start()
    list(search.run())
    assert search.trainer.step == 20
    assert (search.trainer.average is not None) == kept
    ending = end(search.trainer, search.examples, search.held.cluster_N)
    assert (ending.gain is not None) == kept


def test_what_was_averaged_is_not_averaged_again(search: Search) -> None:
    """A checkpoint of an end that was taken has no average, whatever the trainer had before."""
    search.follow = True
    list(search.run())
    trainer = search.trainer
    trainer.take_average()
    tensors, state = trainer.tensors(), trainer.state()
    trainer.follow()
    trainer.restore(tensors, state)
    assert trainer.average is None


def test_values_and_average_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankrace.training.average.AT_ONCE", 7)
    values = flat()
    average = Average(values)
    walk(average, values, 3)
    before, mean = values.all_KP.clone(), average.mean.all_KP.clone()
    average.swap()
    assert torch.equal(values.all_KP, mean)
    assert torch.equal(average.mean.all_KP, before)


def test_without_an_average_or_a_mark_nothing_is_measured(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    list(search.run())
    monkeypatch.setattr(search.trainer, "measure", None)
    assert end(search.trainer, search.examples, search.held.cluster_N) == Ending()


# --- in a search


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    """Three learning rates and a twin, then a race, over a tiny model in float64."""
    # Or there would be nothing to race for.
    monkeypatch.setattr("rankrace.select.objective.clearly", lambda d, se, clusters: d > 0)
    hf = tiny("llama")
    bank = Bank(hf)
    recipe = Recipe(epochs=9, max_steps=20, batch_size=8, micro_tokens=200, schedule="linear", warmup=0.1,
                    weight_decay=0.0, clip=1.0, seed=0)  # fmt: skip
    trainer = Trainer(PackedModel(hf, bank, "causal"), examples(32), recipe)
    held = examples(16, seed=1)
    with bank.off():
        base = trainer.measure(held)
    objective = Objective(penalty=log2_penalty(0.0), rule="one_se")
    race = Race(total_steps=20, wide=16, ranks=(2, 4, 8), refine=False, objective=objective, probe_share=0.2)
    scales, total = (0.5, 1.0, 2.0), trainer.total
    opening = Opening(inner=race, scales=scales, twin=True, look_step=4, total_steps=total, objective=objective)
    groups = Held(tokens_N=base.tokens_N, cluster_N=torch.arange(16).numpy(), base_N=base.loss_KN[0])
    made = Search(trainer, opening, held, groups, lambda rank: Setting(multiplier=32 / rank, lr=3e-3))
    made.start()
    return made


def steps(search: Search, count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield from search.trainer.run(search.trainer.step + 1)


def test_averages_are_those_of_the_candidates_that_train(search: Search) -> None:
    trainer = search.trainer
    seen = [trainer.bank.values.all_KP.clone() for _ in steps(search, 3)]
    assert trainer.average is not None
    torch.testing.assert_close(trainer.average.mean.all_KP, weighted(seen), rtol=1e-12, atol=1e-12)
    before = trainer.bank.values.all_KP.clone()
    measured = search.averaged()
    assert torch.equal(trainer.bank.values.all_KP, before), "measuring them moves nothing"
    trainer.bank.values.all_KP.copy_(weighted(seen))
    for average, itself in zip(measured, search.direct(), strict=True):
        assert average.loss_N == pytest.approx(itself.loss_N, rel=1e-9)


def test_they_are_kept_while_learning_rates_are_compared(search: Search) -> None:
    """Begun with the opening and dropped with it: the racers after it are compared as they are."""
    follows = []
    for _ in search.run():
        average = search.trainer.average
        follows.append((len(search.ranks), None if average is None else average.steps))
    assert follows[:4] == [(4, 1), (4, 2), (4, 3), (4, 4)]
    assert any(count > 1 for count, _ in follows[4:])
    assert all(steps is None for _, steps in follows[4:])


def test_a_checkpoint_brings_them_back_bit_for_bit(search: Search, tmp_path: Path) -> None:
    trainer = search.trainer
    list(steps(search, 3))

    class Data:
        sha256 = "of the rows"

    session = Session(
        config=None,
        data=Data(),
        trainer=trainer,
        search=search,
        fresh=[],
        base_fresh=None,
        base_seconds=0.0,
        notes=[],
    )  # type: ignore[arg-type]
    save_checkpoint(tmp_path, trainer.step, session.tensors(), {"session": json.loads(json.dumps(session.state()))})
    list(steps(search, 3))
    assert trainer.average is not None
    expected, values = trainer.average.mean.all_KP.clone(), trainer.bank.values.all_KP.clone()
    found = load_checkpoint(tmp_path)
    assert found is not None
    search.start()
    session.restore(found[0], found[1]["session"])
    assert trainer.average.steps == 3
    list(steps(search, 3))
    assert torch.equal(trainer.average.mean.all_KP, expected)
    assert torch.equal(trainer.bank.values.all_KP, values)
