"""The figures of the report, each as an <svg> element."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from rankrace.report.canvas import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    RAMP,
    Format,
    canvas,
    heading,
    legend_style,
    mark_above,
    rank_axis,
    to_svg,
)
from rankrace.report.text import loss_unit
from rankrace.result import CurvePoint, Look, Result, Series


def loss_against_rank(result: Result, form: Format) -> str:
    """Validation loss of every rank compared, with paired errors, and the chosen one.

    Where the smallest ranks lie so high that the others look level, a second panel shows the others.
    """
    points = measured(result.curve)
    close = neighbourhood(points, result.rank)
    figure, panels = canvas(form, f"Validation loss, {loss_unit(result)}", panels=2 if close else 1)
    for axes, shown in zip(panels, [points, close], strict=False):
        _draw_curve(axes, shown, result.rank, form)
    if close:
        heading(panels[1], f"the same from rank {close[0].rank} on", MUTED, form)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        unique = dict(zip(labels, handles, strict=True))
        columns = len(unique) if form.name == "wide" else 1
        figure.legend(unique.values(), unique.keys(), loc="outside lower left", ncols=columns, **legend_style(form))
    described = ", ".join(f"rank {point.rank}: {point.loss:.4f}" for point in points[:40])
    return to_svg(figure, f"rank-{form.name}", f"Validation loss against rank. {described}")


def loss_against_step(result: Result, form: Format) -> str:
    """Training loss of every candidate; the looks and the decision are marked on the axis of steps."""
    figure, (axes,) = canvas(form, f"Training loss, {loss_unit(result)}")
    diverged = {candidate.name for candidate in result.candidates if candidate.status == "diverged"}
    last_step = max((series.steps[-1] for series in result.history if series.steps), default=1)
    # An early decision would be squeezed against the left edge: then steps go by their logarithm.
    by_log = 0 < 12 * result.decision.step < last_step
    scale = math.log if by_log else float
    bins_a_unit = form.points / scale(last_step) if by_log else min(1.0, form.points / last_step)
    ranks = sorted({series.rank for series in result.history})
    sound: list[float] = []
    for series in sorted(result.history, key=lambda series: series.rank):
        steps, losses = averaged(series, lambda step: round(bins_a_unit * scale(max(1, step))))
        chosen, lost = series.rank == result.rank, series.name in diverged
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
            label=series.name + (" (diverged)" if lost else ""),
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
    looked = sorted({look.step for look in result.looks})
    floor = axes.get_xaxis_transform()
    axes.plot(looked, [0.015] * len(looked), "^", ms=5, color=MUTED, transform=floor, label="_")
    if result.decision.step < last_step:
        axes.axvline(result.decision.step, color=ACCENT, lw=1, zorder=1)
        mark_above(axes, result.decision.step, "rank fixed", form)
    handles, labels = axes.get_legend_handles_labels()
    columns = min(form.columns, len(labels))
    axes.legend(handles, labels, loc="upper right", ncols=columns, **legend_style(form))
    names = ", ".join(str(rank) for rank in ranks)
    return to_svg(figure, f"step-{form.name}", f"Training loss against optimiser step for ranks {names}.")


def looks(result: Result, form: Format) -> str:
    """How far each rank lay above the best one at each look: whether the order of ranks had settled."""
    figure, (axes,) = canvas(form, f"Above the look's best, {loss_unit(result)}")
    shown = spread_out([look for look in result.looks if len(finite(look)) > 1], 8)
    mixed = len({look.source for look in shown}) > 1
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
            label=f"step {look.step}, {look.source}" if mixed else f"step {look.step}",
        )
        axes.plot([best_rank], [0], marker="o", ms=6, mfc=PAPER, mec=colour, mew=1.6, zorder=4, clip_on=False)
    rank_axis(axes, everything, form)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", ncols=len(shown) // 5 + 1, **legend_style(form))
    return to_svg(figure, f"looks-{form.name}", "Loss above the best rank, at each look at the validation set.")


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
    near, whole = _columns(close)[1], _columns(points)[1]
    return close if 5 * (max(near) - min(near)) < max(whole) - min(whole) else []


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
            axes.plot(
                ranks,
                objectives,
                color=MUTED,
                lw=1.3,
                ls=(0, (1, 1.6)),
                zorder=1,
                label="with the price of the rank",
            )
    axes.axvline(rank, color=ACCENT, lw=1, zorder=0)
    ranks, losses, _ = _columns([point for point in points if point.rank == rank])
    axes.plot(ranks, losses, "o", ms=10, mfc="none", mec=ACCENT, mew=1.8, zorder=4)
    rank_axis(axes, [rank, *(point.rank for point in points)], form)
    mark_above(axes, rank, f"chosen: {rank}", form)


def _columns(points: Sequence[CurvePoint]) -> tuple[list[int], list[float], list[float]]:
    ranks = [point.rank for point in points]
    return ranks, [point.loss or 0.0 for point in points], [point.se or 0.0 for point in points]
