"""What a strategy is: when to look, what to measure, what to do next.

A strategy keeps no state of its own. What it decides follows from the looks so far and from what it measures
now, so a run that was killed and resumed decides the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rankrace.select.objective import Held, Trial, Verdict


@dataclass(frozen=True, kw_only=True)
class Train:
    """Go on with the candidates as they are."""

    kind: Literal["train"] = "train"


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Drop all candidates but these (indices into the present ones); they go on undisturbed."""

    indices: tuple[int, ...]
    kind: Literal["keep"] = "keep"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Replace all candidates by the truncations of one of them to these ranks."""

    index: int
    ranks: tuple[int, ...]
    kind: Literal["cut"] = "cut"


Action = Train | Keep | Cut


@dataclass(frozen=True, kw_only=True)
class Look:
    """One measurement of the candidates and what followed from it."""

    step: int
    verdict: Verdict
    action: Action
    final: bool = False
    """The rank is decided; what follows is plain training."""
    edge: Literal["low", "high"] | None = None
    """The pick is the smallest or largest rank that was allowed: the optimum may lie outside."""
    capped: bool = False
    """Decided because the search's time was up, not because the pick was stable."""
    reason: str = ""


class Bench(Protocol):
    """The held-out examples and the present candidates, for a strategy to measure with."""

    held: Held
    ranks: tuple[int, ...]
    """Of the present candidates."""

    def direct(self) -> list[Trial]:
        """Each present candidate as it is."""
        ...

    def truncated(self, index: int, ranks: Sequence[int]) -> list[Trial]:
        """The best approximations of one candidate's update at these ranks."""
        ...


class Strategy(Protocol):
    """Abstract; each concrete strategy is one file and overrides nothing."""

    name: str

    def start(self) -> tuple[int, ...]:
        """The ranks of the candidates that begin the run."""
        ...

    def next_look(self, looks: Sequence[Look]) -> int | None:
        """The step after which to look next; None once the rank is decided."""
        ...

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        """Measures and decides."""
        ...


def refined(verdict: Verdict, trials: list[Trial], index: int, bench: Bench, judge: "Judge") -> Verdict:
    """Bisects the integers between the pick and the next smaller rank on the curve, by truncation.

    The truncated loss falls with the rank, so the smallest rank that is still good enough is found in log2 of
    the gap. A probe that is not picked bounds the search from below.
    """
    low = max((p.rank for p in verdict.points if p.rank < verdict.pick), default=0)
    while verdict.pick - low > 1:
        middle = (low + verdict.pick) // 2
        trials += bench.truncated(index, [middle])
        verdict = judge(trials)
        if verdict.pick > middle:
            low = middle
    return verdict


class Judge(Protocol):
    def __call__(self, trials: Sequence[Trial]) -> Verdict: ...
