"""Data and settings that lead a choice astray, through whole runs: what comes out, and what is said of it.

Curves on which the same is decided are in test_objective.py, test_race.py and test_strategies.py; learning rates in
test_opening.py; the standard errors of clusters in test_statistics.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commandline import Ran, rankrace
from examples import examples
from models import tiny
from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.data.encoded import Encoded
from rankrace.loading import open_session
from rankrace.progress import Progress
from rankrace.report.text import percent
from rankrace.result import Ending, Result
from rankrace.select.objective import Held, Objective, linear_penalty, log2_penalty
from rankrace.select.search import Search, Setting
from rankrace.select.shrink import Shrink
from rankrace.session import Session
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.model import PackedModel
from tinyfolder import SHORT, SUMS, tiny_llama, write_rows

OTHERS = [{"prompt": f"{a} times {b} is", "completion": f" {a * b}"} for a in range(10) for b in range(10)]
"""Rows that are none of SUMS."""


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("failures") / "model", smollm2)


class Runs:
    """`rankrace train` on SUMS, or other rows, with these for validation."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder

    def __call__(
        self, validation: Sequence[dict[str, Any]], *options: object, train: Sequence[dict[str, Any]] = SUMS
    ) -> tuple[Ran, Result]:
        out = self.folder / f"out-{len(list(self.folder.iterdir()))}"
        rows, held = write_rows(self.folder / "rows.jsonl", train), write_rows(self.folder / "held.jsonl", validation)
        given = ["--model", self.model, "--data", rows, "--validation", held, "--out", out, "--lr", "1e-2", *SHORT]
        ran = rankrace("train", *given, *options)
        assert ran.code == 0, ran.err
        return ran, Result.read(out / "result.json")


@pytest.fixture
def runs(model: Path, tmp_path: Path) -> Runs:
    return Runs(model, tmp_path)


def errors(result: Result) -> list[float | None]:
    """Of all measured ranks but the best."""
    best = min(result.curve, key=lambda p: p.objective if p.objective is not None else np.inf)
    return [p.se for p in result.curve if p.rank != best.rank]


# --- few held-out examples


@pytest.mark.parametrize("strategy", ["shrink", "race", "grid"])
@pytest.mark.parametrize("count", [1, 8, 64])
def test_few_held_out_examples(count: int, strategy: str, runs: Runs) -> None:
    ran, found = runs(OTHERS[:count], "--strategy", strategy)
    assert found.data.validation_examples == count
    examples = "1 validation example" if count == 1 else f"{count} validation examples"
    assert f"Only {examples}: the choice of the rank will be uncertain." in ran.err
    assert "nan" not in ran.out.lower()
    if count == 1:
        assert set(errors(found)) <= {None}, "of one example the spread is unknown"
        assert found.loss.final_se is None
        assert not found.decision.confident
        assert "measured on 1 held-out example after" in found.reason
    else:
        assert all(se is not None and 0 <= se < 1 for se in errors(found))
        assert found.loss.final_se is not None
        assert found.loss.final_se > 0
    optimistic = any("too small to halve" in note for note in found.notes)
    assert optimistic == (count < 20), "whether the final figure is one of examples that chose"
    assert ("but         " in ran.out) or found.decision.confident


# --- few rows to learn from


def test_few_training_rows_are_said_in_terminal_record_and_report(runs: Runs) -> None:
    said = "Only 3 training examples: so few are sooner learnt by heart than learnt from."
    ran, found = runs(OTHERS[:64], train=SUMS[:3])
    assert f"Note: {said}" in ran.err
    assert any(note.startswith(said) for note in found.notes)
    assert said in next(runs.folder.glob("out-*/report.html")).read_text()


# --- examples that are not independent


def test_copies_of_an_example_count_as_one(runs: Runs) -> None:
    """Twelve copies of a row say no more of the spread than one does."""
    _, once = runs(OTHERS[:1])
    _, often = runs(OTHERS[:1] * 12)
    assert [p.loss for p in often.curve] == [pytest.approx(p.loss, rel=1e-5) for p in once.curve]
    assert set(errors(often)) <= {None}
    assert often.loss.final_se is None
    assert not often.decision.confident


def test_copies_stay_together_where_validation_is_halved(runs: Runs) -> None:
    """What reports the final figure has no copy among what chose."""
    session = opened(runs, [row for row in OTHERS[:24] for _ in range(3)])
    chose, fresh = ({tuple(e.input_ids) for e in side} for side in (session.search.examples, session.fresh))
    assert len(session.fresh) >= 10
    assert not chose & fresh


