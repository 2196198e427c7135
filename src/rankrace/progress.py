"""One line that says where the run is: step, loss of each candidate, tokens/s, memory, time left."""

import resource
import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.status import Status

EVERY_S = 0.25
"""Seconds between updates on a terminal."""
LINES = 20
"""Lines over a whole run where the output is not a terminal."""


class Progress:
    """Writes to stderr, so that a command's result can be piped."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self.status: Status | None = None
        self.shown = 0.0
        self.said = 0
        self.start(total=1, step=0, tokens=0)

    def start(self, total: int, step: int, tokens: int) -> None:
        """From here on speed and time left are counted."""
        self.total, self.step_before, self.tokens_before = total, step, tokens
        self.began = time.perf_counter()

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.status = self.console.status("starting")
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        # On a terminal whole words are wrapped; in a file a line stays one line.
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def note(self, notes: Sequence[str]) -> None:
        """What a person should know, a line each."""
        for note in notes:
            self.say(f"Note: {note}")

    def say_new(self, lines: Sequence[str]) -> None:
        """Those at the end of a growing list that were not there at the last call."""
        for line in lines[self.said :]:
            self.say(line)
        self.said = len(lines)

    def phase(self, text: str) -> None:
        """What is being done between steps."""
        if self.status is not None:
            self.status.update(text)

    def due(self, step: int) -> bool:
        """Whether `update` would show anything; asking costs nothing on the device."""
        if self.status is not None:
            return time.perf_counter() - self.shown > EVERY_S
        return step == self.total or step % -(-self.total // LINES) == 0

    def update(self, step: int, names: Sequence[str], losses: Sequence[float], tokens: int) -> None:
        now = time.perf_counter()
        self.shown = now
        speed = (step - self.step_before) / max(1e-9, now - self.began)
        left = (self.total - step) / max(1e-9, speed)
        pairs = "  ".join(f"r={name} {loss:.4f}" for name, loss in zip(names, losses, strict=True))
        per_second = (tokens - self.tokens_before) / max(1e-9, now - self.began)
        line = (
            f"step {step}/{self.total}  loss {pairs}  {per_second:,.0f} tokens/s  "
            f"{peak_bytes() / 2**30:.1f} GiB  {clock(left)} left"
        )
        if self.status is not None:
            self.status.update(line)
        else:
            self.say(line)


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def peak_bytes() -> int:
    """Peak memory so far: of the device where there is one, else of the process.

    On a device it is what torch has reserved, not what tensors took: the pool of a CUDA graph is taken between its
    replays too, and what the allocator keeps in its cache nobody else can use.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
