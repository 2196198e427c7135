"""The tables of whole adaptive runs: against fixed r = 16, against each other, and against the sweeps.

Shapes: N fresh examples.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.selection_markdown import named, nats, table, with_error
from benchmarks.selection_records import Adaptive, Arm, Sweep
from benchmarks.selection_statistics import Chance, Difference, best_arm, best_at, over_runs, tally
from rankrace.select.statistics import paired_difference

FIXED = "fixed"


def names_of(runs: Sequence[Adaptive]) -> list[str]:
    """Of all arms, as they come."""
    return list(dict.fromkeys(name for run in runs for name in run.arms))


def strategies_of(runs: Sequence[Adaptive]) -> list[str]:
    """All but the fixed rank."""
    return [name for name in names_of(runs) if name != FIXED]


def apart(run: Adaptive, a_N: np.ndarray, b_N: np.ndarray) -> tuple[float, float]:
    """The first less the second on the unit's fresh examples, and the paired standard error."""
    return paired_difference(a_N, b_N, run.fresh.tokens_N, run.fresh.cluster_N)


def against(run: Adaptive, a_N: np.ndarray, b_N: np.ndarray, found: Mapping[str, Chance] | None = None) -> Difference:
    """The same, with the task's chance from run to run beside it where that is known."""
    d, se = apart(run, a_N, b_N)
    chance = (found or {}).get(run.unit[0])
    return Difference(d=d, se=se, run=chance.run if chance else 0.0)


def mean_of(runs: Sequence[Adaptive], found: Sequence[Difference]) -> str:
    """Of a difference in each of these runs, and its error over tasks."""
    return with_error(*over_runs([x.d for x in found], [run.unit[0] for run in runs]))


def cost(run: Adaptive, name: str) -> float:
    """In trainings of one candidate. Measuring has no backward pass, which is half of the products of a step.

    Counted are the looks and the base model's loss on their examples; where rows come back also what was chosen, the
    last step and the average. Not counted are the figures on fresh examples before and after, which a training at a
    fixed rank is judged by as well: plan.FRESH_SHARE more at most.
    """
    arm = run.arms[name]
    measured = arm.measured + 1 + (3 if arm.ends else 0)
    return arm.candidate_steps + measured * arm.looked / 2 / run.examples


def whole_runs(runs: Sequence[Adaptive], found: dict[str, Chance]) -> None:
    names = strategies_of(runs)
    print("### Whole runs: rank (× of the learning rate), and the end less that of fixed r = 16 (± paired error)\n")
    rows = []
    for run in runs:
        fixed_N, cells = run.arms[FIXED].loss_N, []
        for name in names:
            if name not in run.arms:
                cells.append("")
                continue
            arm, x = run.arms[name], apart(run, run.arms[name].loss_N, fixed_N)
            rate = "" if arm.scale == 1 else f" (×{arm.scale:g})"
            cells.append(f"{arm.rank}{rate}: {with_error(*x)}")
        chance = found.get(run.unit[0])
        level = f"{fixed_N.sum() / run.fresh.tokens_N.sum():.4f}"
        documents = len(np.unique(run.fresh.cluster_N))
        rows.append([named(run.unit), str(documents), level, *cells, nats(chance.run) if chance else "?"])
    table(["task", "documents", "fixed", *names, "chance"], rows)

    print("### Whole runs, in sum\n")
    rows = []
    for name in names:
        there = [run for run in runs if name in run.arms]
        x = [against(run, run.arms[name].loss_N, run.arms[FIXED].loss_N, found) for run in there]
        alone, both = tally(x, chance=False), tally(x, chance=True)
        ratio = np.mean([run.arms[name].rank / run.arms[FIXED].rank for run in there])
        prices = [cost(run, name) for run in there]
        rows.append(
            [
                name,
                f"{alone.within} / {alone.all}",
                f"{alone.won} : {alone.lost}",
                f"{both.within} / {both.all}",
                f"{both.won} : {both.lost}",
                mean_of(there, x),
                f"{ratio:.2f}",
                f"{np.mean([run.arms[name].candidate_steps for run in there]):.2f}",
                f"{np.mean(prices):.2f} ({min(prices):.2f} … {max(prices):.2f})",
            ]
        )
    heads = ["", "at most one error worse than fixed r = 16", "better : worse", "with chance", "better : worse"]
    table([*heads, "mean ± over tasks", "parameters ÷ r = 16", "candidate-steps", "with measurements"], rows)


ENDS: dict[str, Callable[[Arm], np.ndarray | None]] = {
    "both their last step": lambda arm: arm.last_N,
    "both their average, where rows come back": lambda arm: arm.ends.average_N if arm.ends else None,
    "both as the examples that chose have it": lambda arm: arm.chosen_N,
}
"""What may be held against each other, beside what was delivered."""


def by_end(runs: Sequence[Adaptive]) -> None:
    """How much of the difference is the average's."""
    print("### Whole runs less fixed r = 16, each with the same end: mean ± over tasks, at most one error worse\n")
    rows = []
    for name in strategies_of(runs):
        cells = []
        for end in ENDS.values():
            pairs = [(run, end(run.arms[name]), end(run.arms[FIXED])) for run in runs if name in run.arms]
            both = [(run, a_N, b_N) for run, a_N, b_N in pairs if a_N is not None and b_N is not None]
            found = [against(run, a_N, b_N) for run, a_N, b_N in both]
            counted = tally(found, chance=False)
            mean = mean_of([run for run, _, _ in both], found) if both else ""
            cells.append(f"{mean}, {counted.within} / {counted.all}" if both else "")
        rows.append([name, *cells])
    table(["", *ENDS], rows)


