"""Rules that read a rank off one look at the wide candidate. Experimental: only what proves good belongs in rankrace.

Shapes: r the ranks 1 … LARGEST, P layers of the model, R the wide candidate's rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one look shows."""

    loss_r: np.ndarray
    """Held-out loss of the truncation to each rank, nats per target (any constant may be taken off)."""
    se_r: np.ndarray
    """Paired standard error of its difference to the lowest."""
    S_PR: np.ndarray
    """Singular values of each layer's update, descending."""


Rule = Callable[[Curve], int]


def argmin(curve: Curve) -> int:
    return 1 + int(np.argmin(curve.loss_r))


def one_se(curve: Curve) -> int:
    """The smallest rank within one paired standard error of the lowest loss: rankrace's default before the share."""
    return 1 + int(np.argmax(curve.loss_r <= curve.loss_r.min() + curve.se_r))


def share(part: float) -> Rule:
    """The smallest rank that loses at most this part of what rank buys, L(1) − min L (or one standard error, as
    rankrace's default had it until 27 November; now two, with which no planted pick is another)."""

    def rule(curve: Curve) -> int:
        behind_r = curve.loss_r - curve.loss_r.min()
        return 1 + int(np.argmax(behind_r <= np.maximum(part * behind_r[0], curve.se_r)))

    return rule


def doubling(part: float) -> Rule:
    """The smallest rank whose doubling buys at most this part of what rank buys."""

    def rule(curve: Curve) -> int:
        largest, bought = len(curve.loss_r), part * (curve.loss_r[0] - curve.loss_r.min())
        fits = (r for r in range(1, largest) if curve.loss_r[r - 1] - curve.loss_r[min(2 * r, largest) - 1] <= bought)
        return next(fits, largest)

    return rule


def knee(floor: float) -> Rule:
    """Where the gain of one more rank falls most: argmax of gain(r) / gain(r + 1), gain(r) = L(r − 1) − L(r).

    Gains below `floor`, a part of what rank buys, count as that: ratios of noise say nothing. Never 1 or the largest.
    """

    def rule(curve: Curve) -> int:
        gain_r = np.maximum(-np.diff(curve.loss_r), floor * (curve.loss_r[0] - curve.loss_r.min()))
        return 2 + int(np.argmax(gain_r[:-1] / gain_r[1:]))

    return rule


def chord(curve: Curve) -> int:
    """The point farthest below the straight line from the first to the lowest (Kneedle, Satopää 2011)."""
    low = curve.loss_r.min()
    down_r = (curve.loss_r - low) / (curve.loss_r[0] - low)
    return 1 + int(np.argmin(down_r + np.linspace(0, 1, len(down_r))))


def gap(curve: Curve) -> int:
    """The largest step between neighbouring singular values, S_r / S_(r+1), in the geometric mean over the layers."""
    largest = len(curve.loss_r)
    log_R = np.log(curve.S_PR).mean(0)
    return 1 + int(np.argmax(log_R[:largest] - log_R[1 : largest + 1]))


def gap_by_layer(curve: Curve) -> list[int]:
    """The same for each layer alone; any rank below R."""
    log_PR = np.log(curve.S_PR[:, : curve.S_PR.shape[1] * 3 // 4])  # the last ones fall off by themselves
    return (1 + np.argmax(log_PR[:, :-1] - log_PR[:, 1:], axis=1)).tolist()


RULES: dict[str, Rule] = {
    "argmin": argmin,
    "one_se": one_se,
    "share-0.02": share(0.02),
    "share-0.04": share(0.04),
    "share-0.08": share(0.08),
    "doubling-0.05": doubling(0.05),
    "knee": knee(0.01),
    "chord": chord,
    "gap": gap,
}
