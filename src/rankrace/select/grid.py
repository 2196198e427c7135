"""grid: the paper, literally. The ranks train side by side; early on the objective picks; the winner goes on.

Kept for faithful reproduction. Small ranks start faster whatever their end, so a look before some 15% of the
training favours them (docs/selection.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rankrace.select.objective import Objective, Trial, Verdict
from rankrace.select.strategy import Bench, Cut, Keep, Look, refined


@dataclass(frozen=True, kw_only=True)
class Grid:
    ranks: tuple[int, ...]
    look_step: int
    refine: bool
    objective: Objective
    name: str = "grid"

    def start(self) -> tuple[int, ...]:
        return self.ranks

    def next_look(self, looks: Sequence[Look]) -> int | None:
        return None if looks else self.look_step

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        def judge(trials: Sequence[Trial]) -> Verdict:
            return self.objective.judge(trials, bench.held)

        trials = bench.direct()
        verdict = judge(trials)
        winner = self.ranks.index(verdict.pick)
        if self.refine:
            verdict = refined(verdict, trials, winner, bench, judge)
        pick = verdict.pick
        on_grid = pick == self.ranks[winner]
        return Look(
            step=step,
            verdict=verdict,
            # A pick on the grid goes on undisturbed; one between grid points is cut from the next larger.
            action=Keep(indices=(winner,)) if on_grid else Cut(index=winner, ranks=(pick,)),
            final=True,
            edge="low" if pick <= min(self.ranks) else "high" if pick == max(self.ranks) else None,
            reason=f"compared side by side after {step} steps"
            + ("" if on_grid else f"; rank {pick} is the rank-{self.ranks[winner]} candidate, truncated"),
        )
