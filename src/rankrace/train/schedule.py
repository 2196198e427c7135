"""The learning rate over a run, as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A multiplier in [0, 1] of the peak learning rate.

    Linear warm-up over the first steps, then decay to zero at the end. After a cut of the rank at step c the
    multiplier rises again over `rewarm` steps, since the optimiser starts with empty moments there.
    """

    total: int
    warmup: int
    kind: Literal["linear", "cosine", "constant"] = "linear"
    rewarm: int = 0

    def at(self, step: int, restarted_at: int = 0) -> float:
        """For the update that follows `step` finished ones."""
        up = min(1.0, (step + 1) / (self.warmup + 1))
        done = min(1.0, max(0.0, (step - self.warmup) / max(1, self.total - self.warmup)))
        down = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[self.kind]
        again = 1.0
        if restarted_at > 0:
            again = min(1.0, (step - restarted_at + 1) / (self.rewarm + 1))
        return up * down * again
