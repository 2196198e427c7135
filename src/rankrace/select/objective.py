"""What a rank costs, and which one is worth having: r* = argmin_r ( L_val(r) + penalty(r) ).

Shapes: K ranks, N held-out examples, C documents of them, B draws of C documents with replacement.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from rankrace.config import Rule
from rankrace.errors import RankraceError
from rankrace.select.statistics import LEAST_CLUSTERS, bootstrap_weights, by_cluster, clearly, differences

ERRORS: dict[Rule, float] = {"argmin": 0.0, "one_se": 1.0, "two_se": 2.0}
"""Paired standard errors that a smaller rank may be behind."""
CLEARLY_SMALLER = 3 / 4
"""Next-door integers differ by less than any validation set resolves; a rank this much smaller is compared."""
DRAWS = 200
"""Of the held-out documents with replacement: how else the choice might have come out."""
AT_ONCE = 2**20
"""Numbers that are held for draws × ranks × documents."""
Source = Literal["direct", "truncated"]
Edge = Literal["low", "high"] | None
Penalty = Callable[[int, float], float]
"""(rank, gain G in nats) → nats."""


def log2_penalty(kappa: float) -> Penalty:
    """κ·G·log2(r): a doubling of the rank must buy the share κ of the whole gain. Free of units."""
    return lambda rank, gain: kappa * max(gain, 0.0) * math.log2(rank)


def linear_penalty(lam: float, unit: Callable[[int], float]) -> Penalty:
    """λ·unit(r) in nats, whatever the gain: parameters as a share of the base's, bytes, or the user's own."""
    price = cache(unit)  # asked for in every bootstrap sample
    return lambda rank, gain: lam * price(rank)


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
    bootstrap: float | None = None
    """The share of bootstrap samples of the held-out documents in which this rank is the pick; None where none were
    drawn, or there is a single document."""

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
    def interval(self) -> tuple[int, int] | None:
        """The measured ranks between which the picks of 95% of the bootstrap samples lie; None of few documents, of a
        single rank, or where none were drawn.

        That is the chance that lies in the choice of the examples, and not that of the training.
        """
        shares = [p.bootstrap for p in self.points if p.bootstrap is not None]
        if len(shares) < 2 or self.clusters < LEAST_CLUSTERS:
            return None
        up_to_K = np.cumsum(shares)
        low, high = np.searchsorted(up_to_K, [0.025, 0.975 - 1e-9])
        return self.points[low].rank, self.points[high].rank

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


def smallest_within(
    objective_BK: np.ndarray, se_BK: np.ndarray, best_B: np.ndarray, errors: float, slack_B: np.ndarray
) -> np.ndarray:
    """The first, by rising rank, that is behind the best by so many standard errors at most, or by `slack` nats; [B].

    An error that is unknown (NaN) lets nothing through.
    """
    behind_BK = objective_BK - np.take_along_axis(objective_BK, best_B[:, None], 1)
    return np.argmax(behind_BK <= np.maximum(errors * np.nan_to_num(se_BK), slack_B[:, None]), 1)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Sums over the examples of each document, ranks rising."""

    ranks: tuple[int, ...]
    loss_KC: np.ndarray
    base_C: np.ndarray
    tokens_C: np.ndarray

    @staticmethod
    def of(trials: Sequence[Trial], held: Held) -> "Curve":
        each = np.stack([*(t.loss_N for t in trials), held.base_N, held.tokens_N])
        *loss_KC, base_C, tokens_C = by_cluster(each, held.cluster_N)
        loss_KC = np.where(np.isfinite(loss_KC), loss_KC, np.nan)  # infinity less infinity would be a warning
        return Curve(ranks=tuple(t.rank for t in trials), loss_KC=loss_KC, base_C=base_C, tokens_C=tokens_C)

    def to(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The paired differences of all ranks to one, and their standard errors: [K] each."""
        d_1K, se_1K = differences(self.loss_KC, np.array([index]), self.tokens_C, np.ones((1, len(self.tokens_C))))
        return d_1K[0], se_1K[0]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What each draw of the documents leads to."""

    loss_BK: np.ndarray
    gain_B: np.ndarray
    penalty_BK: np.ndarray
    objective_BK: np.ndarray
    """Infinite where the loss is not finite."""
    bought_B: np.ndarray
    best_B: np.ndarray
    se_BK: np.ndarray
    """Of the paired differences to the best: 0 for itself, NaN where unknown."""
    by_heart_B: np.ndarray
    pick_B: np.ndarray


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

    def judge(self, trials: Sequence[Trial], held: Held, bought: float | None = None, *, draws: int = 0) -> Verdict:
        """Args:
            bought: what rank buys, where it is known from a curve that begins at a smaller rank.
            draws: bootstrap samples, to tell how else the choice might have come out.

        Raises:
            RankraceError: no trial has a finite loss, or a price is no number.
        """
        trials = sorted(trials, key=lambda t: t.rank)
        curve = Curve.of(trials, held)
        if not any(np.isfinite(t.loss_N.sum()) for t in trials):
            raise RankraceError(
                "every candidate diverged (loss is NaN or infinite)",
                why="nothing is left to choose from",
                fix="lower --lr, or lower --clip (in another --out)",
            )
        C = len(curve.tokens_C)
        one = self.choose(curve, np.ones((1, C)), held.epochs, bought)
        losses, objectives, penalties = one.loss_BK[0], one.objective_BK[0], one.penalty_BK[0]
        if not all(p > -math.inf for p in penalties) or min(objectives) == math.inf:  # NaN is not above either
            priced = ", ".join(f"{r}: {p:g}" for r, p in zip(curve.ranks, penalties, strict=True))
            raise RankraceError(
                f"prices of ranks are no numbers, or rule all of them out ({priced})",
                why="the rank of lowest loss plus price is chosen",
                fix="mend the function that prices ranks; infinity rules one out, but not all that trained",
            )
        best, pick = int(one.best_B[0]), int(one.pick_B[0])
        shares: list[float | None] = [None] * len(trials)
        if draws and C > 1:
            pieces = np.array_split(bootstrap_weights(C, draws), 1 + draws * len(trials) * C // AT_ONCE)
            picks_B = np.concatenate([self.choose(curve, w_BC, held.epochs, bought).pick_B for w_BC in pieces])
            shares = [float(np.mean(picks_B == i)) for i in range(len(trials))]
        finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
        behind_K, se_K = curve.to(min(finite, key=lambda i: losses[i]))
        below = [
            i for i, t in enumerate(trials)
            if math.isfinite(objectives[i]) and t.rank <= CLEARLY_SMALLER * trials[pick].rank
        ]  # fmt: skip
        smaller = None
        if below:
            i = below[-1]
            ahead = float(objectives[i] - objectives[pick])
            smaller = Smaller(rank=trials[i].rank, behind=ahead, se=float(curve.to(pick)[1][i]))
        by_heart = bool(one.by_heart_B[0])
        return Verdict(
            points=tuple(
                Point(
                    rank=t.rank,
                    loss=float(losses[i]),
                    se=float(one.se_BK[0, i]),
                    penalty=float(penalties[i]),
                    objective=float(objectives[i]),
                    source=t.source,
                    bootstrap=shares[i],
                )
                for i, t in enumerate(trials)
            ),
            pick=trials[pick].rank,
            best=trials[best].rank,
            gain=float(one.gain_B[0]),
            bought=float(one.bought_B[0]),
            clusters=C,
            smaller=smaller,
            errors=ERRORS[self.rule],
            by_heart=by_heart,
            rank_counts=by_heart or clearly(float(behind_K[finite[0]]), float(se_K[finite[0]]), C),
        )

    @np.errstate(invalid="ignore")  # prices may be infinite: `judge` refuses what cannot be chosen from
    def choose(self, curve: Curve, weight_BC: np.ndarray, epochs: float, bought: float | None) -> Choices:
        """The rule, on draws of the documents; the documents as they are have weights of 1.

        Args:
            epochs: passes over the training rows so far.
        """
        total_B = weight_BC @ curve.tokens_C
        loss_BK = (weight_BC @ curve.loss_KC.T) / total_B[:, None]
        finite_BK = np.isfinite(loss_BK)
        gain_B = weight_BC @ curve.base_C / total_B - np.where(finite_BK, loss_BK, math.inf).min(1)
        penalty_BK = np.array([[self.penalty(rank, float(gain)) for rank in curve.ranks] for gain in gain_B])
        objective_BK = np.where(finite_BK, loss_BK + penalty_BK, math.inf)
        lowest_B, first_B = objective_BK.min(1), np.argmax(np.isfinite(objective_BK), 1)
        bought_B = np.take_along_axis(objective_BK, first_B[:, None], 1)[:, 0] - lowest_B
        if bought is not None:
            bought_B = np.full_like(bought_B, bought)
        # Sums in another order differ in the last digits; that is a tie too.
        tie_B = 1e-9 * np.abs(lowest_B)
        best_B = np.argmax(objective_BK <= (lowest_B + tie_B)[:, None], 1)
        _, se_BK = differences(curve.loss_KC, best_B, curve.tokens_C, weight_BC)
        np.put_along_axis(se_BK, best_B[:, None], 0.0, 1)
        pick_B, by_heart_B = best_B, (gain_B <= 0) & (epochs > 1)
        if self.rule != "argmin":
            slack_B = np.maximum(tie_B, self.share * bought_B)
            pick_B = smallest_within(objective_BK, se_BK, best_B, ERRORS[self.rule], slack_B)
        return Choices(
            loss_BK=loss_BK,
            gain_B=gain_B,
            penalty_BK=penalty_BK,
            objective_BK=objective_BK,
            bought_B=bought_B,
            best_B=best_B,
            se_BK=se_BK,
            by_heart_B=by_heart_B,
            pick_B=np.where(by_heart_B, first_B, pick_B),
        )
