"""Losses in a tracker, while the run goes on: `--track tensorboard`, trackio, wandb or mlflow.

The tracker is told at each checkpoint what happened since the one before. So nothing waits for the device at a step,
and a run that was killed and resumed has no step twice. What a tracker needs besides, such as an address or a key, it
takes from its own settings.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.result import Result
from rankrace.select.search import Entry, SearchState

PROJECT = "rankrace"


class Tracker(Protocol):
    """Abstract; made from the run's folder and its settings."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Nothing:
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"))
        for name, value in settings.items():
            self.writer.add_text(name, str(value))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLike:
    """wandb, and trackio, which has the same interface."""

    def __init__(self, package: str, out: Path, settings: dict[str, Any]) -> None:
        self.package = import_module(package)
        self.package.init(project=PROJECT, name=out.name, config=settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.package.log(values, step=step)

    def close(self) -> None:
        self.package.finish()


class MLflow:
    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.mlflow = import_module("mlflow")
        self.mlflow.set_experiment(PROJECT)
        self.mlflow.start_run(run_name=out.name)
        self.mlflow.log_params(settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class Curves:
    """What of a search a tracker has been told.

    Args:
        step: the optimiser steps that were done before, and told then.
    """

    def __init__(self, tracker: Tracker, state: SearchState, step: int) -> None:
        self.tracker, self.state = tracker, state
        self.step, self.looks = step, len(state.looks)

    def follow(self) -> None:
        """Tells what is new: training losses by step, validation losses by look (of learning rates those of averages,
        as they were compared), in nats per supervised token."""
        found: dict[int, dict[str, float]] = defaultdict(dict)
        for look in self.state.looks[self.looks :]:
            found[look.step] |= {f"validation/rank {p.rank}": p.loss for p in look.verdict.points}
            found[look.step] |= {f"validation/lr x{tried.lr_scale:g}": tried.loss for tried in look.rates}
            found[look.step]["rank"] = look.verdict.pick
        for entry in self.state.entries:
            known, key = max(0, self.step - entry.began), f"train/rank {self.name(entry)}"
            for step, loss in enumerate(entry.losses[known:], start=entry.began + known + 1):
                found[step][key] = loss
        for step in sorted(found):
            self.tracker.log(step, found[step])
        self.step, self.looks = max([self.step, *found]), len(self.state.looks)

    def name(self, entry: Entry) -> str:
        """Its rank alone, unless others of that rank begin beside it."""
        beside = [e for e in self.state.entries if (e.rank, e.began) == (entry.rank, entry.began)]
        # MLflow takes no ×.
        return entry.name.replace("×", "x") if len(beside) > 1 else str(entry.rank)

    def end(self, result: Result) -> None:
        """Tells what came out."""
        self.follow()
        self.tracker.log(
            self.step, {"final/rank": result.rank, "final/base": result.loss.base, "final/loss": result.loss.final}
        )


def check_tracker(name: str) -> None:
    """Before anything is loaded.

    Raises:
        RankraceError: the tracker's package is not installed.
    """
    if name != "none" and find_spec(name) is None:
        raise RankraceError(
            f"--track {name}: the package {name} is not installed",
            why="it is no part of rankrace",
            fix=f"pip install {name}, or leave out --track",
        )


@contextmanager
def tracked(config: RunConfig, state: SearchState, step: int) -> Iterator[Curves]:
    """The run's curves in the tracker that it asks for; closed at the end, whatever that is.

    Raises:
        RankraceError: the tracker cannot be reached, or wants a setting of its own.
    """
    settings = config.model_dump(mode="json", exclude={"resume"})
    try:
        with redirect_stdout(sys.stderr):  # stdout is for what the command finds
            tracker = opened(config.track, config.out.absolute(), settings)
    except Exception as error:  # each tracker has its own kinds
        raise RankraceError(
            f"--track {config.track} cannot be opened: {' '.join(str(error).split())}",
            why="the losses were to be followed there",
            fix=f"set up {config.track} as its manual says and go on with --resume, or with --resume --track none",
        ) from error
    try:
        yield Curves(tracker, state, step)
    finally:
        with redirect_stdout(sys.stderr):
            tracker.close()


def opened(name: str, out: Path, settings: dict[str, Any]) -> Tracker:
    match name:
        case "tensorboard":
            return TensorBoard(out, settings)
        case "wandb" | "trackio":
            return WandbLike(name, out, settings)
        case "mlflow":
            return MLflow(out, settings)
        case _:
            return Nothing()
