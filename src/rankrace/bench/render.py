"""A table as Markdown, LaTeX, CSV and HTML, and its two figures."""

import csv
import io
import math
from collections.abc import Callable
from html import escape
from pathlib import Path

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rankrace.bench.claims import OURS
from rankrace.bench.table import Cell, Row, Table
from rankrace.report.canvas import ACCENT, INK, RAMP, WIDE, canvas, to_svg
from rankrace.report.text import count, duration
from rankrace.result import replace_text
from rankrace.tasks import TASKS

Mark = Callable[[str], str]
Box = tuple[float, float, float, float]
"""Left, lower, right, upper."""


def write_all(table: Table, folder: Path) -> list[Path]:
    """table.md, .tex, .csv and .html, and a figure for each of the two costs."""
    figures = {f"quality-{cost}": figure(table, cost) for cost in ("parameters", "time")}
    texts = {
        "table.md": markdown(table),
        "table.tex": latex(table),
        "table.csv": as_csv(table),
        "table.html": html(table, list(figures.values())),
        **{f"{name}.svg": svg for name, svg in figures.items()},
    }
    for name, text in texts.items():
        replace_text(folder / name, text)
    return [folder / name for name in texts]


def header(table: Table) -> list[str]:
    names = [f"{task} {TASKS[task].metrics[0]}" for task in table.tasks]
    glue = ["GLUE"] if any(row.glue is not None for row in table.rows) else []
    return ["method", *names, *glue, "parameters", "rank", "time", "of it search", "tuning", "peak memory"]


def body(table: Table, bold: Mark, plus_minus: str, dagger: str) -> list[list[str]]:
    lines = []
    glue = "GLUE" in header(table)
    for row in table.rows:
        scores = [shown(row.cells.get(task), bold, plus_minus, dagger) for task in table.tasks]
        mean = [f"{row.glue:.2f}" if row.glue is not None else "–"] if glue else []
        lines.append([row.method, *scores, *mean, *costs(row, table)])
    for name, values in table.baselines.items():
        scores = [f"{values[task]:.2f}" if task in values else "–" for task in table.tasks]
        lines.append([f"always {name}", *scores, *(["–"] if glue else []), *["–"] * 6])
    return lines


def shown(cell: Cell | None, bold: Mark, plus_minus: str, dagger: str) -> str:
    if cell is None:
        return "–"
    text = f"{cell.mean:.2f}"
    text = bold(text) if cell.best else text
    if not math.isnan(cell.half_width):
        text += f" {plus_minus} {cell.half_width:.2f}"
    return text + (dagger if cell.tie else "")


def costs(row: Row, table: Table) -> list[str]:
    if not row.cells or not table.common:
        return ["–"] * 6
    low, high = (min(row.ranks), max(row.ranks)) if row.ranks else (0, 0)
    return [
        count(row.parameters),
        "–" if not row.ranks else f"{low}" if low == high else f"{low}–{high}",
        "–" if row.train_s is None else duration(row.train_s),
        duration(row.search_s) if row.search_s else "–",
        duration(row.tuning_s) if row.tuning_s else "–",
        "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB",
    ]


def markdown(table: Table) -> str:
    names = header(table)
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *body(table, lambda t: f"**{t}**", "±", " †")]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    claims = "Against the paper's claims:\n\n" + listed(table.claims) + "\n" if table.claims else ""
    return f"{table.model}\n\n{text}\n\n{claims}Notes:\n\n{listed(table.notes)}"


def listed(sentences: list[str]) -> str:
    return "".join(f"- {sentence}\n" for sentence in sentences)


def latex(table: Table) -> str:
    """With booktabs."""

    def safe(text: str) -> str:
        for character in "&%_#":
            text = text.replace(character, "\\" + character)
        return text.replace("–", "--").replace("†", r"$^\dagger$")

    names = header(table)
    rows = [[safe(c) for c in line] for line in body(table, lambda t: rf"\textbf{{{t}}}", r"$\pm$", "†")]
    lines = [" & ".join(line) + r" \\" for line in rows]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
            r"\toprule",
            " & ".join(safe(n) for n in names) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *(f"% {note}" for note in [*table.claims, *table.notes]),
            "",
        ]
    )