def among_themselves(runs: Sequence[Adaptive]) -> None:
    """Each strategy less the default, over the units that both have."""
    names = strategies_of(runs)
    if len(names) < 2:
        return
    first = "shrink" if "shrink" in names else names[0]
    print(f"### Whole runs less `{first}` on the same rows\n")
    rows = []
    for name in names:
        there = [run for run in runs if {name, first} <= set(run.arms)]
        if name == first or not there:
            continue
        x = [against(run, run.arms[name].loss_N, run.arms[first].loss_N) for run in there]
        counted, median = tally(x, chance=False), float(np.median([e.d for e in x]))
        beyond = f"{counted.won} : {counted.lost}"
        rows.append([name, str(counted.all), mean_of(there, x), nats(median, "+"), beyond])
    table(["", "units", "mean ± over tasks", "median", "beyond one error better : worse"], rows)


def in_fewer_bits(quantized: Sequence[Adaptive], runs: Sequence[Adaptive]) -> None:
    """The same unit's same strategy on a base in fewer bits, less that in 16."""
    by_unit = {run.unit: run for run in runs}
    rows = []
    for other in quantized:
        run = by_unit.get(other.unit)
        if run is None or run.made[:3] != other.made[:3]:
            continue
        for name in other.arms.keys() & run.arms.keys():
            a, b = other.arms[name], run.arms[name]
            delivered, last = apart(run, a.loss_N, b.loss_N), apart(run, a.last_N, b.last_N)
            ranks = f"{a.rank}, {b.rank}"
            rows.append([named(run.unit), other.quantize, name, ranks, with_error(*delivered), with_error(*last)])
    if rows:
        print("### A base in fewer bits less one in 16, each loss on its own base\n")
        table(["task", "base", "", "ranks: fewer bits, 16", "as delivered", "last step less last step"], sorted(rows))


REFERENCES: dict[str, Callable[[Sweep], int]] = {
    "best arm (at the last look)": best_arm,
    "best rank at ×1": lambda s: best_at(s, s.at(1.0)),
    "r = 16 at ×1, which is `fixed` once more": lambda s: next(i for i in s.at(1.0) if s.ranks[i] == 16),
}
"""Arms of a sweep that whole runs are held against."""


def against_sweeps(runs: Sequence[Adaptive], sweeps: Sequence[Sweep], found: dict[str, Chance]) -> None:
    """Where the unit's sweep is there."""
    by_unit = {s.unit: s for s in sweeps}
    both = [(run, by_unit[run.unit]) for run in runs if run.unit in by_unit]
    if not both:
        return
    names = names_of([run for run, _ in both])
    sums = []
    for which, (words, reference) in enumerate(REFERENCES.items()):
        rows, columns = [], []
        for run, s in both:
            assert s.loss_KN is not None
            other = reference(s)
            x = {n: against(run, arm.loss_N, s.loss_KN[other], found) for n, arm in run.arms.items()}
            columns.append((run, x))
            label = f"{named(run.unit)}: r = {s.ranks[other]}, ×{s.rates[other]:g}"
            rows.append([label, *(with_error(x[n].d, x[n].se) if n in x else "" for n in names)])
        if which == 0:
            print(f"### Whole runs less the sweep's {words}\n")
            table(["", *names], rows)
        for name in names:
            there = [(run, x[name]) for run, x in columns if name in x]
            all_x = [x for _, x in there]
            alone, with_chance = tally(all_x, chance=False), tally(all_x, chance=True)
            within = [f"{t.within} / {t.all}" for t in (alone, with_chance)]
            sums.append([words, name, mean_of([run for run, _ in there], all_x), *within])
    print("### The same in sum\n")
    table(["less the sweep's", "", "mean ± over tasks", "at most one error worse", "with chance"], sums)


def both_ends(runs: Sequence[Adaptive]) -> None:
    """What the average since the choice is worth, and whether it was taken."""
    runs = [run for run in runs if any(arm.ends for arm in run.arms.values())]
    if not runs:
        return
    print(
        "### The average since the choice less the last step, on fresh examples (**taken**; fixed keeps its last)\n"
    )
    names = names_of(runs)
    whole = {run.unit for run in runs if all(name in run.arms and run.arms[name].ends for name in names)}
    found: dict[str, list[tuple[float, bool]]] = {name: [] for name in names}
    rows = []
    for run in runs:
        cells = []
        for name in names:
            ends = run.arms[name].ends if name in run.arms else None
            if ends is None:
                cells.append("")
                continue
            d, se = apart(run, ends.average_N, ends.last_N)
            if run.unit in whole:
                found[name].append((d, ends.averaged))
            words = with_error(d, se)
            cells.append(f"**{words}**" if ends.averaged else words)
        rows.append([named(run.unit), *cells])
    each = [[d for d, _ in found[n]] for n in names]
    taken = [[d if averaged else 0.0 for d, averaged in found[n]] for n in names]
    rows.append([f"mean of the {len(whole)} that all have, if always taken", *(f"{np.mean(d):+.4f}" for d in each)])
    rows.append(["the same, as the examples that chose have it", *(f"{np.mean(d):+.4f}" for d in taken)])
    rows.append(["the same, if one knew", *(f"{np.minimum(d, 0).mean():+.4f}" for d in each)])
    table(["task", *names], rows)
