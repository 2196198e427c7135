"""shrink: train one wide candidate, read the loss at every rank off its singular values, cut it to the pick.

Comparing small ranks with large ones directly is misleading early on: small ones start faster, whatever their
end (docs/selection.md). The best rank-r approximation of one wide update does not have that bias: all points of
the curve come from the same training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rankrace.select.objective import Objective
from rankrace.select.statistics import clearly, paired_difference
from rankrace.select.strategy import WAITED, Bench, Cut, Look, Start, Train, conclude, later_step

STABLE_LOOKS = 3
STABLE_RATIO = 1.33
PLANS = ((0.10, 0.15, 0.20, 0.25, 0.30), (0.10, 0.20, 0.30), (0.20,))
"""When to look, as shares of the training; at the last look the choice is made, stable or not, if ranks can be told
apart (else at LATER). A short training affords fewer looks: each is to measure enough examples for a choice."""


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """Args:
    wide: the rank that starts.
    largest: the largest rank that may be picked, below `wide`: near it a truncation loses nothing by
        construction, so the curve says little there.
    fractions: one of PLANS.
    layers: compare the pick with ranks of their own for the layers, of as many parameters in all.
    """

    total_steps: int
    wide: int
    largest: int
    refine: bool
    objective: Objective
    fractions: tuple[float, ...] = PLANS[0]
    layers: bool = False
    name: str = "shrink"
    averages: bool = False

    def start(self) -> tuple[Start, ...]:
        return (Start(rank=self.wide),)

    @property
    def look_steps(self) -> list[int]:
        return sorted({max(1, round(f * self.total_steps)) for f in self.fractions})

    def next_look(self, looks: Sequence[Look]) -> int | None:
        if looks and looks[-1].final:
            return None
        if self.settled([look.verdict.pick for look in looks]):
            return later_step(self.total_steps)
        return self.look_steps[len(looks)]

    def settled(self, picks: Sequence[int]) -> bool:
        """Whether it is time to choose: the last looks agree, or the plan is over."""
        return stable(picks) or len(picks) >= len(self.look_steps)

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        measured = ladder(self.largest)
        trials = bench.truncated(0, measured)
        verdict = self.objective.judge(trials, bench.held)
        picks = [*(look.verdict.pick for look in looks), verdict.pick]
        waited = step >= later_step(self.total_steps)
        if not (waited or (self.settled(picks) and (verdict.rank_counts or len(measured) == 1))):
            return Look(step=step, verdict=verdict, action=Train())
        verdict = conclude(trials, bench, self.objective, refine=self.refine)
        recent = picks[-STABLE_LOOKS:]
        seen = ", ".join(map(str, recent))
        reason = f"the last {len(recent)} looks" if len(recent) > 1 else "the only look"
        reason += f" picked {seen} among {', '.join(map(str, measured))}"
        if self.refine:
            reason += f", and then, of the integers beside, {verdict.pick}"
        if waited and looks:
            reason += f"; {WAITED}"
        allocation = None
        if self.layers:
            allocation, words = layered(bench, verdict.pick)
            reason += words
        return Look(
            step=step,
            verdict=verdict,
            action=Cut(index=0, ranks=(verdict.pick,), allocation=allocation),
            final=True,
            edge=verdict.edge,
            # A plan too short to ask for a stable pick was not cut short, nor one that waited.
            capped=not stable(picks) and not waited and len(self.look_steps) >= STABLE_LOOKS,
            reason=reason,
        )


def stable(picks: Sequence[int]) -> bool:
    """Whether the last few agree."""
    last = picks[-STABLE_LOOKS:]
    return len(last) == STABLE_LOOKS and max(last) <= STABLE_RATIO * min(last)


def ladder(largest: int) -> list[int]:
    """The ranks that a look measures: 1, 2, 4, … and the largest that may be picked."""
    return sorted({*(2**i for i in range(largest.bit_length())), largest})


def layered(bench: Bench, rank: int) -> tuple[dict[str, int] | None, str]:
    """Ranks of their own for the layers, if they are clearly better than this rank for all; and that in words."""
    (uniform,) = bench.truncated(0, [rank])
    pooled, allocation = bench.pooled(0, rank)
    held = bench.held
    gain, se = paired_difference(uniform.loss_N, pooled.loss_N, held.tokens_N, held.cluster_N)
    spread = f"from {min(allocation.values())} to {max(allocation.values())} by layer"
    if any(allocation.values()) and clearly(gain, se, held.clusters):
        return allocation, f"; ranks {spread} are better by {gain:.4f} ± {se:.4f} nats and were taken"
    error = f"± {se:.4f} nats" if math.isfinite(se) else "nats, error unknown"
    return None, f"; ranks {spread} are not clearly better ({gain:.4f} {error})"
