"""The tables of docs/selection.md, from the raw figures.

    python -m benchmarks.selection_tables

Shapes: K arms of one training (ranks, or ranks × learning rates).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from rankrace.select.build import SHARES

ROOT = Path("results/selection")
EARLY = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
LARGEST = 32


def records(*patterns: str) -> list[dict[str, Any]]:
    files = sorted(file for pattern in patterns for file in ROOT.glob(pattern))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def named(record: dict[str, Any]) -> str:
    name = {"SST-2": "sst2"}.get(record["task"], record["task"])
    return f"{name}, seed {record['seed']}"


def table(heads: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def paired_se(look: dict[str, Any], i: int, j: int) -> float:
    """Of the difference between arms i and j: stored as a triangle."""
    return 0.0 if i == j else look["se"][max(i, j)][min(i, j)]


def pick(look: dict[str, Any], ranks: list[int], share: float) -> int:
    """Index of the smallest rank within one standard error of the best or that share of what rank buys."""
    losses = look["loss"][: len(ranks)]
    best = int(np.argmin(losses))
    bearable = share * (losses[0] - losses[best])
    return next(i for i in range(len(ranks)) if losses[i] - losses[best] <= max(bearable, paired_se(look, i, best)))


def early_looks() -> None:
    """An early direct comparison and the truncation curve against the end."""
    print("### Early looks: the rank they name, its loss at the end above the best one's, and the order\n")
    for how in ("direct", "truncated"):
        found: dict[float, list[list[float]]] = {share: [] for share in EARLY}
        rows = []
        for r in records("first/*-lr1.json", "*-lr1.json"):
            end, row = np.array(r["fresh"]["loss"]), [named(r)]
            for look in r["looks"]:
                if look["share"] not in EARLY:
                    continue
                ranks = [rank for rank in r["ranks"] if rank <= LARGEST]
                if how == "direct":
                    chosen = int(np.argmin(look[how]["loss"]))
                else:
                    chosen = pick(look[how], ranks, SHARES["balanced"])
                regret = end[chosen] - end.min()
                losses = look[how]["loss"]
                order = float(spearmanr(losses, end[: len(losses)]).statistic)
                found[look["share"]].append([regret, order])
                row.append(f"{r['ranks'][chosen]} ({regret:.4f})")
            rows.append([*row, str(r["ranks"][int(end.argmin())])])
        means = {share: np.mean(values, 0) for share, values in found.items()}
        rows.append(["**mean regret**", *(f"{means[share][0]:.4f}" for share in EARLY), ""])
        rows.append(["**mean rank correlation**", *(f"{means[share][1]:+.2f}" for share in EARLY), ""])
        print({"direct": "Direct, lowest loss:\n", "truncated": "Truncated from rank 64, the default rule:\n"}[how])
        table(["task", *(f"{100 * share:g}%" for share in EARLY), "lowest at the end"], rows)


def learning_rates() -> None:
    """Which learning rate an early look names, as the values are and as their average."""
    print("### Learning rates: the multiple that a look names, and its loss at the end above the best one's\n")
    for how, words in (
        ("direct", "the values as they are"),
        ("half", "their average over the last half of the steps"),
    ):
        rows, regrets = [], []
        for r in records("*-rates-warmup*.json"):
            end = np.array(r["fresh"]["loss"])
            for rank in dict.fromkeys(r["ranks"]):
                mine = [i for i, other in enumerate(r["ranks"]) if other == rank]
                row, missed = [f"{named(r)}, r = {rank}"], []
                for look in r["looks"]:
                    if look["share"] not in EARLY:
                        continue
                    chosen = min(mine, key=lambda i, look=look: look[how]["loss"][i])
                    missed.append(end[chosen] - end[mine].min())
                    row.append(f"{r['rates'][chosen]:g} ({missed[-1]:.4f})")
                regrets.append(missed)
                rows.append([*row, f"{r['rates'][min(mine, key=lambda i: end[i])]:g}"])
        rows.append(["**mean regret**", *(f"{x:.4f}" for x in np.mean(regrets, 0)), ""])
        print(f"By {words}:\n")
        table(["task", *(f"{100 * share:g}%" for share in EARLY), "lowest at the end"], rows)


def after_cut() -> None:
    """Arms that went on from one wide candidate."""
    print(
        "### After a cut at 15%: loss at the end on fresh examples, less that of the wide one kept (± paired error)\n"
    )
    found = records("after_cut/*.json")
    rows = []
    for k, arm in enumerate(found[0]["arms"]):
        row = [arm]
        for r in found:
            tokens, kept = np.array(r["fresh_tokens"]), np.array(r["fresh"]["per_example"][0])
            difference = np.array(r["fresh"]["per_example"][k]) - kept
            d = difference.sum() / tokens.sum()
            _, member = np.unique(r["fresh_cluster"], return_inverse=True)
            e = np.bincount(member, weights=difference - d * tokens)
            se = np.sqrt(len(e) / (len(e) - 1) * np.square(e).sum()) / tokens.sum()
            row.append(f"{d:+.4f} ± {se:.4f}")
        rows.append(row)
    table(["arm", *(f"{named(r)}, lr × {r['lr_scale']:g}" for r in found)], rows)


if __name__ == "__main__":
    early_looks()
    learning_rates()
    after_cut()
