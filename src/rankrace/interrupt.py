"""Ctrl-C as a request: the step in hand is finished and saved first."""

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """The user stopped the run.

    Args:
        resume: the command that continues it.
        saved: the step that it will go on after, where steps since then are lost; 0: nothing was saved at all;
            None: nothing is lost.
    """

    def __init__(self, resume: str, saved: int | None = None) -> None:
        super().__init__(resume)
        self.resume, self.saved = resume, saved

    @property
    def said(self) -> str:
        """To the user, before the command."""
        if self.saved is None:
            return "Stopped and saved. Go on with:"
        if self.saved == 0:
            return "Stopped before anything was saved. Begin again with:"
        return f"Stopped at once; what came after step {self.saved} is lost. Go on from there with:"


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