def as_csv(table: Table) -> str:
    """One line a method and task, with everything that the other forms round."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["method", "task", "metric", "mean", "half_width_95", "seeds", "behind_best", "behind_se", "best", "tie",
         "parameters", "train_s", "search_s", "slots", "peak_bytes"]
    )  # fmt: skip
    for row in table.rows:
        for task, cell in row.cells.items():
            behind = (cell.behind.mean, cell.behind.se, cell.best, cell.tie)
            writer.writerow(
                [row.method, task, TASKS[task].metrics[0], cell.mean, cell.half_width, len(cell.seeds), *behind,
                 cell.parameters, cell.train_s, cell.search_s, cell.slots, cell.peak_bytes]
            )  # fmt: skip
    return buffer.getvalue()


def html(table: Table, figures: list[str]) -> str:
    """One page that needs nothing else."""

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    names = line([escape(n) for n in header(table)], "th")
    rows = [line(cells, "td") for cells in body(table, lambda t: f"<b>{t}</b>", "±", " †")]
    notes = "".join(f"<li>{escape(note)}</li>" for note in [*table.claims, *table.notes])
    style = "body{font:15px/1.5 system-ui;margin:2rem;max-width:75rem}td,th{padding:.2rem .7rem;text-align:right}"
    style += "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#8881}svg{max-width:48rem}"
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(table.model)}</title><style>{style}</style>"
        f"<h1>{escape(table.model)}</h1><table>{names}{''.join(rows)}</table>"
        f"<ul>{notes}</ul>{''.join(figures)}\n"
    )


def points_of(table: Table, cost: str) -> list[tuple[float, float, str]]:
    """Of each trained method its cost, its mean score over the tasks that all methods have run on, and its name."""
    trained = [row for row in table.rows if row.parameters and row.cells]
    costs = [row.parameters if cost == "parameters" else row.train_s for row in trained]
    return [
        (x, sum(row.cells[task].mean for task in table.common) / len(table.common), row.method)
        for row, x in zip(trained, costs, strict=True)
        if table.common and x is not None
    ]


PLACES = ((5, 4, "left"), (5, -12, "left"), (-5, 4, "right"), (-5, -12, "right"))
"""Where a name may stand: pixels from its point to the end that is nearer to it, and which end that is."""


def figure(table: Table, cost: str) -> str:
    """The points, each with its method's name; rankrace's own in the accent's colour."""
    drawing, (axes,) = canvas(WIDE, f"Mean score over {', '.join(table.common) or 'no common task'}")
    points = points_of(table, cost)
    colours = [ACCENT if name in OURS else RAMP[5] for _, _, name in points]
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], color=colours, s=30, zorder=3)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters" if cost == "parameters" else "seconds of training, search included")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if cost == "parameters" else f"{x:g}"))
    drawing.draw_without_rendering()  # or nothing is known of where in pixels points are
    pixels = [axes.transData.transform((x, y)) * 72 / drawing.dpi for x, y, _ in points]
    named = [(float(x), float(y), name) for (x, y), (_, _, name) in zip(pixels, points, strict=True)]
    for (x, y, name), colour, (right, up, end) in zip(points, colours, places(named, WIDE.font), strict=True):
        axes.annotate(
            name, (x, y), xytext=(right, up), textcoords="offset points", ha=end, fontsize=WIDE.font,
            color=ACCENT if colour == ACCENT else INK,
        )  # fmt: skip
    return to_svg(drawing, f"quality-{cost}-wide", f"Mean score against {cost}, one point a method.")


def places(points: list[tuple[float, float, str]], font: float) -> list[tuple[int, int, str]]:
    """Of PLACES, for each point in pixels, the first where its name covers no other name and no other point."""
    dots = [(x - 3, y - 3, x + 3, y + 3) for x, y, _ in points]
    chosen, names = list[tuple[int, int, str]](), list[Box]()
    for i, point in enumerate(points):
        taken = [*dots[:i], *dots[i + 1 :], *names]
        free = (p for p in PLACES if not any(overlap(box(*point, *p, font), other) for other in taken))
        chosen.append(next(free, PLACES[0]))
        names.append(box(*point, *chosen[-1], font))
    return chosen


def box(x: float, y: float, name: str, right: int, up: int, end: str, font: float) -> Box:
    """What the name of a point covers at one of PLACES."""
    width = 0.58 * font * len(name)
    left = x + right - (width if end == "right" else 0)
    return left, y + up, left + width, y + up + font


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
