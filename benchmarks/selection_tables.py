"""The tables of docs/selection.md, from the raw figures: whatever units are there.

    python -m benchmarks.selection_tables [FOLDER ...]

FOLDER, of whole runs, is adaptive/ unless told otherwise: adaptive_early/ has those that chose by 30%, come what may.
Of several each unit's arms are put together.

Shapes: K arms of one training (ranks × learning rates).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import selection_records as records
from benchmarks.selection_markdown import named, nats, table, with_error
from benchmarks.selection_records import Adaptive, Sweep
from benchmarks.selection_statistics import (
    Chance,
    Difference,
    best_arm,
    best_at,
    chances,
    ends_of,
    tally,
)
from benchmarks.selection_sweeps import early_looks, final_losses, learning_rates, rate_losses
from rankrace.select.statistics import paired_difference

FIXED = "fixed"


# --- chance, and (d) whole runs


def chance_table(found: dict[str, Chance]) -> None:
    print("### Chance: by how much trainings differ that should be the same\n")
    each = sorted(found.items())
    rows = [
        ["pairs", *(str(c.pairs) for _, c in each)],
        ["RMS of their differences", *(nats(c.rms) for _, c in each)],
        ["RMS of the paired errors", *(nats(c.se) for _, c in each)],
        ["chance from run to run", *(nats(c.run) for _, c in each)],
    ]
    table(["", *(task for task, _ in each)], rows)


def against(run: Adaptive, name: str, other_N: np.ndarray, found: dict[str, Chance]) -> Difference:
    """An arm against another training of the unit."""
    fresh = run.fresh
    d, se = paired_difference(run.arms[name].loss_N, other_N, fresh.tokens_N, fresh.cluster_N)
    chance = found.get(run.unit[0])
    return Difference(d=d, se=se, run=chance.run if chance else 0.0)


def cost(run: Adaptive, name: str) -> float:
    """In trainings of one candidate. Measuring has no backward pass, which is half of the products of a step.

    The base model's own loss is measured too; where rows come back also what was chosen, the last step and the
    average.
    """
    arm = run.arms[name]
    measured = arm.measured + 1 + (3 if arm.ends else 0)
    return arm.candidate_steps + measured * arm.looked / 2 / run.examples


def whole_runs(runs: Sequence[Adaptive], found: dict[str, Chance]) -> None:
    names = [n for n in dict.fromkeys(n for run in runs for n in run.arms) if n != FIXED]
    print("### Whole runs: rank (× of the learning rate), and the end less that of fixed r = 16 (± paired error)\n")
    rows = []
    for run in runs:
        fixed_N, cells = run.arms[FIXED].loss_N, []
        for name in names:
            if name not in run.arms:
                cells.append("")
                continue
            arm, x = run.arms[name], against(run, name, fixed_N, found)
            rate = "" if arm.scale == 1 else f" (×{arm.scale:g})"
            cells.append(f"{arm.rank}{rate}: {with_error(x.d, x.se)}")
        chance = found.get(run.unit[0])
        level = f"{fixed_N.sum() / run.fresh.tokens_N.sum():.4f}"
        documents = len(np.unique(run.fresh.cluster_N))
        rows.append([named(run.unit), str(documents), level, *cells, nats(chance.run) if chance else "?"])
    table(["task", "documents", "fixed", *names, "chance"], rows)

    print("### Whole runs, in sum\n")
    rows = []
    for name in names:
        there = [run for run in runs if name in run.arms]
        x = [against(run, name, run.arms[FIXED].loss_N, found) for run in there]
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
                f"{np.mean([e.d for e in x]):+.4f}",
                f"{ratio:.2f}",
                f"{np.mean([run.arms[name].candidate_steps for run in there]):.2f}",
                f"{np.mean(prices):.2f} ({min(prices):.2f} … {max(prices):.2f})",
            ]
        )
    heads = ["", "at most one error worse than fixed r = 16", "better : worse", "with chance", "better : worse"]
    table([*heads, "mean", "parameters ÷ r = 16", "candidate-steps", "with measurements"], rows)


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
    names = list(dict.fromkeys(n for run, _ in both for n in run.arms))
    sums = []
    for which, (words, reference) in enumerate(REFERENCES.items()):
        rows, columns = [], []
        for run, s in both:
            assert s.loss_KN is not None
            other = reference(s)
            x = {n: against(run, n, s.loss_KN[other], found) for n in names if n in run.arms}
            columns.append(x)
            label = f"{named(run.unit)}: r = {s.ranks[other]}, ×{s.rates[other]:g}"
            rows.append([label, *(with_error(x[n].d, x[n].se) if n in x else "" for n in names)])
        if which == 0:
            print(f"### Whole runs less the sweep's {words}\n")
            table(["", *names], rows)
        for name in names:
            all_x = [x[name] for x in columns if name in x]
            alone, with_chance = tally(all_x, chance=False), tally(all_x, chance=True)
            within = [f"{t.within} / {t.all}" for t in (alone, with_chance)]
            sums.append([words, name, f"{np.mean([x.d for x in all_x]):+.4f}", *within])
    print("### The same in sum\n")
    table(["less the sweep's", "", "mean", "at most one error worse", "with chance"], sums)


def both_ends(runs: Sequence[Adaptive]) -> None:
    """What the average since the choice is worth, and whether it was taken."""
    runs = [run for run in runs if any(arm.ends for arm in run.arms.values())]
    if not runs:
        return
    print(
        "### The average since the choice less the last step, on fresh examples (**taken**; fixed keeps its last)\n"
    )
    names = list(dict.fromkeys(n for run in runs for n in run.arms))
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
            d, se = paired_difference(ends.average_N, ends.last_N, run.fresh.tokens_N, run.fresh.cluster_N)
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


def repeated_choices(found: dict[tuple[str, str], dict[int, int]]) -> None:
    print("### The same choice over seeds\n")
    rows = [
        [
            task,
            name,
            ", ".join(str(r) for _, r in sorted(picks.items())),
            f"{max(picks.values()) / min(picks.values()):.1f}",
        ]
        for (task, name), picks in sorted(found.items())
        if name != FIXED and len(picks) > 1
    ]
    table(["task", "strategy", "picks, by seed", "largest ÷ smallest"], rows)


def after_cut(found: Sequence[dict[str, Any]]) -> None:
    """Arms that went on from one wide candidate."""
    if not found:
        return
    print(
        "### After a cut at 15%: loss at the end on fresh examples, less that of the wide one kept (± paired error)\n"
    )
    rows = []
    for k, arm in enumerate(found[0]["arms"]):
        row = [arm]
        for r in found:
            fresh, loss_KN = records.fresh_of(r), np.array(r["fresh"]["per_example"])
            d, se = paired_difference(loss_KN[k], loss_KN[0], fresh.tokens_N, fresh.cluster_N)
            row.append(with_error(d, se))
        rows.append(row)
    table(["arm", *(f"{named(records.unit_of(r))}, lr × {r['lr_scale']:g}" for r in found)], rows)


def main(root: Path = records.ROOT, whole: Sequence[str] = ("adaptive",)) -> None:
    """Args:
    whole: the folders of whole runs.
    """
    sweeps, ranks, rates = records.sweeps(root), records.first_ranks(root), records.first_rates(root)
    runs = records.adaptives(root, whole)
    every_run = [run for folder in sorted(root.glob("adaptive*")) for run in records.adaptives(root, [folder.name])]
    found = chances(ends_of([*sweeps, *ranks], every_run))
    all_ranks = records.newest(sweeps, ranks)
    rated = records.newest(sweeps, rates)
    final_losses(records.newest(sweeps, [s for s in ranks if s.loss_KN is not None]))
    rate_losses(rated)
    if all_ranks:
        early_looks(all_ranks, lambda s: 1.0, "at the default learning rate")
    if sweeps:
        early_looks(sweeps, lambda s: s.rates[best_arm(s)], "at the best learning rate of each unit")
    if rated:
        learning_rates(rated)
    if runs:
        chance_table(found)
        whole_runs(runs, found)
        against_sweeps(runs, sweeps, found)
        both_ends(runs)
        repeated_choices(records.choices(root, whole))
    after_cut(records.after_cuts(root))
    after_cut(records.after_cuts(root, "after_cut_rates"))
    after_cut(records.after_cuts(root, "after_cut_ways"))


if __name__ == "__main__":
    main(whole=sys.argv[1:] or ("adaptive",))
