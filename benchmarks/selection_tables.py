"""The tables of docs/selection.md, from the raw figures: whatever units are there.

    python -m benchmarks.selection_tables [FOLDER ...]

FOLDER, of whole runs, is adaptive/ unless told otherwise: adaptive_early/ has those that chose by 30%, come what may.
Of several each unit's arms are put together.

Shapes: K arms of one training (ranks × learning rates).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import selection_records as records
from benchmarks.selection_markdown import named, nats, table, with_error
from benchmarks.selection_runs import (
    FIXED,
    against_sweeps,
    among_themselves,
    both_ends,
    by_end,
    in_fewer_bits,
    whole_runs,
)
from benchmarks.selection_statistics import Chance, best_arm, chances, ends_of
from benchmarks.selection_sweeps import early_looks, final_losses, learning_rates, rate_losses
from rankrace.select.statistics import paired_difference


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
    arms = found[0]["arms"]
    plain = {arm: f"cut-{arm.rpartition('-')[2]}" for arm in arms if not arm.startswith("cut-")}
    tables = {
        "that of the wide one kept": dict.fromkeys(arms, arms[0]),
        "that of the plain cut to the same rank": {arm: cut for arm, cut in plain.items() if cut in arms},
    }
    for words, references in tables.items():
        if not references:
            continue
        print(f"### After a cut at 15%: loss at the end on fresh examples, less {words} (± paired error)\n")
        rows = [[arm, *(differs(r, arm, other) for r in found)] for arm, other in references.items()]
        table(["arm", *(f"{named(records.unit_of(r))}, lr × {r['lr_scale']:g}" for r in found)], rows)


def differs(record: dict[str, Any], arm: str, other: str) -> str:
    """One arm's end less another's."""
    fresh, ends = records.fresh_of(record), dict(zip(record["arms"], record["fresh"]["per_example"], strict=True))
    a_N, b_N = np.array(ends[arm]), np.array(ends[other])
    return with_error(*paired_difference(a_N, b_N, fresh.tokens_N, fresh.cluster_N))


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
        by_end(runs)
        among_themselves(runs)
        against_sweeps(runs, sweeps, found)
        both_ends(runs)
        in_fewer_bits(records.adaptives(root, ("quantized",)), runs)
        repeated_choices(records.choices(root, whole))
    after_cut(records.after_cuts(root))
    after_cut(records.after_cuts(root, "after_cut_rates"))
    after_cut(records.after_cuts(root, "after_cut_ways"))


if __name__ == "__main__":
    main(whole=sys.argv[1:] or ("adaptive",))
