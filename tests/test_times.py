"""What a run's seconds are billed to: search, evaluation, or the rest. The clock goes only where a test says."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankrace import RunConfig, session, train
from rankrace.progress import Progress
from rankrace.result import Time
from rankrace.select.search import Search
from rankrace.training.loop import Trainer
from tinyfolder import SUMS, tiny_llama, write_rows

STEP_S, STEPS = 100.0, 8
"""What each step takes by that clock, and their number."""
LATE_S = 10_000.0
"""What the part in question takes."""


class Seconds:
    """In place of the clock; it begins now, since Python's own has been read by then."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = time.perf_counter()
        self.patch = patch
        patch.setattr(time, "perf_counter", lambda: self.now)
        self.slow(Trainer, "take_step", STEP_S)

    def slow(self, owner: Any, name: str, seconds: float = LATE_S) -> None:
        """Each call of this takes so long."""
        body: Callable[..., Any] = getattr(owner, name)

        def late(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return body(*arguments, **named)

        self.patch.setattr(owner, name, late)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    return Seconds(monkeypatch)


@pytest.fixture(scope="module")
def given(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("given")
    model, data = tiny_llama(folder / "model", smollm2), write_rows(folder / "sums.jsonl", SUMS)
    return {
        "model": str(model), "data": str(data), "ranks": (2, 4), "max_steps": STEPS, "batch_size": 8, "device": "cpu"
    }  # fmt: skip


def spent(given: dict[str, Any], out: Path) -> Time:
    return train(RunConfig(**given, out=out)).time


def test_getting_ready_is_no_evaluation(given: dict[str, Any], tmp_path: Path, seconds: Seconds) -> None:
    seconds.slow(session, "ready")
    time = spent(given, tmp_path / "out")
    assert time.evaluation_s == 0
    assert time.total_s > LATE_S


def test_evaluation_is_the_base_the_choice_and_its_ends(
    given: dict[str, Any], tmp_path: Path, seconds: Seconds
) -> None:
    """The base on both sets; what was chosen, the last step and the average on one; the delivered on the other."""
    seconds.slow(Trainer, "measure")
    time = spent(given, tmp_path / "out")
    assert time.evaluation_s == pytest.approx(6 * LATE_S)
    assert time.search_s >= LATE_S, "looks measure too"


def test_steps_that_a_look_waits_for_are_steps(given: dict[str, Any], tmp_path: Path, seconds: Seconds) -> None:
    """On a GPU the host is ahead of the device, and waits where it reads the losses."""
    seconds.slow(Search, "read_losses")
    assert spent(given, tmp_path / "out").search_s < STEPS * STEP_S


def test_waiting_is_billed_to_the_candidates_that_ran(
    given: dict[str, Any], tmp_path: Path, seconds: Seconds
) -> None:
    """Of a grid of two the loser pays for half of it."""
    seconds.slow(torch.Tensor, "tolist")
    grid = {**given, "strategy": "grid", "refine": False, "save_every": STEPS, "max_steps": STEPS}
    result = train(RunConfig(**grid, out=tmp_path / "out"))
    looked = result.decision.step

    assert result.time.search_s == pytest.approx((looked * STEP_S + LATE_S) / 2)


def test_steps_that_are_waited_for_to_be_shown_are_steps(
    given: dict[str, Any], tmp_path: Path, seconds: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is a step ahead: what it waits for when it reads a loss is that step."""
    tokens = [0]
    monkeypatch.setattr(Progress, "due", lambda self, step: True)
    monkeypatch.setattr(Progress, "update", lambda *shown: tokens.append(shown[-1]))
    seconds.slow(torch.Tensor, "tolist")
    result = train(RunConfig(**{**given, "save_every": STEPS}, out=tmp_path / "out"))
    assert len(tokens) == 1 + STEPS
    assert tokens[-1] / result.tokens_per_second == pytest.approx(STEPS * (STEP_S + LATE_S))
