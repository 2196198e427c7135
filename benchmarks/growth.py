"""How cost grows: tokens a second and peak memory against tokens a pass, candidates, model size and sequence length.

    python -m benchmarks.growth --out benchmarks/results/growth-h100.json
    python -m benchmarks.growth --tiny --device cpu --out /tmp/growth.json        a dry run, in seconds

Random weights, random tokens, examples of one length: time and memory do not depend on the values. A point is some
whole optimiser steps, one pass each: one candidate of rank 16 and 2,048 tokens in examples of 256, but for what the
axis changes (candidates have 512 tokens each, and lengths divide 4,096). A pass runs as a CUDA graph where
`rankrace train` would choose one, and eagerly elsewhere (--compile: with compiled blocks). The peak is all that the
allocator had reserved, weights and optimiser included; on a CPU it is what the tensors of a step take beside them.

The record is written after every point, and one figure an axis beside it. Points for which the budget has no time
left are named in the record, and so are those that do not fit.

Shapes: K candidates, T tokens of a pass.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from transformers import PreTrainedModel

from benchmarks.lengths import Lengths
from benchmarks.shapes import (
    SHAPES,
    command,
    empty,
    forget,
    made_up,
    milliseconds,
    peak_bytes,
    random_model,
    reset_peak,
    versions,
)
from rankrace.bank import Bank
from rankrace.device import wait_for
from rankrace.plan import graph_worth
from rankrace.report.canvas import INK, RAMP, WIDE, canvas, to_svg
from rankrace.training.compiled import compile_blocks
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.memory import gauge
from rankrace.training.model import PackedModel
from rankrace.training.passes import Graphs
from rankrace.training.recompute import recompute_blocks

RANK, SUPERVISED = 16, 0.1


@dataclass(frozen=True, kw_only=True)
class Point:
    shape: str
    tokens: int = 2048
    """Of a pass, for one candidate; a step is one pass."""
    candidates: int = 1
    """Side by side."""
    length: int = 256
    """Of each example."""


AXES = {
    "tokens": ("tokens of a pass", lambda p: p.tokens),
    "candidates": ("candidates side by side", lambda p: p.candidates),
    "length": ("tokens of an example", lambda p: p.length),
    "size": ("billion weights in linear layers", lambda p: linear_weights(p.shape) / 1e9),
}


def points_of(given: argparse.Namespace) -> dict[str, list[Point]]:
    """By axis; on all but the last one the shape is the same, so that its model is made once."""
    shape = "tiny" if given.tiny else given.shape
    sizes = ["tiny"] if given.tiny else given.sizes.split(",")
    least = Point(shape=shape, tokens=128, length=32) if given.tiny else Point(shape=shape)
    tokens = (64, 128, 256) if given.tiny else (256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
    lengths = (16, 64) if given.tiny else (64, 256, 1024, 4096)
    counts = (1, 2) if given.tiny else (1, 2, 4, 8)
    return {
        "tokens": [replace(least, tokens=T, length=min(T, least.length)) for T in tokens],
        "candidates": [replace(least, candidates=K, tokens=least.tokens // 4) for K in counts],
        "length": [replace(least, length=n, tokens=2 * least.tokens) for n in lengths],
        "size": [replace(least, shape=name) for name in sizes],
    }


def linear_weights(shape: str) -> float:
    """Of all blocks."""
    s = SHAPES[shape]
    D, groups = s["hidden_size"], s.get("num_key_value_heads", s["num_attention_heads"]) / s["num_attention_heads"]
    return s["num_hidden_layers"] * D * ((2 + 2 * groups) * D + 3 * s["intermediate_size"])


class Bench:
    """One model at a time, with its bank."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.device = given, torch.device(given.device)
        self.loaded: tuple[str, PackedModel[Bank]] | None = None

    def model(self, shape: str) -> PackedModel[Bank]:
        if self.loaded is None or self.loaded[0] != shape:
            self.loaded = None
            forget(self.device)
            hf: PreTrainedModel = random_model(shape, self.device)
            self.loaded = shape, PackedModel(hf, Bank(hf), "causal")
            if self.given.compile:
                compile_blocks(self.loaded[1].bank, self.given.backend)
            if self.given.recompute:
                recompute_blocks(self.loaded[1].bank)
        return self.loaded[1]

    def measure(self, point: Point) -> dict[str, Any]:
        """Milliseconds of a step, tokens a second, peak bytes."""
        model, K, T = self.model(point.shape), point.candidates, point.tokens
        bank, count = model.bank, T // point.length
        lengths = Lengths(rows=0, tokens=[point.length] * count,
                          supervised=[max(1, round(SUPERVISED * point.length))] * count)  # fmt: skip
        rows = made_up(lengths, SHAPES[point.shape]["vocab_size"])
        recipe = Recipe(
            epochs=1000, max_steps=1000, batch_size=count, micro_tokens=K * T, schedule="constant", warmup=0.0,
            weight_decay=0.0, clip=1.0, seed=0,
            graphs=graph_worth(bank, K * T, "on" if self.given.compile else "off"),
        )  # fmt: skip
        bank.start([1], [1.0])  # in place of what the last point trained
        reset_peak(self.device)
        with gauge(self.device) as taken:
            trainer = Trainer(model, rows, recipe)
            bank.start([RANK] * K, [1.0] * K)
            trainer.start(bank.candidates, [1e-4] * K)

            def step(i: int) -> None:
                trainer.take_step(trainer.batch(i))

            for i in range(self.given.warm):
                step(i)
            wait_for(self.device)
            peak = peak_bytes(self.device) if self.device.type == "cuda" else taken.peak
        ms = statistics.median(milliseconds(step, range(self.given.steps), self.device))
        if trainer.notes:  # passes became smaller, and that is another measurement
            return {"does_not_fit": trainer.notes[0]}
        return {
            "graphs": isinstance(trainer.passes, Graphs), "step_ms": round(ms, 3), "peak_bytes": peak,
            "tokens_per_second": round(1e3 * K * T / ms, 1),
            "tflops": round(4 * linear_weights(point.shape) * K * T / ms / 1e9, 3),
        }  # fmt: skip


