"""What a rank costs, and which one is worth having: r* = argmin_r ( L_val(r) + penalty(r) ).

Shapes: N held-out examples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rankrace.errors import RankraceError
from rankrace.select.statistics import paired_difference

Source = Literal["direct", "truncated"]
Penalty = Callable[[int, float], float]
"""(rank, gain G in nats) → nats."""


def log2_penalty(kappa: float) -> Penalty:
    """κ·G·log2(r): a doubling of the rank must buy the share κ of the whole gain. Free of units."""
    return lambda rank, gain: kappa * max(gain, 0.0) * math.log2(rank)


def linear_penalty(lam: float, unit: Callable[[int], float]) -> Penalty:
    """λ·unit(r) in nats, whatever the gain: parameters as a share of the base's, bytes, or the user's own."""
    return lambda rank, gain: lam * unit(rank)


@dataclass(frozen=True, kw_only=True)
class Held:
    """The held-out examples on which the candidates are compared."""

    tokens_N: np.ndarray
    cluster_N: np.ndarray
    base_N: np.ndarray
    """Loss of the base model without adapter, nats summed over each example."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One rank's loss on the held-out examples."""

    rank: int
    loss_N: np.ndarray
    source: Source


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rank on the curve that the choice is made from. Losses in nats per supervised token."""

    rank: int
    loss: float
    se: float
    """Standard error of the paired difference to the best point; 0 for the best, NaN where unknown."""
    penalty: float
    objective: float
    source: Source

    @property
    def alive(self) -> bool:
        return math.isfinite(self.loss)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The curve, by rising rank, and the pick."""

    points: tuple[Point, ...]
    pick: int
    """A rank on the curve."""
    best: int
    """The rank of lowest objective; the pick may be smaller, within one standard error of it."""
    gain: float
    """G = L(base) − min_r L(r)."""

    def at(self, rank: int) -> Point:
        return next(p for p in self.points if p.rank == rank)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Judges a curve.

    Args:
        rule: "argmin" takes the lowest objective; "one_se" the smallest rank within one paired standard error of
            it, since what cannot be told apart should not be paid for. Ties go to the smaller rank in both.
    """

    penalty: Penalty
    rule: Literal["one_se", "argmin"]

    def judge(self, trials: Sequence[Trial], held: Held) -> Verdict:
        """Raises RankraceError when no trial has a finite loss."""
        trials = sorted(trials, key=lambda t: t.rank)
        total = held.tokens_N.sum()
        losses = [float(t.loss_N.sum() / total) for t in trials]
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            raise RankraceError(
                "every candidate diverged (loss is NaN or infinite)",
                why="nothing is left to choose from",
                fix="lower --lr, or lower --clip",
            )
        gain = float(held.base_N.sum() / total) - min(finite)
        penalties = [self.penalty(t.rank, gain) for t in trials]
        objectives = [
            loss + p if math.isfinite(loss) else math.inf for loss, p in zip(losses, penalties, strict=True)
        ]
        # Sums in another order differ in the last digits; that is a tie too.
        tie = 1e-9 * max(abs(o) for o in objectives if math.isfinite(o))
        best = next(i for i, o in enumerate(objectives) if o <= min(objectives) + tie)
        ses = [
            paired_difference(t.loss_N, trials[best].loss_N, held.tokens_N, held.cluster_N)[1] for t in trials
        ]
        ses[best] = 0.0
        pick = best
        if self.rule == "one_se":
            pick = next(
                i for i, o in enumerate(objectives) if o - objectives[best] <= max(np.nan_to_num(ses[i]), tie)
            )
        points = tuple(
            Point(rank=t.rank, loss=loss, se=se, penalty=p, objective=o, source=t.source)
            for t, loss, se, p, o in zip(trials, losses, ses, penalties, objectives, strict=True)
        )
        return Verdict(points=points, pick=trials[pick].rank, best=trials[best].rank, gain=gain)
