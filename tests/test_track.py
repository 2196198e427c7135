"""--track: what a tracker is told, through the real command line. The trackers are stand-ins that take notes."""

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from commandline import Ran, assert_refused, rankrace
from rankrace import run, track
from rankrace.result import Result
from tinyfolder import SHORT, SUMS, tiny_llama, write_rows

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
Options = tuple[object, ...]


@dataclass
class Notes:
    """What a tracker was told, in the words of all of them."""

    opened: int = 0
    closed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    values: list[tuple[int, str, float]] = field(default_factory=list)

    def log(self, values: dict[str, float], step: int) -> None:
        assert self.opened == self.closed + 1
        self.values += [(step, name, value) for name, value in values.items()]

    def close(self) -> None:
        self.closed += 1

    def open(self, settings: dict[str, Any]) -> None:
        self.opened += 1
        self.settings |= settings
        print("a tracker that talks")

    def named(self, name: str) -> list[tuple[int, float]]:
        return [(step, value) for step, found, value in self.values if found == name]


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


def stand_in(name: str, notes: Notes) -> ModuleType:
    """A module with those functions of a tracker's that are called, under their real names and arguments."""
    match name:
        case "tensorboard":

            class SummaryWriter:
                def __init__(self, log_dir: str) -> None:
                    notes.open({"folder": log_dir})

                def add_text(self, tag: str, text_string: str) -> None:
                    notes.settings[tag] = text_string

                def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
                    notes.log({tag: scalar_value}, global_step)

                def close(self) -> None:
                    notes.close()

            return module("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
        case "mlflow":

            def log_metrics(metrics: dict[str, float], step: int) -> None:
                notes.log(metrics, step)

            return module(
                name,
                set_experiment=lambda experiment_name: None,
                start_run=lambda run_name: notes.open({"name": run_name}),
                log_params=lambda params: notes.settings.update(params),
                log_metrics=log_metrics,
                end_run=notes.close,
            )
        case _:

            def init(project: str, name: str, config: dict[str, Any]) -> None:
                notes.open({"project": project, "name": name, **config})

            return module(name, init=init, log=notes.log, finish=notes.close)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Notes]:
    """Puts a stand-in in a tracker's place."""

    def placed(name: str) -> Notes:
        notes = Notes()
        made = stand_in(name, notes)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        monkeypatch.setattr(track, "find_spec", lambda wanted: object() if wanted == name else None)
        return notes

    return placed


@pytest.fixture(scope="module")
def given(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("given")
    model, data = tiny_llama(folder / "model", smollm2), write_rows(folder / "sums.jsonl", SUMS)
    return ("--model", model, "--data", data, *SHORT, "--save-every", 3)


def train(given: Options, out: Path, *options: object) -> Ran:
    return rankrace("train", *given, "--out", out, *options)


def assert_told(notes: Notes, out: Path) -> None:
    """Each step of each candidate once, each look once, and the end: what result.json says."""
    result = Result.read(out / "result.json")
    ranks = {series.rank for series in result.history}
    assert len(ranks) == len(result.history) == 2, "the wide one and the chosen one"
    for series in result.history:
        told = notes.named(f"train/rank {series.rank}")
        assert [step for step, _ in told] == list(series.steps)
        assert [value for _, value in told] == pytest.approx(list(series.losses), rel=1e-5)
    for look in result.looks:
        for rank, loss in zip(look.ranks, look.losses, strict=True):
            assert notes.named(f"validation/rank {rank}") == [(look.step, pytest.approx(loss, rel=1e-5))]
    assert notes.named("rank") == [(result.decision.step, result.rank)]
    assert notes.named("final/loss") == [(8, result.loss.final)]
    steps = [step for step, *_ in notes.values]
    assert steps == sorted(steps), "wandb refuses steps that go back"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_is_told_everything_once(
    name: str, given: Options, noted: Callable[[str], Notes], tmp_path: Path
) -> None:
    notes, out = noted(name), tmp_path / "out"
    ran = train(given, out, "--track", name)
    assert ran.code == 0, ran.err
    assert (notes.opened, notes.closed) == (1, 1)
    assert "a tracker that talks" not in ran.out
    assert str(notes.settings["batch_size"]) == "8"
    if name == "tensorboard":
        assert notes.settings["folder"] == str(out / "tensorboard")
    else:
        assert notes.settings["name"] == "out"
    assert_told(notes, out)


def test_candidates_of_one_rank_have_curves_of_their_own(
    given: Options, noted: Callable[[str], Notes], tmp_path: Path
) -> None:
    """Three learning rates and a twin begin, of rank 8; the chosen one goes on alone, and is cut."""
    notes, out = noted("mlflow"), tmp_path / "out"
    ran = train(given, out, "--track", "mlflow", "--lr-scales", "0.5,1,2", "--twin")
    assert ran.code == 0, ran.err
    result = Result.read(out / "result.json")
    openers = [series for series in result.history if series.rank == 8]
    names = ["8x0.5", "8", "8x2", "8 twin"]
    for name, series in zip(names, openers, strict=True):
        told = notes.named(f"train/rank {name}")
        assert [step for step, _ in told] == list(series.steps)
        assert [value for _, value in told] == pytest.approx(list(series.losses), rel=1e-5)
    (cut,) = [series for series in result.history if series.rank != 8]
    assert [step for step, _ in notes.named(f"train/rank {cut.rank}")] == list(cut.steps), "alone: its rank will do"
    for tried in result.learning_rates:
        (told,) = notes.named(f"validation/lr x{tried.scale:g}")
        assert told[1] == pytest.approx(tried.loss)
    assert len(result.learning_rates) == 3
    taken = {name for _, name, _ in notes.values}
    assert all(re.fullmatch(r"[/\w.\- ]*", name) for name in taken), "what MLflow takes for a name"


def test_a_resumed_run_tells_no_step_twice(
    given: Options, noted: Callable[[str], Notes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, out = noted("wandb"), tmp_path / "out"
    save = run.save_checkpoint

    def saved_and_interrupted(*arguments: Any) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", saved_and_interrupted)
        assert train(given, out, "--track", "wandb").code == 130
    assert 0 < notes.values[-1][0] < 8
    assert notes.closed == 1
    ran = train(given, out, "--resume")  # the tracker is an option of the run
    assert ran.code == 0, ran.err
    assert (notes.opened, notes.closed) == (2, 2)
    assert_told(notes, out)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed(
    name: str, given: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "find_spec", lambda wanted: None)
    ran = train(given, tmp_path / "out", "--track", name)
    assert_refused(ran, f"the package {name} is not installed", f"pip install {name}", within=tmp_path)


def test_a_tracker_out_of_reach(
    given: Options, noted: Callable[[str], Notes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, out = noted("wandb"), tmp_path / "out"

    def unreachable(**arguments: object) -> None:
        raise RuntimeError("no key\nfor you")

    monkeypatch.setattr(sys.modules["wandb"], "init", unreachable)
    ran = train(given, out, "--track", "wandb")
    assert_refused(ran, "--track wandb cannot be opened: no key for you", "--resume --track none")
    ran = train(given, out, "--resume", "--track", "none")
    assert ran.code == 0, ran.err
    assert (notes.opened, notes.values) == (0, [])
