"""The choice in plain words."""

import math

from rankrace.select.objective import Point, Verdict
from rankrace.select.strategy import Look


def reason(look: Look, *, share: float, examples: int) -> str:
    """One sentence: which rank, against what, how sure."""
    v = look.verdict
    pick, best = v.at(v.pick), v.at(v.best)
    if v.gain <= 0:
        words = f"no rank lowered the validation loss, so the smallest, {pick.rank}, was taken"
    elif pick.rank == best.rank:
        words = f"rank {pick.rank} has the lowest objective ({best.objective:.4f} nats per token)"
    else:
        behind = pick.objective - best.objective
        words = (
            f"rank {pick.rank} is the smallest that cannot be told from the best, rank {best.rank}: "
            f"{behind:.4f} nats per token behind, with a paired standard error of {pick.se:.4f}"
        )
    below = below_pick(v)
    if below is not None and v.gain > 0:
        words += f"; rank {below.rank} is {below.objective - best.objective:.4f} ± {below.se:.4f} behind"
    return (
        f"{words}; measured on {examples} held-out examples after {share:.0%} of the training: {look.reason}."
    )


def is_confident(look: Look) -> bool:
    """The pick is settled, inside the range, and the next smaller rank is worse by two paired standard errors."""
    below = below_pick(look.verdict)
    if look.capped or look.edge == "high" or below is None:
        return not look.capped and look.edge is None
    behind = below.objective - look.verdict.at(look.verdict.best).objective
    return math.isfinite(below.se) and behind >= 2 * below.se


def below_pick(verdict: Verdict) -> Point | None:
    """The next smaller rank on the curve."""
    smaller = [p for p in verdict.points if p.rank < verdict.pick and p.alive]
    return smaller[-1] if smaller else None
