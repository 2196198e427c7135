"""What a finished training delivers: the values of its last step, or their average since the choice.

Where rows come back the last epochs learn them by heart, and the average, which remembers less of them, has the lower
validation loss; in a single pass the last step is the better one, by a little (docs/selection.md). Both are there at
the end, so they are measured: the average is taken if it is ahead by more than one paired standard error. (In a
single pass none is kept.)

Shapes: N held-out examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankrace.data.encoded import Encoded
from rankrace.select.statistics import paired_difference
from rankrace.training.loop import Trainer


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Between two losses, in nats per supervised token, with its paired standard error."""

    nats: float
    se: float


@dataclass(frozen=True, kw_only=True)
class Ending:
    """On the examples that chose the rank."""

    averaged: bool = False
    """The average was taken."""
    gain: Difference | None = None
    """By how much its loss is lower than that of the last step; None: there was none."""
    rise: Difference | None = None
    """By how much the loss of what is delivered is higher than soon after the choice; None: that was not measured."""


def end(
    trainer: Trainer[Any], examples: Sequence[Encoded], cluster_N: np.ndarray, chosen_N: np.ndarray | None = None
) -> Ending:
    """Measures both, and leaves the better one in place.

    Args:
        trainer: has one candidate, and took its last step.
        examples: that chose the rank.
        chosen_N: their loss soon after the choice.
    """
    assert trainer.average is None or trainer.average.steps > 0
    if trainer.average is None and chosen_N is None:
        return Ending()
    last = trainer.measure(examples)

    def difference(a_N: np.ndarray, b_N: np.ndarray) -> Difference:
        nats, se = paired_difference(a_N, b_N, last.tokens_N, cluster_N)
        return Difference(nats=nats, se=se)

    averaged, gain, (end_N,) = False, None, last.loss_KN
    if trainer.average is not None:
        with trainer.averaged():
            (average_N,) = trainer.measure(examples).loss_KN
        gain = difference(end_N, average_N)
        averaged = gain.nats > gain.se  # an unknown error says no
        if averaged:
            trainer.take_average()
            end_N = average_N
    return Ending(averaged=averaged, gain=gain, rise=None if chosen_N is None else difference(end_N, chosen_N))
