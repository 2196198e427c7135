"""Does a strategy find a rank that is known? A teacher = a tiny random LLaMA plus an update of planted rank r₀.

    python -m benchmarks.planted --kinds flat --ranks 3,6,10,12 --seeds 0-9 --strategies shrink --jobs 16
    python -m benchmarks.planted --summary

The student is the same model without the update. It trains on sequences that the teacher wrote, by rankrace's own
bank, trainer and search. A unit (kind, rank, seed, strategy) is one line of JSON in OUT/STRATEGY-KIND.jsonl;
units that are there already are skipped, so the study goes on over many sittings. A new strategy is one more name
in `strategies.py`.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from transformers.utils import logging

from benchmarks.planted.strategies import STRATEGIES
from benchmarks.planted.summary import summary
from benchmarks.planted.teacher import KINDS, Regime
from benchmarks.planted.unit import Unit, run_unit


def numbers(text: str) -> list[int]:
    """ "0-2,7" → 0, 1, 2, 7."""
    found = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def read(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder."""
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def run_all(units: list[Unit], run: Callable[[Unit], dict[str, Any]], jobs: int) -> Iterator[dict[str, Any]]:
    """Records as they are done, in any order."""
    if jobs == 1:
        yield from map(run, units)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, unit) for unit in units]):
            yield done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--ranks", default="3,6,10,12")
    parser.add_argument("--seeds", default="0-9")
    parser.add_argument("--strategies", default="shrink", help=", ".join(STRATEGIES))
    parser.add_argument("--steps", type=int, default=Regime.steps)
    parser.add_argument("--only-choice", action="store_true", help="end each training with the decision")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("results/selection/planted"))
    parser.add_argument("--summary", action="store_true", help="print the table of what is there")
    given = parser.parse_args()
    if given.summary:
        print(summary(read(given.out)))
        return
    logging.disable_progress_bar()
    regime = replace(Regime(), steps=given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    enough = [r for r in read(given.out) if r["end"] or given.only_choice]
    there = {(r["kind"], r["rank"], r["seed"], r["strategy"], r["steps"]) for r in enough}
    units = [
        Unit(kind=kind, rank=rank, seed=seed, strategy=strategy)
        for kind in given.kinds.split(",")
        for seed in numbers(given.seeds)
        for rank in numbers(given.ranks)
        for strategy in given.strategies.split(",")
    ]
    missing = [unit for unit in units if (*unit.key, regime.steps) not in there]
    print(f"{len(missing)} of {len(units)} units to run", flush=True)
    run = partial(run_unit, regime=regime, only_choice=given.only_choice)
    for done in run_all(missing, run, given.jobs):
        with (given.out / f"{done['strategy']}-{done['kind']}.jsonl").open("a") as file:
            file.write(json.dumps(done) + "\n")
        print(
            f"{done['strategy']} {done['kind']} r0 {done['rank']} seed {done['seed']}: pick {done['pick']}, "
            f"excess {done['end'] and done['end']['excess']}, {done['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
