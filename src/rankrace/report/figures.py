"""The figures of the report, as inline SVG.

Every figure is drawn in the light palette; each colour then becomes a CSS variable with that colour as
its fallback, so that one drawing serves light and dark pages. The same input gives the same bytes.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from rankrace.report.text import loss_unit
from rankrace.result import CurvePoint, Look, Result, Series

# name: (light, dark). The ramp s0 … s7 orders the candidates by rank; the accent is the chosen one's alone.
# Blue against vermilion stays apart under every common colour blindness.
PALETTE = {
    "ink": ("#1d2329", "#e6e8ea"),
    "muted": ("#626a73", "#9aa3ad"),
    "rule": ("#d5d9de", "#363c44"),
    "paper": ("#fefefd", "#14171b"),
    "accent": ("#c8470a", "#ff8a4c"),
    "s0": ("#a9c8e3", "#4a7aa6"),
    "s1": ("#8db4d7", "#5484b0"),
    "s2": ("#72a0ca", "#5f8fba"),
    "s3": ("#588cbb", "#6b9bc6"),
    "s4": ("#4178aa", "#7aa9d2"),
    "s5": ("#2f6496", "#8cb8dd"),
    "s6": ("#205080", "#a2c9e8"),
    "s7": ("#133d69", "#bedbf3"),
}
INK, MUTED, RULE, PAPER, ACCENT = (PALETTE[name][0] for name in ("ink", "muted", "rule", "paper", "accent"))
PRICED = "with the price of the rank"
RAMP = [PALETTE[f"s{i}"][0] for i in range(8)]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One drawing's size. A page holds both and shows the one that fits."""

    name: str
    width: float  # CSS pixels, as height and font
    height: float
    font: float
    points: int  # at most so many along a training curve
    columns: int  # of the legend


WIDE = Format(name="wide", width=760, height=340, font=12.5, points=160, columns=4)
NARROW = Format(name="narrow", width=350, height=300, font=11.5, points=80, columns=3)


def loss_against_rank(result: Result, form: Format) -> str:
    """Validation loss of every rank compared, with paired errors, and the chosen one.

    Where the smallest ranks lie so high that the others look level, a second panel shows the others.
    """
    points = measured(result.curve)
    close = neighbourhood(points, result.rank)
    figure, panels = _canvas(form, f"Validation loss, {loss_unit(result)}", panels=2 if close else 1)
    for axes, shown in zip(panels, [points, close], strict=False):
        _draw_curve(axes, shown, result.rank, form)
    if close:
        panels[1].set_title(f"the same from rank {close[0].rank} on", loc="left", color=MUTED, **_title(form))
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        unique = dict(zip(labels, handles, strict=True))
        columns = len(unique) if form.name == "wide" else 1
        figure.legend(
            unique.values(), unique.keys(), loc="outside lower left", ncols=columns, **_legend(form)
        )
    described = ", ".join(f"rank {point.rank}: {point.loss:.4f}" for point in points[:40])
    return _svg(figure, f"rank-{form.name}", f"Validation loss against rank. {described}")


