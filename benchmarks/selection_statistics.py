"""What the tables of docs/selection.md rest on.

Two kinds of error: a difference between two trainings on the same examples has a paired standard error, which would
vanish with examples enough; and two trainings that should be the same end apart, since the last bits of their sums
differ and a training magnifies that. The second is chance too, and no number of examples removes it.

Shapes: K arms, N fresh examples.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import spearmanr

from benchmarks.selection_records import Adaptive, Curve, Fresh, Sweep, Unit, Way
from rankrace.select.objective import ERRORS, smallest_within
from rankrace.select.opening import may_remember
from rankrace.select.statistics import CLEARLY, paired_difference

LARGEST = 32
"""That the default may pick."""


def lowest(loss_K: np.ndarray) -> int | None:
    """Index of the lowest loss; None if all diverged."""
    return int(np.nanargmin(loss_K)) if np.isfinite(loss_K).any() else None


def default_pick(curve: Curve, share: float) -> int | None:
    """The default's choice from a curve by rising rank, without a penalty (select/objective.py).

    The smallest rank that is within two paired standard errors of the lowest loss, or loses at most this share of
    what rank buys, L(smallest) − min L. None if all diverged.
    """
    best = lowest(curve.loss_K)
    if best is None:
        return None
    loss_K = np.where(np.isfinite(curve.loss_K), curve.loss_K, np.inf)
    bought = float(loss_K[np.isfinite(loss_K)][0] - loss_K[best])
    slack_1 = np.array([share * bought])
    return int(smallest_within(loss_K[None], curve.se_KK[best][None], np.array([best]), ERRORS["two_se"], slack_1)[0])


def clearly_better(curve: Curve, given: int, scales: Sequence[float], passes: float) -> int | None:
    """As `--lr-scales` takes one (select/opening.py).

    The given rate, unless another is clearly better, and much better where a raised one would see the rows often. (By
    two errors: records do not hold of how many documents they are, where the choice itself asks for more with few.)
    """
    best = lowest(curve.loss_K)
    if best is None or not np.isfinite(curve.loss_K[given]):
        return best
    behind = curve.loss_K[given] - curve.loss_K[best]
    if not behind > CLEARLY * curve.se_KK[given, best]:
        return given
    return given if may_remember(scales[best], passes, behind, curve.loss_K[given]) else best


def correlation(early_K: np.ndarray, end_K: np.ndarray) -> float:
    """Spearman's, over the arms that have both; NaN with fewer than three."""
    both = np.isfinite(early_K) & np.isfinite(end_K)
    if both.sum() < 3:
        return math.nan
    return float(spearmanr(early_K[both], end_K[both]).statistic)


def regret(chosen: int | None, end_K: np.ndarray) -> float:
    """What was picked ends this far above the lowest end; NaN if nothing was."""
    return math.nan if chosen is None else float(end_K[chosen] - np.nanmin(end_K))


def best_arms(sweep: Sweep) -> dict[int, int]:
    """Rank → its arm at the learning rate that is best at the last look. Fresh examples choose nothing."""
    last_K = sweep.looks[-1].direct.loss_K
    arms: dict[int, int] = {}
    for i, rank in enumerate(sweep.ranks):
        if math.isfinite(last_K[i]) and (rank not in arms or last_K[i] < last_K[arms[rank]]):
            arms[rank] = i
    return dict(sorted(arms.items()))


def best_arm(sweep: Sweep) -> int:
    """The best of all at the last look."""
    return best_at(sweep, range(len(sweep.ranks)))


def best_at(sweep: Sweep, arms: Iterable[int]) -> int:
    """The best of these at the last look."""
    last_K = sweep.looks[-1].direct.loss_K
    return min((i for i in arms if math.isfinite(last_K[i])), key=lambda i: last_K[i])


@dataclass(frozen=True, kw_only=True)
class End:
    """One training's end on its unit's fresh examples."""

    unit: Unit
    way: Way
    setting: tuple[object, ...]
    """All else that a training goes by."""
    rank: int
    loss_N: np.ndarray
    fresh: Fresh


