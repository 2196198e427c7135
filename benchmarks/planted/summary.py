"""The records as tables, in Markdown.

Shapes: K candidates, N examples, P layers, R the wide candidate's rank.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.planted.rules import RULES, Curve, gap_by_layer
from rankrace.select.statistics import paired_difference

Record = dict[str, Any]
WATCH, HEALED, HEATS = "watch", "healed", "heats"
"""Strategies that choose nothing: their records serve the other tables."""
GIVEN = (WATCH, HEALED, HEATS, "sweep", "oracle")


def summary(records: Sequence[Record]) -> str:
    parts = [
        ("Picks of the strategies", picks(records)),
        ("Picks of the rules, at each look of one wide training", rule_picks(records)),
        ("Layers whose own rank the widest gap gives, within one", layer_picks(records)),
        ("Cut at a tenth: what a race sees in the averages as they heal", heats(records)),
        ("Cut at a fifth and trained to the end: loss above the teacher's", healed(records)),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def within(found: Sequence[int], true: int, reach: int) -> str:
    hits = sum(abs(pick - true) <= reach for pick in found)
    return f"{hits}/{len(found)}"


def picks(records: Sequence[Record]) -> str:
    """One line for each spectrum, planted rank and strategy."""
    groups: dict[tuple[str, str, int, int], list[Record]] = defaultdict(list)
    for r in records:
        if r["strategy"] not in GIVEN:
            groups[r["strategy"], r["kind"], r["rank"], r["steps"]].append(r)
    rows = []
    for (strategy, kind, rank, steps), group in sorted(groups.items()):
        found = [r["pick"] for r in group]
        ends = [r["end"]["excess"][0] for r in group if r["end"]]
        span, end = f"{min(found)} … {max(found)}", f"{np.mean(ends):.4f}" if ends else ""
        near = within(found, rank, 1), within(found, rank, 2)
        cost = f"{np.mean([r['candidate_steps'] / steps for r in group if not r['end']] or [np.nan]):.1%}"
        rows.append((strategy, kind, rank, steps, f"{np.median(found):g}", span, *near, cost, end))
    head = ("strategy", "spectrum", "r₀", "steps", "median pick", "range", "within 1", "within 2")
    head = (*head, "candidate-steps until the choice", "end, nats")
    return table(head, rows)


def curve_of(look: Record) -> Curve:
    return Curve(
        loss_r=np.array(look["excess"]),
        se_r=np.array(look["se"]),
        S_PR=np.array(list(look["spectra"].values())),
    )


def rule_picks(records: Sequence[Record]) -> str:
    """One line for each spectrum and rule: share within one of r₀ (and the median picks) at each look."""
    watched = [r for r in records if r["strategy"] == WATCH]
    rows = []
    shares = sorted({look["share"] for r in watched for look in r["looks"]})
    for kind, steps in sorted({(r["kind"], r["steps"]) for r in watched}):
        here = [r for r in watched if (r["kind"], r["steps"]) == (kind, steps)]
        ranks = sorted({r["rank"] for r in here})
        for name, rule in RULES.items():
            cells = []
            for share in shares:
                found: dict[int, list[int]] = {rank: [] for rank in ranks}
                for r in here:
                    found[r["rank"]] += [rule(curve_of(look)) for look in r["looks"] if look["share"] == share]
                hits = [abs(pick - rank) <= 1 for rank in ranks for pick in found[rank]]
                medians = ", ".join(f"{np.median(found[rank]):g}" for rank in ranks)
                cells.append(f"{100 * np.mean(hits):.0f}% ({medians})")
            rows.append((kind, ", ".join(map(str, ranks)), len(here), name, *cells))
    return table(("spectrum", "r₀", "trainings", "rule", *(f"{100 * s:g}%" for s in shares)), rows)


def layer_picks(records: Sequence[Record]) -> str:
    """What the singular values say of each layer alone."""
    watched = [r for r in records if r["strategy"] == WATCH]
    shares = sorted({look["share"] for r in watched for look in r["looks"]})
    rows = []
    for kind, rank in sorted({(r["kind"], r["rank"]) for r in watched}):
        cells = []
        for share in shares:
            hits = [
                abs(pick - r["layer_ranks"][name]) <= 1
                for r in watched
                if (r["kind"], r["rank"]) == (kind, rank)
                for look in r["looks"]
                if look["share"] == share
                for name, pick in zip(look["spectra"], gap_by_layer(curve_of(look)), strict=True)
            ]
            cells.append(f"{100 * np.mean(hits):.0f}%")
        rows.append((kind, rank, *cells))
    return table(("spectrum", "r₀", *(f"{100 * s:g}%" for s in shares)), rows)


def heats(records: Sequence[Record]) -> str:
    """How far r₀ is behind the lowest, in nats and as a share of what rank buys, and the picks of the share rules."""
    raced = [r for r in records if r["strategy"] == HEATS]
    names = [name for name in RULES if name.startswith("share")]
    rows = []
    for kind, rank in sorted({(r["kind"], r["rank"]) for r in raced}):
        here = [r["looks"] for r in raced if (r["kind"], r["rank"]) == (kind, rank)]
        for looks in zip(*here, strict=True):
            curves = [curve_of(look) for look in looks]
            ranks, share = looks[0]["ranks"], looks[0]["share"]
            behind = np.mean([c.loss_r[ranks.index(rank)] - c.loss_r.min() for c in curves])
            bought = np.mean([c.loss_r[0] - c.loss_r.min() for c in curves])
            picks = (", ".join(str(ranks[RULES[name](c) - 1]) for c in curves) for name in names)
            size = f"{behind:.3f}", f"{bought:.3f}", f"{behind / bought:.1%}"
            rows.append((kind, rank, f"{100 * share:g}%", looks[0]["source"], *size, *picks))
    head = ("spectrum", "r₀", "look", "measured", "r₀ is behind, nats", "rank buys, nats", "share", *names)
    return table(head, rows)


def healed(records: Sequence[Record]) -> str:
    """The truth for a rank that is cut early: the end of each, and the smallest within one standard error."""
    rows, head = [], []
    for r in sorted(records, key=lambda r: (r["kind"], r["rank"], r["seed"])):
        if r["strategy"] != HEALED:
            continue
        end = r["end"]
        ranks, excess = end["ranks"], np.array(end["excess"])
        loss_KN = np.array(end["per_example"])
        tokens_N = np.full(loss_KN.shape[1], r["regime"]["length"] - 1)
        best = int(excess.argmin())
        ses = [paired_difference(x, loss_KN[best], tokens_N, np.arange(len(tokens_N)))[1] for x in loss_KN]
        smallest = next(k for k, e in zip(ranks, excess - ses, strict=True) if e <= excess[best])
        cells = [f"{e:.4f} ± {se:.4f}" for e, se in zip(excess, ses, strict=True)]
        rows.append((r["kind"], r["rank"], r["seed"], f"{ranks[best]} / {smallest}", *cells))
        head = [f"r = {k}" for k in ranks]
    return table(("spectrum", "r₀", "seed", "lowest / one_se", *head), rows)
