"""The strategies under study, by name: those of rankrace, and experimental rules that only live here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.planted.rules import RULES, Curve, Rule
from benchmarks.planted.teacher import LARGEST, WIDE
from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.select.build import make_strategy, penalty_of
from rankrace.select.objective import Objective, log2_penalty
from rankrace.select.shrink import PLANS, Shrink
from rankrace.select.strategy import Bench, Cut, Look, Start, Strategy, Train

GRID = (2, 4, 8, 16)
ONE_SE = Objective(penalty=log2_penalty(0.0), rule="one_se")
DEFAULTS = RunConfig(model="planted", data="planted", ranks=GRID)
"""What users get, but that the largest rank is LARGEST, so that the wide one is WIDE."""
ALL_RANKS = tuple(range(1, LARGEST + 1))
WATCHED = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
CUT_AT = 0.2
HEALED = (1, 2, 3, 4, 6, 8, 10, 12, 16)
HEATS = (0.1, 0.12, 0.15, 0.2, 0.3)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a strategy may be built from."""

    total: int
    bank: Bank
    """For rules that read singular values."""
    planted_rank: int
    """For the oracle alone."""

    def step(self, share: float) -> int:
        return max(1, round(share * self.total))


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Chooses nothing: the wide candidate trains to the end, and the whole truncation curve is written down.

    Any rule that reads the curve or the singular values can be tried on these records afterwards.
    """

    steps: tuple[int, ...]
    name: str = "watch"
    averages: bool = False

    def start(self) -> tuple[Start, ...]:
        return (Start(rank=WIDE),)

    def next_look(self, looks: Sequence[Look]) -> int | None:
        return self.steps[len(looks)] if len(looks) < len(self.steps) else None

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        verdict = ONE_SE.judge(bench.truncated(0, ALL_RANKS), bench.held)
        return Look(step=step, verdict=verdict, action=Train(), reason="written down")


@dataclass(frozen=True, kw_only=True)
class Read:
    """One look at the whole truncation curve and the singular values; a rule reads the rank off them."""

    at: int
    rule: Rule
    bank: Bank
    name: str
    averages: bool = False

    def start(self) -> tuple[Start, ...]:
        return (Start(rank=WIDE),)

    def next_look(self, looks: Sequence[Look]) -> int | None:
        return None if looks else self.at

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        verdict = ONE_SE.judge(bench.truncated(0, ALL_RANKS), bench.held)
        curve = Curve(
            loss_r=np.array([p.loss for p in verdict.points]),
            se_r=np.array([p.se for p in verdict.points]),
            S_PR=np.array([one.S_R.tolist() for one in self.bank.candidates.spectra(0).values()]),
        )
        verdict = replace(verdict, pick=self.rule(curve))
        action = Cut(index=0, ranks=(verdict.pick,))
        return Look(step=step, verdict=verdict, action=action, final=True, edge=verdict.edge, reason=self.name)


@dataclass(frozen=True, kw_only=True)
class CutTo:
    """One cut of the wide candidate to given ranks, all of which then train on to the end."""

    at: int
    ranks: tuple[int, ...]
    name: str
    averages: bool = False

    def start(self) -> tuple[Start, ...]:
        return (Start(rank=WIDE),)

    def next_look(self, looks: Sequence[Look]) -> int | None:
        return None if looks else self.at

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        verdict = ONE_SE.judge(bench.truncated(0, self.ranks), bench.held)
        return Look(step=step, verdict=verdict, action=Cut(index=0, ranks=self.ranks), final=True, reason="given")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All ranks from the start to the end, side by side: the truth of the direct comparison."""

    ranks: tuple[int, ...]
    total: int
    name: str = "sweep"
    averages: bool = False

    def start(self) -> tuple[Start, ...]:
        return tuple(Start(rank=r) for r in self.ranks)

    def next_look(self, looks: Sequence[Look]) -> int | None:
        return None if looks else self.total

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        verdict = ONE_SE.judge(bench.direct(), bench.held)
        return Look(step=step, verdict=verdict, action=Train(), final=True, reason="written down at the end")


@dataclass(frozen=True, kw_only=True)
class Heats:
    """Chooses nothing: the wide candidate is cut to given ranks, and their averages are written down as they heal.

    What a race would see in which nobody is dropped and no rank is missing.
    """

    steps: tuple[int, ...]
    """The cut, then the looks."""
    ranks: tuple[int, ...]
    name: str = "heats"
    averages: bool = True

    def start(self) -> tuple[Start, ...]:
        return (Start(rank=WIDE),)

    def next_look(self, looks: Sequence[Look]) -> int | None:
        return self.steps[len(looks)] if len(looks) < len(self.steps) else None

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        trials = bench.averaged() if looks else bench.truncated(0, self.ranks)
        action = Train() if looks else Cut(index=0, ranks=self.ranks)
        return Look(step=step, verdict=ONE_SE.judge(trials, bench.held), action=action, reason="written down")


def users(setup: Setup, **options: str) -> Strategy:
    """What these options of the command line give, with all the looks of a long training."""
    config = RunConfig.model_validate({**DEFAULTS.model_dump(), **options})
    return make_strategy(config, setup.total, setup.bank, PLANS[0], penalty_of(config, setup.bank))


def shrink(setup: Setup, objective: Objective) -> Strategy:
    return Shrink(total_steps=setup.total, wide=WIDE, largest=LARGEST, refine=True, objective=objective)


def read(name: str, share: float) -> Callable[[Setup], Strategy]:
    return lambda s: Read(at=s.step(share), rule=RULES[name], bank=s.bank, name=f"{name}@{share:g}")


STRATEGIES: dict[str, Callable[[Setup], Strategy]] = {
    "shrink": users,
    "shrink-one-se": lambda s: shrink(s, ONE_SE),
    "shrink-argmin": lambda s: users(s, rule="argmin"),
    "race": lambda s: users(s, strategy="race"),
    "grid": lambda s: users(s, strategy="grid"),
    "watch": lambda s: Watch(steps=tuple(s.step(share) for share in WATCHED)),
    "heats": lambda s: Heats(steps=tuple(s.step(share) for share in HEATS), ranks=HEALED),
    "oracle": lambda s: CutTo(at=s.step(CUT_AT), ranks=(s.planted_rank,), name="oracle"),
    "healed": lambda s: CutTo(at=s.step(CUT_AT), ranks=HEALED, name="healed"),
    "sweep": lambda s: Sweep(ranks=(1, 2, 3, 4, 6, 8, 10, 12, 16, 32), total=s.total),
    **{f"{name}@{share:g}": read(name, share) for name in RULES for share in (0.2, 0.3, 0.5)},
}
