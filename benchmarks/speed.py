"""What a whole adaptive run costs against the usual stacks, part by part, in one process.

    python -m benchmarks.speed --shape 7b --lengths squad2,sst2 --out benchmarks/results/speed-7b.json
    python -m benchmarks.speed --shape 7b --parts ours --quantize nf4 --out benchmarks/results/speed-7b-nf4.json
    python -m benchmarks.speed --shape tiny --device cpu --backend aot_eager --steps 2 --warm 1 --out /tmp/speed.json

Models have random weights, examples random tokens of real lengths (benchmarks/lengths.json): time and memory do not
depend on the values. All parts take the same batches of 32 examples. The parts:

ours    rankrace as it sets itself up for a training of 3 epochs: the step of the wide start, of the final rank and of
        five candidates side by side (grid); a look. A whole adaptive run is put together from them: wide for 60% of
        the steps, as where ranks cannot be told apart before, then the final rank; all looks, first and last figures.
a       PEFT r=8, all linear layers, as Hugging Face's Trainer runs it: padded batches, autocast, fp32 adapter,
        clipping, fused AdamW. The loop is plain: Trainer's own overhead, its casting of all logits to float32, and
        its schedule are left out, in its favour. As many examples a pass as fit.
b       The strongest public stack: PEFT r=8 with a bfloat16 adapter and no dropout; the batch packed into rows
        without padding, position ids restarting; each decoder layer and the loss compiled with dynamic sizes; fused
        AdamW. Transformers' own attention for such rows wants the flash-attn package or fills a mask of all pairs;
        so it is given rankrace's (torch's flash attention over boundaries), in its favour.
c       Full fine-tuning as (a) runs, with stateless SGD and no masters, both in its favour: with AdamW a 7B does not
        fit. --full-optimizer adamw where it does (1B).
d       Five runs of (a), one after another, is five times (a).

Milliseconds of a step are medians after a warm-up; peaks are what torch's allocator had reserved, warm-up and weights
included, and beside them what tensors took at once (allocated_bytes); nothing is recomputed anywhere. Compiling is
what the warm-up took longer than its steps would have; a whole run has it in full, of every part.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.lengths import ROWS
from benchmarks.shapes import SHAPES, command, matmul_rates, versions
from benchmarks.speed_baselines import BASELINES, measure_baseline
from benchmarks.speed_bench import Bench, Found
from benchmarks.speed_ours import Ours

PARTS = ("ours", "a", "b", "c")
GOALS = {
    "useful work / matmul rate": {"squad2": (">=", 0.70)},
    "the same / rate kept up": {},
    "adaptive / a": {"squad2": ("<=", 0.35), "sst2": ("<=", 0.20)},
    "adaptive / b": {"squad2": ("<=", 0.85), "sst2": ("<=", 0.85)},
    "adaptive / c": {"squad2": ("<=", 0.25), "sst2": ("<=", 0.25)},
    "adaptive / d": {"squad2": ("<=", 0.10), "sst2": ("<=", 0.10)},
    "peak / peak of a": {"squad2": ("<=", 0.50), "sst2": ("<=", 0.50)},
    "five side by side / one": {"sst2": ("<=", 2.0)},
    "compiling / 10 minutes": {"squad2": ("<=", 0.05), "sst2": ("<=", 0.05)},
}


def table(results: dict[str, Found], rates: Sequence[float]) -> list[Found]:
    """A line for each figure and data set whose parts were measured."""
    lines = []
    for lengths, found in results.items():
        for name, figure in figures(found, preparation(results), rates).items():
            sign, goal = GOALS[name].get(lengths, ("", None))
            met = None if goal is None else (figure <= goal if sign == "<=" else figure >= goal)
            lines.append({"lengths": lengths, "what": name, "measured": round(figure, 3),
                          "goal": None if goal is None else f"{sign} {goal}", "met": met})  # fmt: skip
    return lines


def preparation(results: dict[str, Found]) -> dict[str, float]:
    """Seconds of each baseline: the first data set paid for what the others found compiled."""
    names = {name for found in results.values() for name in found} & set(BASELINES)
    return {n: max(found.get(n, {}).get("compile_s", 0.0) for found in results.values()) for n in names}


def figures(found: Found, prepare_s: dict[str, float], rates: Sequence[float]) -> dict[str, float]:
    """Those of GOALS for one data set."""
    if "ours" not in found:
        return {}
    ours, run, final = found["ours"], found["ours"]["run"], found["ours"]["final"]
    burst, kept_up = rates
    made = {
        "useful work / matmul rate": final["useful_tflops"] / burst,
        "the same / rate kept up": final["useful_tflops"] / kept_up,
        "compiling / 10 minutes": run["compiling_s"] / 600,
    }
    for name in BASELINES:
        if "step_ms" in found.get(name, {}):
            other = found[name]["step_ms"] / 1e3 * ours["run_steps"] + prepare_s[name]
            made[f"adaptive / {name}"] = run["seconds"] / other
            if name == "a":
                made["adaptive / d"] = run["seconds"] / (5 * other)
    if "a" in found and run["peak_bytes"]:
        made["peak / peak of a"] = run["peak_bytes"] / found["a"]["peak_bytes"]
    if "grid" in ours:
        made["five side by side / one"] = ours["grid"]["step_ms"] / final["step_ms"]
    return {name: made[name] for name in GOALS if name in made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--model", help="a folder with real weights of the shape, instead of random ones")
    parser.add_argument("--lengths", default="squad2,sst2", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--skip", default="", help="grid: without the five candidates")
    parser.add_argument(
        "--micro-tokens", type=int, default=0, help="of a packed pass; 0: rankrace's own choice, 8192 for (b)"
    )
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="ours")
    parser.add_argument("--graphs", choices=("auto", "on", "off"), default="auto", help="ours")
    parser.add_argument("--quantize", choices=("none", "nf4", "fp8"), default="none", help="ours")
    parser.add_argument("--peft-dropout", type=float, default=0.05, help="of (a); LoraConfig's own default is 0")
    parser.add_argument("--full-optimizer", choices=("sgd", "adamw"), default="sgd", help="of (c)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    logging.set_verbosity_error()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # nobody is to run eagerly unawares
    bench = Bench(given)
    record: Found = {
        "command": command("benchmarks.speed", given.out),
        "versions": versions(bench.device),
        "options": {k: str(v) for k, v in vars(given).items() if k != "out"},
        "matmul_tflops": matmul_rates(given.shape, bench.device, bench.dtype),
        "results": {lengths: {} for lengths in given.lengths.split(",")},
    }
    burst, kept_up = record["matmul_tflops"]
    print(f"plain products: {burst:.0f} TFLOP/s in a burst, {kept_up:.0f} kept up", flush=True)
    failed = False
    for part in given.parts.split(","):
        began = time.perf_counter()
        try:
            measured_part(part, bench, record, given.out)
        except Exception:  # one part that cannot run leaves the others their figures; the exit code tells
            failed = True
            traceback.print_exc()
            record.setdefault("failed", {})[part] = traceback.format_exc().strip().splitlines()[-1]
        print(f"{part}: {time.perf_counter() - began:.0f} s in all", flush=True)
        record["table"] = table(record["results"], record["matmul_tflops"])
        written(record, given.out)
    print(f"{'lengths':10} {'what':28} {'measured':>9} {'goal':>8}")
    for line in record["table"]:
        mark = {None: "", True: "met", False: "MISSED"}[line["met"]]
        print(f"{line['lengths']:10} {line['what']:28} {line['measured']:9.3f} {line['goal'] or '':>8} {mark}")
    sys.exit(failed)


def measured_part(part: str, bench: Bench, record: Found, out: Path) -> None:
    """All lengths with one model."""
    if part == "ours":
        measure = Ours(bench).measure
    else:
        baseline = BASELINES[part](bench)

        def measure(lengths: str) -> Found:
            return measure_baseline(bench, baseline, lengths)

    for lengths, found in record["results"].items():
        found[part] = measure(lengths)
        shown = {k: v for k, v in found[part].items() if k != "all_ms"}
        print(f"{part}, {lengths}: {json.dumps(shown, default=str)}", flush=True)
        written(record, out)


def written(record: Found, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
