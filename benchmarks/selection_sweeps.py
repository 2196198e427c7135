"""The tables of the sweeps: what rank and learning rate are worth, and whether an early look tells.

Shapes: K arms of one training (ranks × learning rates).
"""

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.selection_markdown import mean, named, nats, percent, table, with_error
from benchmarks.selection_records import Curve, Look, Sweep
from benchmarks.selection_statistics import (
    LARGEST,
    best_arms,
    clearly_better,
    correlation,
    default_pick,
    lowest,
    regret,
)
from rankrace.select.build import SHARES
from rankrace.select.statistics import paired_difference

SHARE = SHARES["balanced"]


# --- (a) the truth


def final_losses(sweeps: Sequence[Sweep]) -> None:
    """Every rank with its best learning rate."""
    print("### The end: loss on fresh examples; each rank at its best learning rate (×), less r = 16 at its own\n")
    ranks = sorted({r for s in sweeps for r in s.ranks})
    rows = []
    for s in sweeps:
        arms = best_arms(s)
        base, cells = arms[16], []
        for r in ranks:
            if r not in arms:
                cells.append("diverged")
                continue
            rate = f" (×{s.rates[arms[r]]:g})"
            cells.append(f"{s.loss_K[base]:.4f}{rate}" if r == 16 else between(s, arms[r], base) + rate)
        rows.append([named(s.unit), *cells])
    table(["task", *(f"r = {r}" for r in ranks)], rows)


def rate_losses(sweeps: Sequence[Sweep]) -> None:
    """What rank buys at each learning rate."""
    print("### Rank and learning rate: loss on fresh examples at the end\n")
    ranks = sorted({r for s in sweeps for r in s.ranks})
    rows = []
    for s in sweeps:
        for x in sorted(set(s.rates)):
            at = {s.ranks[i]: i for i in s.at(x)}
            cells = [f"{s.loss_K[at[r]]:.4f}" if r in at else "" for r in ranks]
            rows.append([f"{named(s.unit)}, ×{x:g}", *cells, between(s, at[64], at[1])])
    table(["task", *(f"r = {r}" for r in ranks), "64 less 1"], rows)


def between(sweep: Sweep, a: int, b: int) -> str:
    """The difference between two arms at the end and its paired error."""
    assert sweep.loss_KN is not None
    assert sweep.fresh is not None
    d, se = paired_difference(sweep.loss_KN[a], sweep.loss_KN[b], sweep.fresh.tokens_N, sweep.fresh.cluster_N)
    return with_error(d, se)


# --- (b) early against final


def shown(look: Look, how: str, rate: float, at: Sequence[int]) -> Curve | None:
    """What a look says of the arms of one learning rate, from the smallest rank; None if it did not measure that."""
    match how:
        case "direct":
            return look.direct.only(at)
        case "averaged":
            return None if look.averaged is None else look.averaged.only(at)
        case _:
            return look.truncated.get(rate)


def curves_of(sweep: Sweep, how: str, rate: float) -> list[Curve]:
    """Of all looks; none where they did not measure that."""
    at = sweep.at(rate)
    return [c for look in sweep.looks if (c := shown(look, how, rate, at)) is not None]


def orders(sweep: Sweep, curves: Sequence[Curve], rate: float) -> list[float]:
    """Rank correlation of each curve with the end."""
    end_K = sweep.loss_K[sweep.at(rate)]
    return [correlation(c.loss_K, end_K[: len(c.loss_K)]) for c in curves]


def by_default(curve: Curve) -> int | None:
    return default_pick(curve, SHARE)


METHODS: dict[str, tuple[str, Callable[[Curve], int | None]]] = {
    "direct, lowest": ("direct", lambda curve: lowest(curve.loss_K)),
    "direct, default rule": ("direct", by_default),
    "averaged, default rule": ("averaged", by_default),
    "truncated, default rule": ("truncated", by_default),
}
"""How it is measured, and which of the ranks up to LARGEST is taken."""
PICKED = ("direct, lowest", "truncated, default rule")


