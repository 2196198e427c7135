"""The host beside a GPU, without one: when it waits."""

from typing import Any

import pytest
import torch

from rankrace.device import OneAhead


def test_the_host_is_one_step_ahead_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    class Event:
        made = 0

        def record(self, stream: Any) -> None:
            Event.made += 1
            self.step = Event.made

        def synchronize(self) -> None:
            done.append(self.step)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    ahead = OneAhead(torch.device("cuda"))
    waited = []
    for _ in range(4):
        ahead.queued()
        waited.append(list(done))
    assert waited == [[], [1], [1, 2], [1, 2, 3]]


def test_without_a_gpu_there_is_nothing_to_wait_for() -> None:
    OneAhead(torch.device("cpu")).queued()