def test_examples_of_one_document_have_rough_errors_and_that_is_said(runs: Runs) -> None:
    rows = [{**row, "page": str(i % 3)} for i, row in enumerate(OTHERS[:30])]
    train = [{**row, "page": f"own {i}"} for i, row in enumerate(SUMS)]
    ran, found = runs(rows, "--group-column", "page", train=train)
    assert "The validation examples come from 3 documents: standard errors will be rough." in ran.err
    assert not found.decision.confident, "three documents are too few to be sure of anything"


def test_validation_inside_train_is_left_out_and_said(runs: Runs) -> None:
    ran, found = runs([*SUMS[:10], *OTHERS[:7]])
    assert "Left out 10 validation rows that are also training rows." in ran.err
    assert any("Left out 10 validation rows" in note for note in found.notes)
    assert found.data.validation_examples == 7
    assert "Left out 10 validation rows" in (runs.folder / "out-0" / "report.html").read_text()


# --- what the final figure is measured on


def opened(runs: Runs, validation: Sequence[dict[str, Any]], **options: Any) -> Session:
    rows, held = write_rows(runs.folder / "rows.jsonl", SUMS), write_rows(runs.folder / "held.jsonl", validation)
    config = RunConfig(
        model=str(runs.model), data=str(rows), validation=str(held), ranks=(2, 4), max_steps=8, batch_size=8, lr=1e-2,
        **options,
    )  # fmt: skip
    with Progress() as progress:
        return open_session(config, progress)[0]


def test_the_final_figure_is_of_examples_that_chose_nothing(runs: Runs) -> None:
    ran, found = runs(OTHERS)
    assert not any("optimistic" in note for note in found.notes)
    session = opened(runs, OTHERS)
    chose, fresh = session.search.examples, session.fresh
    assert len(fresh) >= 20
    assert not {e.row for e in chose} & {e.row for e in fresh}
    assert not {e.group for e in chose} & {e.group for e in fresh}
    for _ in session.search.run():
        pass
    measured, again = (session.trainer.measure(side).mean_K[0] for side in (fresh, chose))
    assert found.loss.final == pytest.approx(measured, rel=1e-4)
    assert abs(measured - again) > 1e-3 * measured, "the others' figure is another"
    assert f"measured on {len(chose)} held-out examples" in ran.out


def test_dropout_is_off_where_candidates_are_measured(runs: Runs) -> None:
    """The adapters' as well as the model's own."""
    measured = {}
    for dropout in (0.0, 0.9):
        session = opened(runs, OTHERS, dropout=dropout)
        trainer = session.trainer
        torch.manual_seed(0)
        trainer.bank.values.all_KP.add_(0.05 * torch.randn(trainer.bank.values.all_KP.shape))
        (once,), (twice,) = (trainer.measure(session.fresh).loss_KN for _ in range(2))
        assert np.array_equal(once, twice)
        measured[dropout] = once
        assert not any(module.training for module in trainer.bank.model.modules())
    assert np.array_equal(measured[0.0], measured[0.9])


# --- a gain that is not the rank's


def classified(rows: Sequence[Encoded], objective: Objective) -> Search:
    """A classifier whose adapters learn nothing: only its head is trained."""
    hf = tiny("bert-classification")
    bank = Bank(hf)
    recipe = Recipe(epochs=99, max_steps=100, batch_size=8, micro_tokens=400, schedule="constant", warmup=0.0,
                    weight_decay=0.0, clip=1.0, seed=0)  # fmt: skip
    trainer = Trainer(PackedModel(hf, bank, "classification"), rows, recipe)
    with bank.off():
        base = trainer.measure(rows)
    held = Held(tokens_N=base.tokens_N, cluster_N=np.arange(len(rows)), base_N=base.loss_KN[0])
    strategy = Shrink(total_steps=100, wide=16, largest=8, refine=True, objective=objective)
    search = Search(trainer, strategy, rows, held, lambda rank: Setting(multiplier=32 / rank, lr=1e-2))
    search.start()
    for _ in trainer.run(10):
        for _, B_KDR in bank.candidates.factors.values():
            B_KDR.data.zero_()
    return search


