"""What a rank costs, and which one is worth having: r* = argmin_r ( L_val(r) + penalty(r) ).

Shapes: N held-out examples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rankrace.config import Rule
from rankrace.errors import RankraceError
from rankrace.select.statistics import clearly, paired_difference

ERRORS: dict[Rule, float] = {"argmin": 0.0, "one_se": 1.0, "two_se": 2.0}
"""Paired standard errors that a smaller rank may be behind."""
CLEARLY_SMALLER = 3 / 4
"""Next-door integers differ by less than any validation set resolves; a rank this much smaller is compared."""
Source = Literal["direct", "truncated"]
Edge = Literal["low", "high"] | None
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
    epochs: float = 0.0
    """Passes over the training rows that were made so far."""

    @property
    def clusters(self) -> int:
        """Independent groups of examples, from which standard errors are estimated."""
        return len(np.unique(self.cluster_N))


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
class Smaller:
    """The largest measured rank that is clearly smaller than the pick, held against the pick."""

    rank: int
    behind: float
    """By how much its objective is above the pick's."""
    se: float
    """Paired standard error; NaN where unknown."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The curve, by rising rank, and the pick."""

    points: tuple[Point, ...]
    pick: int
    """A rank on the curve."""
    best: int
    """The rank of lowest objective; the pick may be smaller, within `errors` of it."""
    gain: float
    """G = L(base) − min_r L(r)."""
    bought: float
    """What rank buys: J(smallest rank) − min_r J(r)."""
    clusters: int
    """Independent groups of held-out examples, from which the standard errors are estimated."""
    smaller: Smaller | None = None
    """None: no such rank was measured."""
    errors: float = 1.0
    """Standard errors within which the pick may be behind the best."""
    by_heart: bool = False
    """No rank improves on the base model, and the training rows were seen more than once."""
    rank_counts: bool = False
    """Whether rank has bought anything by now: the smallest is clearly behind the lowest. (Or all learn by heart.)

    By loss alone, for a penalty is no evidence; never by an error that is unknown. That large ranks are behind early
    is no evidence either: at a high learning rate much of their update is noise, which goes as the rate falls.
    """

    def at(self, rank: int) -> Point:
        return next(p for p in self.points if p.rank == rank)

    @property
    def alive(self) -> list[Point]:
        """The points with a finite loss."""
        return [p for p in self.points if p.alive]

    @property
    def edge(self) -> Edge:
        """Whether the optimum may lie beyond the ranks there were.

        low: the pick is the smallest. high: it is the largest, or more than half of a largest one that is still the
        best: what rank buys was measured on this range, and at its end the last doubling still bought something.
        """
        largest = self.alive[-1].rank
        if self.pick == self.alive[0].rank:
            return "low"
        return "high" if self.pick == largest or (self.best == largest and 2 * self.pick > largest) else None


def smallest_within(objectives: Sequence[float], ses: Sequence[float], best: int, errors: float, slack: float) -> int:
    """The first, by rising rank, that is behind the best by so many standard errors at most, or by `slack` nats.

    An error that is unknown (NaN) lets nothing through.
    """
    allowed = np.maximum(errors * np.nan_to_num(ses), slack)
    return next(i for i, o in enumerate(objectives) if o - objectives[best] <= allowed[i])


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Judges a curve.

    Args:
        rule: "argmin" takes the lowest objective; "one_se" and "two_se" the smallest rank within so many paired
            standard errors of it, since what cannot be told apart should not be paid for (argmin where the error is
            unknown). Ties go to the smaller rank in all, and so does everything where rows seen more than once have
            improved nothing: they are being learnt by heart. In the first pass a training may just be behind its
            start (docs/log.md).
        share: with either a smaller rank is also taken where it loses at most this share of what rank itself buys,
            J(smallest) − min J. What rank buys is the unit because the whole gain over the base model is mostly the
            form of the answers, of which every rank gets nearly all. And because cutting off what is not learnt yet
            costs an early curve a little at every rank: many standard errors, but a small share (docs/planted.md).
    """

    penalty: Penalty
    rule: Rule
    share: float = 0.0

    def judge(self, trials: Sequence[Trial], held: Held, bought: float | None = None) -> Verdict:
        """Args:
            bought: what rank buys, where it is known from a curve that begins at a smaller rank.

        Raises:
            RankraceError: no trial has a finite loss, or a price is no number.
        """
        trials = sorted(trials, key=lambda t: t.rank)
        total = held.tokens_N.sum()
        losses = [float(t.loss_N.sum() / total) for t in trials]
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            raise RankraceError(
                "every candidate diverged (loss is NaN or infinite)",
                why="nothing is left to choose from",
                fix="lower --lr, or lower --clip (in another --out)",
            )
        gain = float(held.base_N.sum() / total) - min(finite)
        penalties = [self.penalty(t.rank, gain) for t in trials]
        objectives = [
            loss + p if math.isfinite(loss) else math.inf for loss, p in zip(losses, penalties, strict=True)
        ]
        if not all(p > -math.inf for p in penalties) or min(objectives) == math.inf:  # NaN is not above either
            priced = ", ".join(f"{t.rank}: {p:g}" for t, p in zip(trials, penalties, strict=True))
            raise RankraceError(
                f"prices of ranks are no numbers, or rule all of them out ({priced})",
                why="the rank of lowest loss plus price is chosen",
                fix="mend the function that prices ranks; infinity rules one out, but not all that trained",
            )
        lowest = min(objectives)
        if bought is None:
            bought = next(o for o in objectives if math.isfinite(o)) - lowest
        # Sums in another order differ in the last digits; that is a tie too.
        tie = 1e-9 * abs(lowest)
        best = next(i for i, o in enumerate(objectives) if o <= lowest + tie)

        def difference(a: int, b: int) -> tuple[float, float]:
            return paired_difference(trials[a].loss_N, trials[b].loss_N, held.tokens_N, held.cluster_N)

        ses = [difference(i, best)[1] if math.isfinite(loss) else math.nan for i, loss in enumerate(losses)]
        ses[best] = 0.0
        pick, by_heart = best, gain <= 0 and held.epochs > 1
        if by_heart:
            pick = next(i for i, o in enumerate(objectives) if math.isfinite(o))
        elif self.rule != "argmin":
            pick = smallest_within(objectives, ses, best, ERRORS[self.rule], max(tie, self.share * bought))
        behind, se = difference(losses.index(finite[0]), losses.index(min(finite)))
        below = [
            i for i, t in enumerate(trials)
            if math.isfinite(objectives[i]) and t.rank <= CLEARLY_SMALLER * trials[pick].rank
        ]  # fmt: skip
        smaller = None
        if below:
            i = below[-1]
            smaller = Smaller(rank=trials[i].rank, behind=objectives[i] - objectives[pick], se=difference(i, pick)[1])
        points = tuple(
            Point(rank=t.rank, loss=loss, se=se, penalty=p, objective=o, source=t.source)
            for t, loss, se, p, o in zip(trials, losses, ses, penalties, objectives, strict=True)
        )
        return Verdict(
            points=points,
            pick=trials[pick].rank,
            best=trials[best].rank,
            gain=gain,
            bought=bought,
            clusters=held.clusters,
            smaller=smaller,
            errors=ERRORS[self.rule],
            by_heart=by_heart,
            rank_counts=by_heart or clearly(behind, se, held.clusters),
        )
