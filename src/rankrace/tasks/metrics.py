"""Metrics over classes and numbers that are never NaN: where the formula divides by zero they are 0."""

from collections.abc import Sequence

import numpy as np


def accuracy(predicted: Sequence[str], right: Sequence[str]) -> float:
    """The share of equal pairs."""
    return sum(p == r for p, r in zip(predicted, right, strict=True)) / len(right)


def f1(predicted: Sequence[str], right: Sequence[str], positive: str) -> float:
    """2·TP / (2·TP + FP + FN) of one class."""
    both = sum(p == r == positive for p, r in zip(predicted, right, strict=True))
    either = sum(p == positive for p in predicted) + sum(r == positive for r in right)
    return 2 * both / either if either else 0.0


def matthews(predicted: Sequence[str], right: Sequence[str], positive: str) -> float:
    """Matthews' correlation of two classes, the positive one and all else: -1 to 1."""
    return pearson([float(p == positive) for p in predicted], [float(r == positive) for r in right])


def pearson(predicted: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation, 0 where one side is constant. Of two classes as 0 and 1 it is Matthews'."""
    x, y = (np.asarray(side, dtype=np.float64) for side in (predicted, right))
    if np.ptp(x) == 0 or np.ptp(y) == 0:  # the mean of equal numbers may be off by a rounding
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(predicted: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(right))


def _ranks(values: Sequence[float]) -> list[float]:
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2)[place]).tolist()
