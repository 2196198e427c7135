"""Words that many sentences are made of."""

from collections.abc import Sequence

MOST_LISTED = 12


def counted(n: int, thing: str) -> str:
    """1 row, 2 rows."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def listed(names: Sequence[str]) -> str:
    """All of them, or the first dozen of more."""
    shown = ", ".join(names[:MOST_LISTED])
    return shown if len(names) <= MOST_LISTED else f"{shown}, … ({len(names):,} in all)"
