"""The figures of docs/selection.md, from the raw figures, beside them.

python -m benchmarks.selection_figures adaptive_ends adaptive_two

results/selection/early.svg     does an early look tell the order of the ranks at the end?
results/selection/whole.svg     where whole runs of `shrink` end, beside fixed r = 16
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks import selection_records as records
from benchmarks.selection_markdown import mean, percent
from benchmarks.selection_records import Adaptive, Sweep
from benchmarks.selection_runs import FIXED, apart
from benchmarks.selection_sweeps import curves_of, orders
from rankrace.report.canvas import ACCENT, INK, MUTED, RAMP, WIDE, Format, canvas, heading, legend_style, to_svg

WAYS = {"trained side by side": ("direct", RAMP[5]), "cut from one wide adapter": ("truncated", ACCENT)}
TALL = Format(name="wide", width=760, height=520, font=12.0, points=160, columns=4)


def early(sweeps: Sequence[Sweep], matters: str = "gsm8k") -> str:
    """Where rank matters, and elsewhere."""
    shares = [look.share for look in sweeps[0].looks]
    sides = {
        f"rank correlation with the end: {matters.upper()}": [s for s in sweeps if s.unit[0] == matters],
        "mean of the other seven tasks": [s for s in sweeps if s.unit[0] != matters],
    }
    drawing, panels = canvas(WIDE, next(iter(sides)), panels=2)
    told = []
    for axes, (title, some) in zip(panels, sides.items(), strict=True):
        heading(axes, title, INK, WIDE)
        for words, (how, colour) in WAYS.items():
            order = mean([orders(s, curves_of(s, how, 1.0), 1.0) for s in some])
            axes.plot(shares, order, "-o", color=colour, lw=1.8, ms=4.5, label=words, clip_on=False)
            told.append(f"{title}, {words}: {', '.join(f'{x:+.2f}' for x in order)}")
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.set_ylim(-1, 1)
        share_axis(axes, shares)
    panels[1].legend(loc="lower right", **legend_style(WIDE))
    return to_svg(drawing, "early-wide", ". ".join(told))


def share_axis(axes: Axes, shares: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([x for x in shares if x in (0.025, 0.05, 0.1, 0.2, 0.5, 1.0)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(round(x, 4))))
    axes.set_xlabel("share of the training at the look", color=INK, fontsize=WIDE.font)


def whole(runs: Sequence[Adaptive], name: str = "shrink") -> str:
    """Each unit's difference to fixed r = 16, with its paired error."""
    runs = [run for run in runs if name in run.arms]
    drawing, (axes,) = canvas(TALL, f"{name} less fixed r = 16, nats per supervised token; left is better")
    labels = []
    for y, run in enumerate(reversed(runs)):
        arm = run.arms[name]
        d, se = apart(run, arm.loss_N, run.arms[FIXED].loss_N)
        clear = abs(d) > 2 * se
        axes.errorbar(d, y, xerr=se, fmt="o", ms=5, lw=1.4, color=ACCENT if clear else RAMP[5])
        task, seed = run.unit
        labels.append(f"{task} {seed}, rank {arm.rank}" + (", average" if arm.ends and arm.ends.averaged else ""))
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(-0.7, len(runs) - 0.3)
    axes.yaxis.set_major_locator(FixedLocator(range(len(runs))))
    axes.set_yticklabels(labels, fontsize=TALL.font - 2)
    axes.set_xlabel("± one paired standard error; orange: beyond two", color=INK, fontsize=TALL.font)
    return to_svg(drawing, "whole-wide", f"{name} less fixed r = 16 in {len(runs)} whole runs")


def main(folders: Sequence[str], root: Path = records.ROOT) -> None:
    (root / "early.svg").write_text(early(records.sweeps(root)) + "\n", encoding="utf-8")
    (root / "whole.svg").write_text(whole(records.adaptives(root, folders)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or ("adaptive_ends", "adaptive_two"))