def loss_against_step(result: Result, form: Format) -> str:
    """Training loss of every candidate; the looks and the decision are marked on the axis of steps."""
    figure, (axes,) = _canvas(form, f"Training loss, {loss_unit(result)}")
    diverged = {candidate.rank for candidate in result.candidates if candidate.status == "diverged"}
    last_step = max((series.steps[-1] for series in result.history if series.steps), default=1)
    # A decision in the first twelfth would be squeezed against the left edge: then steps go by their logarithm.
    by_log = 0 < 12 * result.decision.step < last_step
    scale = math.log if by_log else float
    bins_a_unit = form.points / scale(last_step) if by_log else min(1.0, form.points / last_step)
    ranks = sorted({series.rank for series in result.history})
    sound: list[float] = []
    for series in sorted(result.history, key=lambda series: series.rank):
        steps, losses = averaged(series, lambda step: round(bins_a_unit * scale(step)))
        chosen, lost = series.rank == result.rank, series.rank in diverged
        if not lost:
            sound += losses
        axes.plot(
            steps,
            losses,
            color=ACCENT if chosen else RAMP[ranks.index(series.rank) * len(RAMP) // len(ranks)],
            lw=2 if chosen else 1.3,
            ls=(0, (3, 2)) if lost else "-",
            marker="o" if len(steps) == 1 else None,
            zorder=3 if chosen else 2,
            label=f"{series.rank} (diverged)" if lost else str(series.rank),
        )
    if sound:  # a candidate that ran away must not flatten the others
        margin = 0.06 * (max(sound) - min(sound)) or 0.05
        axes.set_ylim(min(sound) - margin, max(sound) + margin)
    if by_log:
        axes.set_xscale("log")
        axes.set_xlim(0.95, last_step * 1.1)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, last_step * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("optimiser step", color=INK)
    looks = sorted({look.step for look in result.looks})
    floor = axes.get_xaxis_transform()
    axes.plot(looks, [0.015] * len(looks), ls="", marker="^", ms=5, color=MUTED, transform=floor, label="_")
    if result.decision.step < last_step:
        axes.axvline(result.decision.step, color=ACCENT, lw=1, zorder=1)
        _mark_above(axes, result.decision.step, "rank fixed", form)
    handles, labels = axes.get_legend_handles_labels()
    columns = min(form.columns, len(labels))
    axes.legend(handles, labels, title="rank", loc="upper right", ncols=columns, **_legend(form))
    names = ", ".join(str(rank) for rank in ranks)
    return _svg(figure, f"step-{form.name}", f"Training loss against optimiser step for ranks {names}.")


def looks(result: Result, form: Format) -> str:
    """How far each rank lay above the best one at each look: whether the order of ranks had settled."""
    figure, (axes,) = _canvas(form, f"Above the look's best, {loss_unit(result)}")
    shown = spread_out([look for look in result.looks if len(finite(look)) > 1], 8)
    everything: list[int] = []
    for i, look in enumerate(shown):
        pairs = finite(look)
        best_rank, best = min(pairs, key=lambda pair: pair[1])
        decisive = look.step == result.decision.step
        colour = ACCENT if decisive else RAMP[i * len(RAMP) // len(shown)]
        ranks = [rank for rank, _ in pairs]
        everything += ranks
        axes.plot(
            ranks,
            [loss - best for _, loss in pairs],
            color=colour,
            lw=2 if decisive else 1.3,
            ls="-" if look.source == "truncated" else (0, (4, 1.5)),
            zorder=3 if decisive else 2,
            label=f"step {look.step}",
        )
        axes.plot([best_rank], [0], marker="o", ms=6, mfc=PAPER, mec=colour, mew=1.6, zorder=4, clip_on=False)
    _rank_axis(axes, everything, form)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", ncols=len(shown) // 5 + 1, **_legend(form))
    return _svg(figure, f"looks-{form.name}", "Loss above the best rank, at each look at the validation set.")


def measured(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The points with a loss, by rank; of several of one rank and source the latest."""
    latest: dict[tuple[int, str], CurvePoint] = {}
    for point in sorted(curve, key=lambda point: point.step):
        if point.loss is not None:
            latest[point.rank, point.source] = point
    return sorted(latest.values(), key=lambda point: point.rank)


def finite(look: Look) -> list[tuple[int, float]]:
    """The look's (rank, loss) by rank, without diverged candidates."""
    pairs = zip(look.ranks, look.losses, strict=True)
    return sorted((rank, loss) for rank, loss in pairs if loss is not None)


def averaged(series: Series, bin_of: Callable[[int], int]) -> tuple[list[float], list[float]]:
    """Mean step and loss of each bin of steps; the bins are the same for every candidate."""
    bins: dict[int, list[tuple[int, float]]] = {}
    for step, loss in zip(series.steps, series.losses, strict=True):
        if loss is not None:
            bins.setdefault(bin_of(step), []).append((step, loss))
    steps = [sum(step for step, _ in pairs) / len(pairs) for pairs in bins.values()]
    losses = [sum(loss for _, loss in pairs) / len(pairs) for pairs in bins.values()]
    return steps, losses


def spread_out(items: Sequence[Look], most: int) -> list[Look]:
    """At most `most` of the items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def neighbourhood(points: Sequence[CurvePoint], rank: int) -> list[CurvePoint]:
    """The points from half the chosen rank on, if they span less than a fifth of the whole height."""
    close = [point for point in points if 2 * point.rank >= rank]
    if len({point.rank for point in close}) < 3:
        return []
    near, all_ = _columns(close)[1], _columns(points)[1]
    return close if 5 * (max(near) - min(near)) < max(all_) - min(all_) else []


def _draw_curve(axes: Axes, points: Sequence[CurvePoint], rank: int, form: Format) -> None:
    for source, label in (("direct", "trained at this rank"), ("truncated", "cut from a wider candidate")):
        line = [point for point in points if point.source == source]
        if not line:
            continue
        ranks, losses, ses = _columns(line)
        crowded = len(line) > 16
        colour, marker = (RAMP[6], "o") if source == "direct" else (RAMP[3], "D")
        face = colour if source == "direct" else PAPER
        size = 3.2 if crowded else 5.5
        axes.plot(ranks, losses, color=colour, lw=1.3, zorder=2)
        axes.plot(ranks, losses, marker, ms=size, mec=colour, mfc=face, mew=1.3, zorder=3, label=label)
        if crowded:
            low = [loss - se for loss, se in zip(losses, ses, strict=True)]
            high = [loss + se for loss, se in zip(losses, ses, strict=True)]
            axes.fill_between(ranks, low, high, color=colour, alpha=0.25, lw=0, zorder=1)
        else:
            axes.errorbar(ranks, losses, ses, fmt="none", ecolor=colour, elinewidth=1.3, capsize=3, zorder=2)
        priced = [(point.rank, point.objective) for point in line if point.objective is not None]
        if any(point.penalty for point in line) and len(priced) > 1:
            ranks, objectives = zip(*priced, strict=True)
            axes.plot(ranks, objectives, color=MUTED, lw=1.3, ls=(0, (1, 1.6)), zorder=1, label=PRICED)
    axes.axvline(rank, color=ACCENT, lw=1, zorder=0)
    ranks, losses, _ = _columns([point for point in points if point.rank == rank])
    axes.plot(ranks, losses, "o", ms=10, mfc="none", mec=ACCENT, mew=1.8, zorder=4)
    _rank_axis(axes, [rank, *(point.rank for point in points)], form)
    _mark_above(axes, rank, f"chosen: {rank}", form)


def _columns(points: Sequence[CurvePoint]) -> tuple[list[int], list[float], list[float]]:
    ranks = [point.rank for point in points]
    return ranks, [point.loss or 0.0 for point in points], [point.se or 0.0 for point in points]


def _legend(form: Format) -> dict[str, Any]:
    return {
        "frameon": False,
        "labelcolor": INK,
        "handlelength": 1.5,
        "fontsize": form.font,
        "title_fontsize": form.font,
    }


def _title(form: Format) -> dict[str, Any]:
    return {"fontsize": form.font, "pad": 2.5 * form.font}


def _canvas(form: Format, title: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure whose panels lie side by side on a wide page, one above the other on a narrow one."""
    columns = panels if form.name == "wide" else 1
    rows = panels // columns
    figure = Figure(figsize=(form.width / 72, rows * form.height / 72), layout="constrained")
    figure.patch.set_visible(False)
    all_axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for axes in all_axes:
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.grid(axis="y", color=RULE, lw=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(axis="both", colors=MUTED, labelcolor=INK, labelsize=form.font, length=0, pad=5)
        axes.tick_params(axis="x", length=3.5)
        axes.xaxis.label.set_fontsize(form.font)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    all_axes[0].set_title(title, loc="left", color=INK, **_title(form))
    return figure, all_axes


def _rank_axis(axes: Axes, ranks: Sequence[int], form: Format) -> None:
    axes.set_xscale("log", base=2)
    low, high = min(ranks), max(ranks)
    ticks = [2**i for i in range(high.bit_length() + 1) if low <= 2**i <= high] or [low]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlim(low / 1.25, high * 1.25)
    axes.set_xlabel("rank", color=INK, fontsize=form.font)


def _mark_above(axes: Axes, x: float, text: str, form: Format) -> None:
    axes.annotate(
        text,
        (x, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 4),
        textcoords="offset points",
        color=ACCENT,
        fontsize=form.font,
        ha="center",
    )


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element; `name` makes its ids unique within a page."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    label = f'class="{name.rsplit("-", 1)[1]}" role="img" aria-label="{escape(description)}"'
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', label, svg, count=1)
    for role, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{role}, {light})")
    return svg
