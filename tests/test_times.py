"""What a run's seconds are billed to: search, evaluation, or the rest."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankrace import RunConfig, session, train
from rankrace.result import Result
from rankrace.select.search import Search
from rankrace.training.loop import Trainer
from tinyfolder import SUMS, tiny_llama, write_rows

LATE_S = 1.0
"""By so much the part in question is slowed down: far more than the whole run takes otherwise for it."""


@pytest.fixture(scope="module")
def given(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("given")
    model, data = tiny_llama(folder / "model", smollm2), write_rows(folder / "sums.jsonl", SUMS)
    return {"model": str(model), "data": str(data), "ranks": (2, 4), "max_steps": 8, "batch_size": 8, "device": "cpu"}


def slowed(body: Callable[..., Any]) -> Callable[..., Any]:
    def late(*arguments: Any, **named: Any) -> Any:
        time.sleep(LATE_S)
        return body(*arguments, **named)

    return late


def finished(given: dict[str, Any], out: Path) -> Result:
    return train(RunConfig(**given, out=out))


def test_getting_ready_is_no_evaluation(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ready", slowed(session.ready))
    spent = finished(given, tmp_path / "out").time
    assert spent.evaluation_s < LATE_S
    assert spent.total_s - spent.search_s - spent.evaluation_s > LATE_S


def test_evaluation_is_the_base_twice_and_the_end(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "measure", slowed(Trainer.measure))
    spent = finished(given, tmp_path / "out").time
    assert 3 * LATE_S < spent.evaluation_s < 4 * LATE_S
    assert spent.search_s > LATE_S, "looks measure too"


def test_steps_that_a_look_has_to_wait_for_are_steps(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host is ahead of the device, and waits where it reads the losses."""
    runs: list[Search] = []
    look = Search.take_look

    def watched(search: Search) -> None:
        runs.append(search)
        look(search)

    monkeypatch.setattr(Search, "take_look", watched)
    monkeypatch.setattr(Search, "read_losses", slowed(Search.read_losses))
    result = finished(given, tmp_path / "out")
    assert 0 < runs[-1].state.look_seconds < LATE_S
    assert result.time.total_s > LATE_S


def test_waiting_for_losses_is_time_of_the_steps(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the losers' part of it is billed to the search, and tokens per second are those of the device."""
    monkeypatch.setattr(torch, "stack", slowed(torch.stack))
    spent: list[float] = []
    read = Search.read_losses

    def watched(search: Search) -> None:
        unread, before = len(search._unread), search.trainer.seconds
        read(search)
        if unread:
            spent.append(search.trainer.seconds - before)

    monkeypatch.setattr(Search, "read_losses", watched)
    finished({**given, "max_steps": 3}, tmp_path / "out")
    assert spent
    assert min(spent) > LATE_S
