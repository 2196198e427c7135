"""The learning rate over a run, as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


def steps_of(examples: int, batch_size: int, epochs: float, max_steps: int | None) -> tuple[int, int]:
    """Optimiser steps of an epoch, and of the whole training: at least one, and at most `max_steps`."""
    per_epoch = -(-examples // batch_size)
    total = max(1, round(epochs * per_epoch))
    return per_epoch, total if max_steps is None else min(total, max_steps)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A multiplier in [0, 1] of the peak learning rate.

    Linear warm-up over the first steps, then decay to zero at the end.
    """

    total: int
    warmup: int
    kind: Literal["linear", "cosine", "constant"] = "linear"

    def at(self, step: int) -> float:
        """For the update that follows `step` finished ones."""
        up = min(1.0, (step + 1) / (self.warmup + 1))
        done = min(1.0, max(0.0, (step - self.warmup) / max(1, self.total - self.warmup)))
        down = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[self.kind]
        return up * down
