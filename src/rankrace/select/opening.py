"""opening: before a strategy that starts with one candidate, several learning rates of it, side by side.

A learning rate that is off looks like an effect of the rank, and costs more than any rank does (docs/selection.md).
The candidates differ in nothing else, so the comparison is paired; the averages of their factors are compared, since
a large rate's values themselves look worse, until the end of the schedule, than what they have learnt.

A twin, alike but for the draw of its initial factors, shows how much of a difference between two trainings is chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankrace.errors import RankraceError
from rankrace.select.objective import Objective, Trial
from rankrace.select.statistics import clearly, paired_difference
from rankrace.select.strategy import Bench, Keep, Look, Rated, Start, Strategy

SHARE = 0.10
"""Of the training. At a twentieth averages mislead; later looks cost more and name no better rate
(docs/selection.md)."""
OFTEN = 2.0
"""Passes over the rows beyond which a raised rate has to be much better: what it gains before rows come back it lost
again, tenfold, where rows were seen three times."""
MUCH = 0.05
"""Of the loss at the rate that was given. Where a raised rate was better for one pass and worse in the end it was so
by 1% at most; a rate that is far too low is behind by much more."""


def may_remember(scale: float, passes: float, behind: float, loss: float) -> bool:
    """Whether a rate is raised, and ahead by no more than what such a one loses again where rows are seen often.

    Args:
        scale: of the learning rate.
        passes: over the rows, to the end of the training.
        behind: by how much the given rate is behind it, and at what loss. Nats per supervised token.
    """
    return scale > 1 and passes > OFTEN and behind <= MUCH * loss


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Args:
    inner: takes over, with the candidate that is kept; must start with one.
    scales: of the learning rate; 1 is among them.
    twin: with one.
    look_step: when to decide, not after the inner strategy's first look.
    total_steps: of the training.
    """

    inner: Strategy
    scales: tuple[float, ...]
    twin: bool
    look_step: int
    total_steps: int
    objective: Objective
    averages: bool = True

    def __post_init__(self) -> None:
        assert 1.0 in self.scales
        assert len(self.inner.start()) == 1
        first = self.inner.next_look([])
        assert first is None or self.look_step <= first

    @property
    def name(self) -> str:
        return self.inner.name

    def start(self) -> tuple[Start, ...]:
        (only,) = self.inner.start()
        twins = (replace(only, draw=1),) if self.twin else ()
        return (*(replace(only, lr_scale=scale) for scale in self.scales), *twins)

    def next_look(self, looks: Sequence[Look]) -> int | None:
        if not looks:
            return self.look_step
        return self.inner.next_look(looks[1:])

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        if not looks:
            return self.choose(step, bench)
        opened = looks[0]
        return replace(self.inner.look(step, looks[1:], bench), lr_scale=opened.lr_scale, chance=opened.chance)

    def choose(self, step: int, bench: Bench) -> Look:
        """The rate of lowest loss, if it is clearly better than the one given; else that.

        The wide candidate that rates are tried on stands high rates better than the small rank that may be cut from
        it: in doubt the rate stays. And it stays, unless another is much better, where rows will be seen often
        (docs/selection.md).
        """
        held = bench.held
        trials = bench.averaged()
        rated = trials[: len(self.scales)]

        def difference(a: Trial, b: Trial) -> tuple[float, float]:
            if not (np.isfinite(a.loss_N).all() and np.isfinite(b.loss_N).all()):
                return float("nan"), float("nan")
            return paired_difference(a.loss_N, b.loss_N, held.tokens_N, held.cluster_N)

        losses = [float(t.loss_N.sum() / held.tokens_N.sum()) for t in rated]
        if not np.isfinite(losses).any():
            raise RankraceError(
                "every learning rate that was tried diverged (loss is NaN or infinite)",
                why="nothing is left to choose from",
                fix="lower --lr, or name smaller ones in --lr-scales (in another --out)",
            )
        best, given = int(np.nanargmin(losses)), self.scales.index(1.0)
        compared = [difference(t, rated[best]) for t in rated]
        behind, se = compared[given]
        # Where the error is unknown nothing is clearly better.
        pick = given if np.isfinite(behind) and not clearly(behind, se, held.clusters) else best
        seen, note = round(held.epochs * self.total_steps / step, 6), ""
        if may_remember(self.scales[pick], seen, behind, losses[given]):
            note = (
                f"{self.scales[pick]:g} times --lr is better by {behind:.4f} ± {se:.4f} nats after {step} steps, "
                f"and was not taken: rows will be seen {seen:.1f} times, and what a raised rate gains before "
                "they come back may be lost again. To take it all the same, raise --lr."
            )
            pick = given
        chance = abs(difference(trials[-1], rated[given])[0]) if self.twin else None
        return Look(
            step=step,
            verdict=self.objective.judge([rated[pick]], held),
            action=Keep(indices=(pick,)),
            rates=tuple(
                Rated(lr_scale=scale, loss=loss, se=0.0 if i == best else compared[i][1])
                for i, (scale, loss) in enumerate(zip(self.scales, losses, strict=True))
            ),
            lr_scale=self.scales[pick],
            chance=chance,
            note=note,
        )