@pytest.mark.parametrize("share", [0.0, 0.04])
def test_what_a_head_learns_is_not_credited_to_rank(share: float) -> None:
    """All labels are alike, and the head finds that out by itself: a large gain, of which rank buys nothing."""
    rows = [replace(e, label=1) for e in examples(64, classes=3)]
    free = Objective(penalty=log2_penalty(0.0), rule="one_se", share=share)
    search = classified(rows, free)
    look = search.strategy.look(10, [], search)
    assert look.verdict.gain > 0.3
    assert look.verdict.bought == pytest.approx(0.0, abs=1e-9)
    assert look.verdict.pick == 1
    argmin = Objective(penalty=linear_penalty(0.0, float), rule="argmin")
    assert argmin.judge(search.truncated(0, [1, 2, 4, 8]), search.held).pick == 1, "ties go down"


# --- few rows to learn from


LOTS = [
    {"prompt": f"{i} of {j} is", "completion": f" {word}"}
    for (i, j), word in zip(
        product(range(20), range(20)),
        np.random.default_rng(0).choice(["red", "blue", "nine", "salt", "moon", "tree"], 400).tolist(),
        strict=True,
    )
]
"""Answers drawn by lot: their form can be learnt, and nothing else that would help with other rows."""


@pytest.fixture(scope="module")
def taught(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the form of LOTS already, so that no rank gains by that."""
    folder = tmp_path_factory.mktemp("taught")
    options = ["--strategy", "grid", "--no-refine", "--ranks", 16, "--max-steps", 80, "--epochs", 99]
    _, found = Runs(model, folder)(LOTS[:40], *options, "--batch-size", 32, train=LOTS[40:300])
    assert found.loss.final < found.loss.base - 1
    ran = rankrace("merge", folder / "out-0" / "adapter", "--out", folder / "merged")
    assert ran.code == 0, ran.err
    return folder / "merged"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("strategy", "smallest"), [("shrink", 1), ("race", 2)])
def test_eight_rows_learnt_by_heart_give_the_smallest_rank(
    strategy: str, smallest: int, seed: int, taught: Path, tmp_path: Path
) -> None:
    """Whatever is learnt of them makes the others worse."""
    options = ["--strategy", strategy, "--ranks", "2,4,8", "--max-steps", 60, "--epochs", 99, "--seed", seed]
    rows = LOTS[360 + 8 * seed : 368 + 8 * seed]
    ran, found = Runs(taught, tmp_path)(LOTS[300:360], *options, train=rows)
    learnt = found.history[0].losses[0] - found.history[-1].losses[-1]
    assert learnt > 0.5 > 0.0 > found.loss.base - found.loss.final
    assert found.rank == smallest
    assert found.reason.startswith(f"no rank lowered the validation loss, so the smallest, {smallest}, was taken")
    assert "but         No gain: the validation loss with the adapter is not below that of the base" in ran.out
    assert not found.decision.confident


def test_what_rises_after_the_choice_is_called_overfitting(taught: Path, tmp_path: Path) -> None:
    """The same, and many examples to tell it by."""
    options = ["--strategy", "shrink", "--ranks", "2,4,8", "--max-steps", 60, "--epochs", 99]
    ran, found = Runs(taught, tmp_path)(LOTS[40:360], *options, train=LOTS[360:368])
    rise, error = found.decision.rise, found.decision.rise_se
    assert rise is not None
    assert error is not None
    assert rise > 2 * error > 0
    assert f"but         Overfitting: since the rank was chosen, at {percent(found.decision.fraction)}" in ran.out


def test_the_average_of_values_that_wander_is_delivered(model: Path, tmp_path: Path) -> None:
    """At a constant rate, on two rows a step. Both runs train alike."""
    options = ["--strategy", "grid", "--ranks", 8, "--max-steps", 120, "--schedule", "constant", "--batch-size", 2]
    told, average = Runs(model, tmp_path)(OTHERS, *options)
    plain, last = Runs(model, tmp_path)(OTHERS, *options, "--average", "off")
    assert average.history == last.history
    assert average.ending.averaged
    assert average.ending.gain is not None
    assert average.ending.gain_se is not None
    assert average.ending.gain > average.ending.gain_se > 0
    assert last.ending == Ending()
    assert average.loss.final < last.loss.final - average.ending.gain / 2
    words = f"the average of the weights since the choice (later steps count more), {average.ending.gain:.4f} ± "
    assert f"delivered   {words}" in told.out
    assert "delivered " not in plain.out


def test_a_single_pass_over_the_rows_cannot_overfit(model: Path, tmp_path: Path) -> None:
    """Nothing is measured for it. In two passes it is, and what falls is no matter."""
    once, twice = (Runs(model, tmp_path)(OTHERS, "--max-steps", n, "--epochs", 9)[1].decision for n in (5, 10))
    assert (once.rise, once.rise_se) == (None, None)
    assert twice.rise is not None
