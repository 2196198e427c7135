"""How the tables of the rank study are written."""

from collections.abc import Sequence

import numpy as np

from benchmarks.selection_records import Unit


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def named(unit: Unit) -> str:
    return f"{unit[0]}, seed {unit[1]}"


def mean(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Of each column, over what is known of it."""
    known = np.isfinite(rows)
    counts = np.maximum(known.sum(0), 1)
    return np.where(known.any(0), np.where(known, rows, 0.0).sum(0) / counts, np.nan)


def nats(x: float, sign: str = "") -> str:
    return "" if np.isnan(x) else f"{x:{sign}.4f}"


def percent(share: float) -> str:
    return f"{100 * share:g}%"


def with_error(d: float, se: float) -> str:
    """A difference and its paired standard error."""
    return f"{d:+.4f} ± {se:.4f}"