def early_looks(sweeps: Sequence[Sweep], rate_of: Callable[[Sweep], float], title: str) -> None:
    """Means over all trainings; the correlations by task; each training's picks."""
    print(f"### Early against final, {title}\n")
    shares = [look.share for look in sweeps[0].looks]
    trainings = []
    for s in sweeps:
        rate = rate_of(s)
        at = s.at(rate)
        small = [i for i, k in enumerate(at) if s.ranks[k] <= LARGEST]
        trainings.append((s, rate, at, small, s.loss_K[at]))
    means, by_task = [], []
    for name, (how, pick) in METHODS.items():
        of_task: dict[str, list[list[float]]] = {}
        regrets = []
        for s, rate, _, small, end_K in trainings:
            curves = curves_of(s, how, rate)
            if not curves:
                continue
            of_task.setdefault(s.unit[0], []).append(orders(s, curves, rate))
            regrets.append([regret(pick(c.only(small)), end_K) for c in curves])
        if not regrets:
            continue
        if name in PICKED or how == "averaged":
            each = [order for some in of_task.values() for order in some]
            means.append([f"rank correlation, {how} ({len(each)})", *(f"{x:+.2f}" for x in mean(each))])
            for task, some in sorted(of_task.items()):
                label = f"{task}, {how} ({len(some)})"
                by_task.append([label, *(f"{x:+.2f}" for x in mean(some))])
        means.append([f"regret, {name}", *map(nats, mean(regrets))])
    side_by_side = (1 + (len(set(sweeps[0].ranks)) - 1) * share for share in shares)
    means.append(["trainings paid, side by side", *(f"{x:.2f}" for x in side_by_side)])
    means.append(["trainings paid, truncated", *("1.00" for _ in shares)])
    table(["mean of all trainings", *map(percent, shares)], means)
    always: dict[int, list[float]] = {}
    for s, _, at, _, end_K in trainings:
        for i, k in enumerate(at):
            always.setdefault(s.ranks[k], []).append(regret(i, end_K))
    heads = ["without a look, always", *(f"r = {r}" for r in sorted(always))]
    table(heads, [["regret", *(nats(float(np.mean(x))) for _, x in sorted(always.items()))]])
    print("Rank correlation by task:\n")
    table(["", *map(percent, shares)], by_task)
    for name in PICKED:
        how, pick = METHODS[name]
        rows = []
        for s, rate, at, small, end_K in trainings:
            cells = []
            for look in s.looks:
                curve = shown(look, how, rate, at)
                chosen = None if curve is None else pick(curve.only(small))
                cells.append("" if chosen is None else f"{s.ranks[at[chosen]]} ({regret(chosen, end_K):.4f})")
            rows.append([f"{named(s.unit)}, ×{rate:g}", *cells, str(s.ranks[at[int(np.nanargmin(end_K))]])])
        print(f"{name[0].upper()}{name[1:]}: picks (regret):\n")
        table(["task", *map(percent, shares), "lowest at the end"], rows)


# --- (c) learning rates


SPOILT = "scitldr"
"""The task whose loss at raised rates, when rows come back the third time, outweighs all others in a mean."""


RateNamed = Callable[[Curve, int, Sequence[float], float], int | None]
"""(the rates of one rank, which was given, their scales, passes over the rows) → which is named."""


def lowest_rate(curve: Curve, given: int, scales: Sequence[float], passes: float) -> int | None:
    return lowest(curve.loss_K)


RATE_WAYS: dict[str, tuple[str, RateNamed]] = {
    "the values as they are": ("direct", lowest_rate),
    "their average": ("averaged", lowest_rate),
    "their average, as --lr-scales does": ("averaged", clearly_better),
}
"""How it is measured, and which of the rates is taken."""


def learning_rates(sweeps: Sequence[Sweep]) -> None:
    """Which multiple a look names for one rank."""
    print("### Learning rates: the multiple that a look names for r = 64, and its regret at the end\n")
    shares = [look.share for look in sweeps[0].looks]
    for words, (how, name) in RATE_WAYS.items():
        rows, found = [], []
        for s in sweeps:
            for rank in dict.fromkeys(s.ranks):
                at = [i for i, r in enumerate(s.ranks) if r == rank]
                scales = [s.rates[i] for i in at]
                given = scales.index(1.0)
                missed, cells = [], []
                for look in s.looks:
                    curve = shown(look, how, 1.0, at)
                    chosen = None if curve is None else name(curve, given, scales, s.passes)
                    missed.append(regret(chosen, s.loss_K[at]))
                    cells.append("" if chosen is None else f"{scales[chosen]:g} ({missed[-1]:.4f})")
                missed.append(regret(given, s.loss_K[at]))
                found.append((s.unit[0], rank == max(s.ranks), missed))
                if rank == max(s.ranks):
                    best = scales[int(np.nanargmin(s.loss_K[at]))]
                    rows.append([named(s.unit), *cells, f"1 ({missed[-1]:.4f})", f"{best:g}"])
        for task in (None, SPOILT):
            for only_wide, ranks in ((True, "r = 64"), (False, "all ranks")):
                kept = [x for of, wide, x in found if of != task and (wide or not only_wide)]
                label = f"mean, {ranks} ({len(kept)})" + (f", without {task}" if task else "")
                rows.append([f"**{label}**", *map(nats, mean(kept)), ""])
        print(f"By {words}:\n")
        table(["task", *map(percent, shares), "always ×1", "lowest at the end"], rows)
