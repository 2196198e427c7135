"""What all figures share: palette, sizes, axes, and the way from a drawing to inline SVG.

Every figure is drawn in the light palette; each colour then becomes a CSS variable with that colour as
its fallback, so that one drawing serves light and dark pages. The same input gives the same bytes.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

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
NARROW = Format(name="narrow", width=350, height=300, font=11.5, points=80, columns=2)


def legend_style(form: Format) -> dict[str, Any]:
    return {"frameon": False, "labelcolor": INK, "handlelength": 1.5, "fontsize": form.font}


def canvas(form: Format, title: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure whose panels lie side by side on a wide page, one above the other on a narrow one."""
    columns = panels if form.name == "wide" else 1
    rows = panels // columns
    figure = Figure(figsize=(form.width / 72, rows * form.height / 72), layout=ConstrainedLayoutEngine(hspace=0.08))
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
    heading(all_axes[0], title, INK, form)
    return figure, all_axes


def heading(axes: Axes, text: str, colour: str, form: Format) -> None:
    # The gap leaves room for what `mark_above` writes.
    axes.set_title(text, loc="left", color=colour, fontsize=form.font, pad=2.5 * form.font)


def rank_axis(axes: Axes, ranks: Sequence[int], form: Format) -> None:
    axes.set_xscale("log", base=2)
    low, high = min(ranks), max(ranks)
    powers = [2**i for i in range(high.bit_length()) if low <= 2**i]
    ticks = powers if len(powers) > 1 else sorted(set(ranks))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlim(low / 1.25, high * 1.25)
    axes.set_xlabel("rank", color=INK, fontsize=form.font)


def mark_above(axes: Axes, x: float, text: str, form: Format) -> None:
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


def to_svg(figure: Figure, name: str, description: str) -> str:
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
