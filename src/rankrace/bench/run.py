"""`rankrace bench run`: fills what is missing of an experiment."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from rankrace.bench.experiment import Job, narrowed, read_experiment
from rankrace.bench.job import SAVE_S
from rankrace.bench.local import run_inline, run_processes
from rankrace.bench.ray import run_ray
from rankrace.bench.record import Record, hardware
from rankrace.bench.store import Store, check, due
from rankrace.interrupt import Interrupted, Interrupts
from rankrace.session import chosen_device


def run_experiment(
    path: Path,
    out: Path,
    *,
    model: str | None = None,
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[str] | None = None,
    runner: str = "local",
    slots: int = 1,
    device: str = "auto",
    memory_gib: float = 6.0,
    stop_after: float | None = None,
    retry: bool = False,
    save_s: float = SAVE_S,
) -> tuple[int, int, int]:
    """Runs all that is missing, and records what fails.

    Args:
        model: where the experiment's model lies, if not under its name.
        methods, tasks, seeds: only these of the experiment's.
        slots: runs at once; 0: one after another in this process.
        memory_gib: free memory of the GPU that a further run beside others wants; 0: do not look.
        stop_after: minutes after which no new run starts.
        retry: run again what has failed.

    Returns:
        How many runs were done now, how many of them failed, how many are still missing.

    Raises:
        RankraceError: a bad experiment, or a folder that cannot be used.
        Interrupted: Ctrl-C or SIGTERM; the runs in hand were saved.
    """
    experiment = narrowed(read_experiment(path, model), methods=methods, tasks=tasks, seeds=seeds)
    where = chosen_device("auto" if runner == "ray" else device)  # the cluster's GPUs may be elsewhere
    console, store = Console(stderr=True, highlight=False), Store(out)
    began, tried = time.monotonic(), set[str]()

    def left() -> list[Job]:
        return [job for job in due(experiment, records, retry=retry) if job.key not in tried]

    def upcoming(working: set[str]) -> list[Job]:
        if interrupts.asked:
            raise Interrupted("the same command again")
        if stop_after is not None and time.monotonic() - began > 60 * stop_after:
            return []
        return [job for job in left() if job.key not in working]

    def chosen() -> Iterator[Record]:
        if runner == "ray":
            return run_ray(experiment, store, upcoming, device, save_s, max(1, slots))
        if slots == 0:
            return run_inline(experiment, store, upcoming, device, save_s)
        return run_processes(experiment, store, upcoming, device, save_s, slots, memory_gib)

    with store.locked(), Interrupts() as interrupts:
        records = store.records()
        for path in store.set_aside():
            console.print(f"Set aside, and run again: {path} was no whole record", markup=False, soft_wrap=True)
        check(experiment, records)
        others = sorted({r["hardware"]["device"] for r in records.values() if r["status"] == "done"}
                        - {hardware(where)["device"]})  # fmt: skip
        if others:
            console.print(f"{len(records)} records are there, made on {', '.join(others)}: only what is missing is "
                          f"run, and goes among them. For runs of your own give another --out than {out}.",
                          markup=False, soft_wrap=True)  # fmt: skip
        failed = 0
        try:
            for record in chosen():
                tried.add(record["key"])
                records[record["key"]] = record
                failed += record["status"] == "failed"
                console.print(line(record, len(tried), len(left())), markup=False, soft_wrap=True)
        finally:
            store.index(records)
        return len(tried), failed, len(left())


def line(record: Record, done: int, left: int) -> str:
    """What is said of a finished run."""
    if record["status"] == "failed":
        found = "failed: " + record["error"].splitlines()[0]
    else:
        scores = "  ".join(f"{name} {value:.2f}" for name, value in record["metrics"].items())
        loss, seconds = record["validation_loss"], record["time"]["train_s"]
        found = f"{scores or 'tuning'}  validation {loss:.4f}  {seconds:.1f} s"
    return f"[{done}, {left} left] {record['key']}  {found}"
