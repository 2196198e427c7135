"""race: cut one wide candidate to several ranks, let them heal side by side, drop the worst, keep the winner.

All start from the same update, so that none is ahead for being small; what a cut takes away that can be learnt again
is learnt again before it counts. Dearer than `shrink`, which takes the cut itself for the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rankrace.select.objective import Edge, Objective, Verdict
from rankrace.select.statistics import clearly
from rankrace.select.strategy import (
    WAITED,
    Action,
    Bench,
    Cut,
    Keep,
    Look,
    Start,
    Train,
    conclude,
    holder,
    later_step,
)

PROBE = 0.10
"""The wide candidate's part of the training."""
HEATS = (0.02, 0.05, 0.10)
"""When the ranks are compared, after the probe; at the last one the choice is made."""
MOST = 4
"""Ranks in the race."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """Args:
    wide: the rank that starts.
    ranks: what may be picked, by rising rank, below `wide`; with `refine` the integers between too.
    probe_share: of the training; after it the wide candidate is first probed.
    """

    total_steps: int
    wide: int
    ranks: tuple[int, ...]
    refine: bool
    objective: Objective
    probe_share: float = PROBE
    name: str = "race"
    averages: bool = False

    def start(self) -> tuple[Start, ...]:
        return (Start(rank=self.wide),)

    @property
    def probe_step(self) -> int:
        return max(1, round(self.probe_share * self.total_steps))

    def heat_steps(self, probed: int) -> list[int]:
        """After a probe, at least a step apart."""
        steps = [probed]
        for heat in HEATS:
            steps.append(max(probed + round(heat * self.total_steps), steps[-1] + 1))
        return [s for s in steps[1:] if s < self.total_steps]

    def next_look(self, looks: Sequence[Look]) -> int | None:
        if looks and looks[-1].final:
            return None
        began = start_of(looks)
        if began is None:
            return later_step(self.total_steps) if looks else self.probe_step
        return self.heat_steps(looks[began].step)[len(looks) - 1 - began]

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        if start_of(looks) is None:
            return self.probe(step, bench, waited=bool(looks))
        return self.heat(step, looks, bench)

    def probe(self, step: int, bench: Bench, waited: bool) -> Look:
        """Which ranks race. A cut is the worst case of a rank: where it is good enough, no larger one is needed."""
        trials = bench.truncated(0, sorted({1, *self.ranks}))
        # Rank 1 tells what rank buys, whether or not it may be picked.
        whole = self.objective.judge(trials, bench.held)
        allowed = [t for t in trials if t.rank in self.ranks]
        verdict = self.objective.judge(allowed, bench.held, whole.bought)
        if not whole.rank_counts and len(self.ranks) > 1 and step < later_step(self.total_steps):
            return Look(step=step, verdict=verdict, action=Train())
        enough, last = verdict.pick, not self.heat_steps(step)
        racers = tuple(r for r in self.ranks if r <= enough)[-MOST:]
        if last or len(racers) == 1:
            words = (
                "a training too short for a race" if last else "even cut to it, the update loses nothing that counts"
            )
            verdict = conclude(allowed, bench, self.objective, whole.bought, refine=False)
            return Look(
                step=step,
                verdict=verdict,
                action=Cut(index=0, ranks=(enough,)),
                final=True,
                edge=edge_of(verdict, self.ranks),
                reason=f"{words}; no rank was trained beside it" + (f"; {WAITED}" if waited else ""),
            )
        return Look(step=step, verdict=verdict, action=Cut(index=0, ranks=racers))

    def heat(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        began = start_of(looks)
        assert began is not None
        last, before = step == self.heat_steps(looks[began].step)[-1], looks[began + 1 :]
        # What rank buys, from the first heat: later ones lack the ranks that were dropped.
        bought = before[0].verdict.bought if before else None

        # As they are: soon after a cut an average is mostly what was cut (docs/planted.md).
        trials = bench.direct()
        verdict = self.objective.judge(trials, bench.held, bought)
        pick, best = verdict.at(verdict.pick), verdict.at(verdict.best)
        staying = tuple(
            i
            for i, r in enumerate(bench.ranks)
            # One that is larger than the best so far would cost more and has given nothing.
            if (p := verdict.at(r)).alive
            and r <= best.rank
            # Not by an error that is unknown.
            and not (clearly(p.objective - best.objective, p.se, verdict.clusters) and p.objective > pick.objective)
        )
        if not last and len(staying) > 1:
            # Keeping all would be a copy for nothing, and new CUDA graphs.
            action: Action = Train() if len(staying) == len(bench.ranks) else Keep(indices=staying)
            return Look(step=step, verdict=verdict, action=action)
        raced = ", ".join(map(str, bench.ranks))
        reason = f"ranks {raced} had been cut from {self.wide} and trained on side by side"
        if began > 0:
            reason += f" ({WAITED})"
        verdict = conclude(trials, bench, self.objective, bought, refine=self.refine)
        source = holder(bench.ranks, verdict.pick)
        trained = verdict.at(verdict.pick).source == "direct"
        if not trained:
            reason += f", and {verdict.pick} was cut from {bench.ranks[source]}"
        return Look(
            step=step,
            verdict=verdict,
            action=Keep(indices=(source,)) if trained else Cut(index=source, ranks=(verdict.pick,)),
            final=True,
            edge=edge_of(verdict, self.ranks),
            reason=reason,
        )


def start_of(looks: Sequence[Look]) -> int | None:
    """Which look cut the wide candidate; None while there was none, but probes that said nothing."""
    return next((i for i, look in enumerate(looks) if isinstance(look.action, Cut)), None)


def edge_of(verdict: Verdict, ranks: Sequence[int]) -> Edge:
    """Whether the pick is the smallest or largest rank that could have been picked; refinement may go below all."""
    if verdict.pick <= ranks[0]:
        return "low" if verdict.pick == verdict.alive[0].rank else None
    return "high" if verdict.pick >= ranks[-1] else None
