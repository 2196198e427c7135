"""What a strategy is: when to look, what to measure, what to do next.

A strategy keeps no state of its own. What it decides follows from the looks so far and from what it measures
now, so a run that was killed and resumed decides the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rankrace.select.objective import DRAWS, Edge, Held, Objective, Trial, Verdict

LATER = 0.60
"""When one wide candidate is looked at again whose ranks could not be told apart early, as a share of the training.
Such a curve says one of two things: the smallest rank is enough, or what larger ones are for has not been learnt yet.
Only the training can tell (docs/selection.md), and to go on at full width costs nothing but the look: a step takes as
long at any rank."""
WAITED = "when it was time to choose, the smallest rank was not clearly behind; so the wide candidate trained on"
"""In a reason."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A candidate that begins a run."""

    rank: int
    lr_scale: float = 1.0
    """Times the rank's own learning rate."""
    draw: int = 0
    """Of the initial factors; candidates of one draw are nested."""


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
    allocation: dict[str, int] | None = None
    """Layer → rank, where the layers of the one cut are not all alike."""
    kind: Literal["cut"] = "cut"


Action = Train | Keep | Cut


@dataclass(frozen=True, kw_only=True)
class Rated:
    """One learning rate, tried."""

    lr_scale: float
    loss: float
    """Nats per supervised token, of the average of the factors."""
    se: float
    """Of the paired difference to the best."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One measurement of the candidates and what followed from it."""

    step: int
    verdict: Verdict
    action: Action
    final: bool = False
    """The rank is decided; what follows is plain training."""
    edge: Edge = None
    """Of a final look: `Verdict.edge`."""
    capped: bool = False
    """Decided because the search's time was up, not because the pick was stable."""
    reason: str = ""
    rates: tuple[Rated, ...] = ()
    """Learning rates that were compared at this look (see `Opening`)."""
    lr_scale: float = 1.0
    """The one that the training goes on with."""
    chance: float | None = None
    """By how much two trainings differ that are alike but for the draw of their initial factors, in nats."""
    note: str = ""
    """What a person should know of it, in a sentence."""


class Bench(Protocol):
    """The held-out examples and the present candidates, for a strategy to measure with."""

    @property
    def held(self) -> Held:
        """The examples, and how often the training rows were seen by now."""
        ...

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the present candidates."""
        ...

    def direct(self) -> list[Trial]:
        """Each present candidate as it is."""
        ...

    def averaged(self) -> list[Trial]:
        """The average of each present candidate over its later steps (training/average.py)."""
        ...

    def truncated(self, index: int, ranks: Sequence[int]) -> list[Trial]:
        """The best approximations of one candidate's update at these ranks."""
        ...

    def pooled(self, index: int, rank: int) -> tuple[Trial, dict[str, int]]:
        """One candidate's update with the parameters of this rank spread over the layers, and each layer's rank."""
        ...


class Strategy(Protocol):
    """Abstract; each concrete strategy is one file and overrides nothing."""

    @property
    def name(self) -> str: ...

    @property
    def averages(self) -> bool:
        """Whether averages of the candidates that begin will be asked for, if they are several."""
        ...

    def start(self) -> tuple[Start, ...]:
        """The candidates that begin the run."""
        ...

    def next_look(self, looks: Sequence[Look]) -> int | None:
        """The step after which to look next; None once the rank is decided."""
        ...

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        """Measures and decides."""
        ...


def later_step(total_steps: int) -> int:
    """LATER in steps."""
    return max(1, round(LATER * total_steps))


def conclude(
    trials: Sequence[Trial], bench: Bench, objective: Objective, bought: float | None = None, *, refine: bool
) -> Verdict:
    """The last verdict, with bootstrap samples: how else the choice might have come out.

    Args:
        refine: halve the gaps beside the pick first, by truncation, until the integers next to it are measured too.
            Where the loss falls with the rank this ends on the smallest integer that the rule accepts, and where the
            objective has one valley, on its lowest point: log2 of the gap in measurements. A noisy curve need not be
            so tidy; then the end is one such rank, accepted while its measured neighbours are not better, and a rank
            that was never measured might have done as well.
    """
    while refine and (middle := next_probe(objective.judge(trials, bench.held, bought))) is not None:
        trials = [*trials, *bench.truncated(holder(bench.ranks, middle), [middle])]
    return objective.judge(trials, bench.held, bought, draws=DRAWS)


def next_probe(verdict: Verdict) -> int | None:
    """The middle of the wider gap beside the pick; None where its neighbours are measured.

    The gap above counts only if the pick is the best itself: otherwise it was taken for being small.
    """
    ranks, pick = [p.rank for p in verdict.points], verdict.pick
    low = max((r for r in ranks if r < pick), default=0)
    high = min((r for r in ranks if r > pick), default=pick) if pick == verdict.best else pick
    if pick - low >= max(2, high - pick):
        return (low + pick) // 2
    return (pick + high) // 2 if high - pick > 1 else None


def holder(ranks: Sequence[int], rank: int) -> int:
    """The candidate to cut `rank` from: the smallest one that is large enough."""
    return min((r, index) for index, r in enumerate(ranks) if r >= rank)[1]
