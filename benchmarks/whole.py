"""A whole adaptive run by the clock, beside what is put together of its parts as benchmarks.speed does it.

    python -m benchmarks.whole --shape 7b --lengths squad2 --rows 6400 --out benchmarks/results/whole-7b.json
    python -m benchmarks.whole --shape tiny --lengths rte --rows 640 --device cpu --compile off --out /tmp/whole.json

benchmarks.speed extrapolates a training of hours from ten steps and one look. Here one epoch of few rows is run from
the first probe to the last figure, with the choice that it makes, and the same training is put together of steps and
looks measured by themselves: of as many wide steps, looks and ranks in them as the run had. Each half is a process
of its own, with nothing compiled before. Without files: no checkpoint, no report.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from benchmarks.lengths import ROWS
from benchmarks.shapes import SHAPES, command, peak_bytes, reset_peak, versions
from benchmarks.speed_bench import Bench, Found
from benchmarks.speed_ours import Ours, training_of
from rankrace.bank import quantize
from rankrace.device import wait_for
from rankrace.session import prepare


def parts(given: argparse.Namespace) -> Found:
    """Steps and looks, by themselves."""
    return Ours(Bench(given), rows=given.rows, epochs=1).measure(given.lengths)


def whole(given: argparse.Namespace) -> Found:
    """The run itself."""
    bench = Bench(given)
    config, data = training_of(bench, given.lengths, given.rows, epochs=1)
    model = bench.model()
    quantize(model, given.quantize, bench.device)
    reset_peak(bench.device)
    wait_for(bench.device)
    began = time.perf_counter()
    session = prepare(config, data, model, "causal")
    wait_for(bench.device)
    prepared = time.perf_counter()
    trainer, search = session.trainer, session.search
    for _ in search.run():
        pass
    wait_for(bench.device)
    trained = time.perf_counter()
    session.end()
    trainer.measure(session.fresh)
    wait_for(bench.device)
    ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "before_s": prepared - began,
        "base_s": session.base_seconds,
        "steps_s": trainer.seconds,
        "looks_s": search.state.look_seconds,
        "after_s": ended - trained,
        "entries": [[e.rank, e.steps] for e in search.state.entries],
        "looks": [[look.step, [p.rank for p in look.verdict.points]] for look in search.state.looks],
        "looked": len(search.examples),
        "fresh": len(session.fresh),
        "compile": session.config.compile,
        "graphs": session.config.cuda_graphs,
        "micro_tokens": session.config.micro_tokens,
        "peak_bytes": peak_bytes(bench.device),
        "versions": versions(bench.device),
    }


def together(whole: Found, parts: Found) -> Found:
    """The same run of its parts, in seconds."""
    (_, wide), *rest = whole["entries"]
    look = parts["look"]
    measured = sum(len(ranks) for _, ranks in whole["looks"]) + 1  # the 1: the base
    found = {
        "steps_s": (wide * parts["wide"]["step_ms"] + sum(n for _, n in rest) * parts["final"]["step_ms"]) / 1e3,
        "looking_s": len(whole["looks"]) * look["spectra_s"]
        + look["example_s"] * (whole["looked"] * measured + 2 * whole["fresh"]),
        "compiling_s": sum(parts[part]["compile_s"] for part in ("wide", "look", "final")),
    }
    return {**found, "seconds": sum(found.values())}


def in_a_process(go: Callable[[argparse.Namespace], Found], given: argparse.Namespace) -> Found:
    """With an empty cache of compiled code."""
    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        return pool.apply(go, (given,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--model", help="a folder with real weights of the shape, instead of random ones")
    parser.add_argument("--lengths", choices=ROWS, default="squad2")
    parser.add_argument("--rows", type=int, default=6400)
    parser.add_argument("--micro-tokens", type=int, default=0, help="0: rankrace's own choice")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--graphs", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--quantize", choices=("none", "nf4", "fp8"), default="none")
    parser.add_argument("--steps", type=int, default=10, help="that are timed by themselves")
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.skip, given.backend = "grid", "inductor"
    ran = in_a_process(whole, given)
    print(f"whole: {json.dumps(ran)}", flush=True)
    measured = in_a_process(parts, given)
    made = together(ran, measured)
    ratio = ran["seconds"] / made["seconds"]
    record = {"command": command("benchmarks.whole", given.out), "versions": ran.pop("versions"), "whole": ran,
              "together": made, "whole / together": round(ratio, 3), "parts": measured}  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"together: {json.dumps(made)}\nwhole {ran['seconds']:.1f} s, together {made['seconds']:.1f} s: {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
