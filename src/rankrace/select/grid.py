"""grid: the paper, literally. The ranks train side by side; early on the objective picks; the winner goes on.

Kept for faithful reproduction. Small ranks start faster whatever their end, so a look before some 15% of the
training favours them (docs/selection.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rankrace.select.objective import Objective
from rankrace.select.strategy import Bench, Cut, Keep, Look, Start, conclude, holder


@dataclass(frozen=True, kw_only=True)
class Grid:
    ranks: tuple[int, ...]
    look_step: int
    refine: bool
    objective: Objective
    name: str = "grid"
    averages: bool = False

    def start(self) -> tuple[Start, ...]:
        return tuple(Start(rank=r) for r in self.ranks)

    def next_look(self, looks: Sequence[Look]) -> int | None:
        return None if looks else self.look_step

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        verdict = conclude(bench.direct(), bench, self.objective, refine=self.refine)
        pick, source = verdict.pick, holder(bench.ranks, verdict.pick)
        # A candidate that was picked goes on undisturbed; a rank between two is cut from the larger.
        trained = verdict.at(pick).source == "direct"
        listed = ", ".join(map(str, bench.ranks))
        reason = (
            f"ranks {listed} were compared side by side" if len(bench.ranks) > 1 else f"{listed} was the only rank"
        )
        if not trained:
            reason += f", and {pick} was cut from {bench.ranks[source]}"
        return Look(
            step=step,
            verdict=verdict,
            action=Keep(indices=(source,)) if trained else Cut(index=source, ranks=(pick,)),
            final=True,
            edge=verdict.edge,
            reason=reason,
        )