def ends_of(sweeps: Iterable[Sweep], adaptives: Iterable[Adaptive]) -> list[End]:
    """Of all trainings whose losses were kept one by one: their last steps, whatever was delivered."""
    found = []
    for s in sweeps:
        if s.loss_KN is None or s.fresh is None:
            continue
        for rank, rate, loss_N in zip(s.ranks, s.rates, s.loss_KN, strict=True):
            setting = (s.data, s.warmup, rate)
            found.append(End(unit=s.unit, way="alone", setting=setting, rank=rank, loss_N=loss_N, fresh=s.fresh))
    for run in adaptives:
        for arm in run.arms.values():
            setting = (run.data, run.warmup, arm.scale, *([arm.step] if arm.way == "cut" else []))
            found.append(
                End(unit=run.unit, way=arm.way, setting=setting, rank=arm.rank, loss_N=arm.last_N, fresh=run.fresh)
            )
    return found


CLOSE = 4 / 3
"""Up to here ranks cut from one training at one step count as the same, as for a stable pick of `shrink`."""


def alike(a: End, b: End) -> bool:
    """Whether what they differ by is chance.

    Ends that agree to the last digit came from one computation that was repeated, which shows nothing; those that
    diverged show something else.
    """
    if (a.unit, a.way, a.setting) != (b.unit, b.way, b.setting) or a.way == "own":
        return False
    small, large = sorted((a.rank, b.rank))
    close = large <= (CLOSE if a.way == "cut" else 1.0) * small
    return close and bool(np.isfinite(a.loss_N + b.loss_N).all()) and not np.array_equal(a.loss_N, b.loss_N)


@dataclass(frozen=True, kw_only=True)
class Chance:
    """How far trainings end apart that should be the same, in nats per supervised token."""

    pairs: int
    rms: float
    """Of the differences as they were measured, which hold sampling errors too."""
    se: float
    """Root mean square of their paired standard errors."""

    @property
    def run(self) -> float:
        """Of run to run alone: √(rms² − se²), or 0 where sampling explains it all."""
        return math.sqrt(max(0.0, self.rms**2 - self.se**2))


def chances(ends: Iterable[End]) -> dict[str, Chance]:
    """For each task, from all pairs of ends that are alike."""
    found: dict[str, list[tuple[float, float]]] = {}
    for a, b in combinations(ends, 2):
        if alike(a, b):
            pair = paired_difference(a.loss_N, b.loss_N, a.fresh.tokens_N, a.fresh.cluster_N)
            found.setdefault(a.unit[0], []).append(pair)
    return {
        task: Chance(pairs=len(pairs), rms=rms([d for d, _ in pairs]), se=rms([se for _, se in pairs]))
        for task, pairs in found.items()
    }


def over_runs(values: Sequence[float], tasks: Sequence[str]) -> tuple[float, float]:
    """Mean over units and its standard error, with each task's seeds as one cluster: they share what is easy or hard
    about it. NaN from one task."""
    value_N = np.array(values)
    return paired_difference(value_N, np.zeros_like(value_N), np.ones_like(value_N), np.array(tasks))


def rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A run's end less that of another on the same examples."""

    d: float
    se: float
    """Sampling error."""
    run: float
    """Chance from run to run."""

    @property
    def error(self) -> float:
        """Both."""
        return math.hypot(self.se, self.run)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many comparisons are at most one error worse, more than one error better, more than one worse."""

    all: int
    within: int
    won: int
    lost: int


def tally(found: Sequence[Difference], *, chance: bool) -> Tally:
    """By the sampling error alone, or by both."""
    errors = [x.error if chance else x.se for x in found]
    return Tally(
        all=len(found),
        within=sum(x.d <= e for x, e in zip(found, errors, strict=True)),
        won=sum(x.d < -e for x, e in zip(found, errors, strict=True)),
        lost=sum(x.d > e for x, e in zip(found, errors, strict=True)),
    )
