"""The choice in plain words."""

import math

from rankrace.select.objective import Point, Verdict
from rankrace.select.strategy import Look

CLEARLY_SMALLER = 3 / 4
"""Next-door integers differ by less than any validation set resolves; a rank this much smaller is compared."""
LEAST_CLUSTERS = 20
"""With fewer, two standard errors are far from 95%: 62% with 2 clusters, 80% with 4, 88% with 8."""

HOW = "; measured on "
"""What stands before it is the choice, and what stands behind it how it came about."""


def reason(look: Look, *, share: float, examples: int) -> str:
    """One sentence: which rank, against what, how sure. Losses in nats per target.

    Args:
        share: of the training that was done.
        examples: held-out examples that were measured.
    """
    v = look.verdict
    pick, best = v.at(v.pick), v.at(v.best)
    if v.by_heart:
        words = f"no rank lowered the validation loss, so the smallest, {pick.rank}, was taken"
    elif pick.rank == best.rank:
        what = "loss plus penalty" if any(p.penalty for p in v.points) else "validation loss"
        words = f"rank {pick.rank} has the lowest {what} ({best.objective:.4f} nats)"
    elif pick.objective - best.objective <= v.errors * pick.se:
        alike = like_the_pick(v)
        within = {1.0: "one standard error", 2.0: "two standard errors"}[v.errors]
        far = f"{behind(pick, best)} nats behind the best, rank {best.rank}"
        words = f"rank {pick.rank} is the smallest within {within}: {far}"
        if alike.rank != pick.rank:
            words = f"ranks {pick.rank} to {alike.rank} cannot be told apart on this validation set, and {pick.rank} "
            words += f"is the smallest: {far} (within {within})"
    else:
        words = (
            f"rank {pick.rank} is {behind(pick, best)} nats behind the best, rank {best.rank}, "
            f"{100 * (pick.objective - best.objective) / v.bought:.2g}% of the {v.bought:.4f} that rank buys, "
            "and no smaller one loses as little"
        )
    below = below_pick(v)
    if below is not None and not v.by_heart:
        words += f"; rank {below.rank} is {behind(below, best)} behind"
    if v.gain <= 0 and not v.by_heart:  # a training at its full rate may be behind its start, and end far ahead of it
        words = f"no rank has lowered the validation loss yet; {words}"
    measured = "1 held-out example" if examples == 1 else f"{examples} held-out examples"
    return f"{words}{HOW}{measured} after {100 * share:.3g}% of the training: {look.reason}."


def behind(point: Point, best: Point) -> str:
    """By how much a point's objective is above the best one, with the error where it is known."""
    difference = f"{point.objective - best.objective:.4f}"
    return f"{difference} ± {point.se:.4f}" if math.isfinite(point.se) else f"{difference} (error unknown)"


def is_confident(look: Look) -> bool:
    """The pick is settled and well inside the range, and a clearly smaller rank is measurably worse.

    Measurably: by two paired standard errors, estimated from enough independent examples, and by twice the difference
    that chance makes between two trainings, where that was asked for.
    """
    v = look.verdict
    below, largest = below_pick(v), v.alive[-1].rank
    settled = not look.capped and look.edge is None and v.pick <= CLEARLY_SMALLER * largest
    if below is None or not settled or v.clusters < LEAST_CLUSTERS or v.gain <= 0:
        return False
    ahead = below.objective - v.at(v.best).objective
    # A twin that diverged says nothing, so that nothing is sure.
    return ahead >= 2 * below.se and (look.chance is None or ahead >= 2 * look.chance)


def like_the_pick(verdict: Verdict) -> Point:
    """The largest rank up to which all measured ones from the pick on are within the rule's standard errors of the
    best."""
    best, like = verdict.at(verdict.best), verdict.at(verdict.pick)
    for point in verdict.alive:
        if point.rank > like.rank:
            if point.objective - best.objective > verdict.errors * point.se:
                break
            like = point
    return like


def below_pick(verdict: Verdict) -> Point | None:
    """The largest measured rank that is clearly smaller than the pick."""
    smaller = [p for p in verdict.alive if p.rank <= CLEARLY_SMALLER * verdict.pick]
    return smaller[-1] if smaller else None
