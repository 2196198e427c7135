"""The choice in plain words."""

import math

from rankrace.select.objective import CLEARLY_SMALLER, Point, Verdict
from rankrace.select.statistics import LEAST_CLUSTERS, clearly
from rankrace.select.strategy import Look
from rankrace.words import counted

WIDE = 2
"""A choice that other examples would have made more than so many times larger or smaller is not sure."""

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
    if v.smaller is not None and not v.by_heart:
        words += f"; rank {v.smaller.rank} is {behind(v.at(v.smaller.rank), best)} behind"
    if v.gain <= 0 and not v.by_heart:  # a training at its full rate may be behind its start, and end far ahead of it
        words = f"no rank has lowered the validation loss yet; {words}"
    measured = counted(examples, "held-out example")
    return f"{words}{HOW}{measured} after {100 * share:.3g}% of the training: {look.reason}."


def behind(point: Point, best: Point) -> str:
    """By how much a point's objective is above the best one, with the error where it is known."""
    return with_error(point.objective - best.objective, point.se)


def with_error(difference: float, se: float) -> str:
    return f"{difference:.4f} ± {se:.4f}" if math.isfinite(se) else f"{difference:.4f} (error unknown)"


def doubt(look: Look) -> str | None:
    """Why the choice is not sure; None where it is.

    It is where the pick is settled and well inside the range, and the next clearly smaller rank is measurably worse
    than the pick itself: in pairs, with 95% confidence from enough independent examples, and by twice the difference
    that chance makes between two trainings, where that was asked for. (That a smaller rank is behind the *best* is
    how the rule passed it over, and shows nothing more.) And where other examples would have led to about the same:
    early errors are small, since all ranks are cut from one training, and the lowest point may yet be anywhere.
    """
    v = look.verdict
    below, largest = v.smaller, v.alive[-1].rank
    if look.capped:
        return "the choice had not settled when it was made"
    if v.gain <= 0:
        return "no rank has lowered the validation loss"
    if v.pick == 1:
        return "there is no smaller rank than 1 to hold it against"
    if look.edge is not None:
        return "it is at the edge of the ranks there were to choose"
    if v.pick > CLEARLY_SMALLER * largest:
        return f"it is hardly smaller than {largest}, the largest rank there was to choose"
    if below is None:
        return "no clearly smaller rank was measured"
    if v.clusters < LEAST_CLUSTERS:
        groups = counted(v.clusters, "independent group")
        return f"its errors come from {groups} of examples, and {LEAST_CLUSTERS} are wanted"
    far = f"rank {below.rank} is {with_error(below.behind, below.se)} nats behind it"
    if not clearly(below.behind, below.se, v.clusters):
        return f"{far}, which the paired errors do not tell from nothing"
    # A twin that diverged says nothing, so that nothing is sure.
    if look.chance is not None and not below.behind >= 2 * look.chance:
        return f"{far}, and two equal trainings differ by {look.chance:.4f}"
    if v.interval is not None and v.interval[1] > WIDE * v.interval[0]:
        low, high = v.interval
        return f"other examples may lead to other ranks, {low} to {high} in 95% of bootstrap samples"
    return None


def is_confident(look: Look) -> bool:
    return doubt(look) is None


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
