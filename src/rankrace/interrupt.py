"""Ctrl-C as a request: the step in hand is finished and saved first."""

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """The run was stopped by the user and saved. `resume` is the command that continues it."""

    def __init__(self, resume: str) -> None:
        super().__init__(resume)
        self.resume = resume


class Interrupts:
    """While active, a first SIGINT or SIGTERM only sets `asked`; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupts":
        # Python hands signals to the main thread, and lets no other one set handlers.
        main = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