def measured(bench: Bench, points: dict[str, list[Point]], budget: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(axis, line) of every point, while there is time; the time a point takes includes making its model."""
    began, longest = time.perf_counter(), 0.0
    for axis, of_axis in points.items():
        for point in of_axis:
            start = time.perf_counter()
            line: dict[str, Any] = asdict(point)
            if start - began + longest > budget:
                yield axis, {**line, "left_out": "no time left"}
                continue
            empty(bench.device)  # of the last point: graphs' pools and the like
            try:
                line |= bench.measure(point)
            except torch.OutOfMemoryError as error:  # the model itself, or the candidates
                line["does_not_fit"] = str(error).splitlines()[0]
            took = time.perf_counter() - start
            longest = max(longest, took)
            yield axis, {**line, "took_s": round(took, 2)}


def figure(axis: str, lines: list[dict[str, Any]]) -> str | None:
    """Tokens a second, and memory; None: nothing was measured."""
    label, place = AXES[axis]
    fields = Point.__dataclass_fields__
    shown = [(place(Point(**{f: x[f] for f in fields})), x) for x in lines if "step_ms" in x]
    if not shown:
        return None
    places = [x for x, _ in shown]
    shapes = ", ".join(dict.fromkeys(x["shape"] for _, x in shown))
    drawing, panels = canvas(WIDE, f"tokens a second ({shapes})", panels=2)
    panels[1].set_title("peak memory, GB", loc="left", color=INK, fontsize=WIDE.font, pad=2.5 * WIDE.font)
    for axes, values in zip(
        panels, ([x["tokens_per_second"] for _, x in shown], [x["peak_bytes"] / 1e9 for _, x in shown]), strict=True
    ):
        axes.plot(places, values, "-o", color=RAMP[6], lw=1.6, ms=5)
        axes.set_ylim(0, 1.1 * max(values))
        log_axis(axes, places, label)
    told = ", ".join(f"{x:g}: {y['tokens_per_second']:.0f}" for x, y in shown)
    return to_svg(drawing, f"growth-{axis}-wide", f"Tokens a second against {label}. {told}")


def log_axis(axes: Axes, places: list[float], label: str) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted(set(places))
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 6)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:.2g}"))
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.set_xlabel(label, color=INK, fontsize=WIDE.font)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of all axes but that of size")
    parser.add_argument("--sizes", default="7b,1b,135m", help=f"of {', '.join(SHAPES)}; 13b takes 26 GB")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--tiny", action="store_true", help="small everything")
    parser.add_argument("--compile", action="store_true", help="some 25 s for each shape")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm", type=int, default=3, help="steps first; a graph is captured at the second")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="the record; figures go beside it")
    given = parser.parse_args()
    bench = Bench(given)
    axes = given.axes.split(",")
    record: dict[str, Any] = {
        "command": command("benchmarks.growth", given.out),
        "versions": versions(bench.device),
        "rank": RANK,
        "axes": {axis: [] for axis in axes},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for axis, line in measured(bench, {a: points_of(given)[a] for a in axes}, given.budget):
        record["axes"][axis].append(line)
        print(axis, json.dumps(line), flush=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    for axis, lines in record["axes"].items():
        svg = figure(axis, lines)
        if svg is not None:
            given.out.with_name(f"{given.out.stem}-{axis}.svg").write_text(svg + "\n")


if __name__ == "__main__":
    main()
