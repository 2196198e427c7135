"""Runs the jobs of an experiment on this machine.

slots = 0: one after another in this process, so that nothing is loaded twice.
slots ≥ 1: each run in a process of its own, so many at once; one that is killed is recorded and the rest goes on.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from rankrace.bench.experiment import Experiment, Job
from rankrace.bench.job import Stopped, perform
from rankrace.bench.record import Record, begun, failed, write_record
from rankrace.bench.store import Store
from rankrace.interrupt import Interrupted

POLL_S = 0.2
STOPPED = 130
"""The exit code of a run that a signal stopped, and that can go on."""
Next = Callable[[set[str]], list[Job]]
"""Keys of runs in progress → jobs that may start now."""


def run_inline(experiment: Experiment, store: Store, upcoming: Next, device: str, save_s: float) -> Iterator[Record]:
    """One after another in this process."""
    while jobs := upcoming(set()):
        try:
            yield perform(experiment, jobs[0], store.folder, device, save_s, slots=0)
        except Stopped:
            raise Interrupted("the same command again") from None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_processes(
    experiment: Experiment, store: Store, upcoming: Next, device: str, save_s: float, slots: int, memory_gib: float
) -> Iterator[Record]:
    """Each in a process of its own, at most `slots` at once; on a GPU only where `memory_gib` are free."""
    # A server that has all modules loaded, and no GPU in use, forks: a run starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rankrace.bench.job"])
    working: dict[str, tuple[Job, ForkServerProcess]] = {}
    folder = store.folder.absolute()
    try:
        while True:
            for job in upcoming(set(working)):
                if len(working) >= slots or not has_room(device, memory_gib, bool(working)):
                    break
                log = folder / "logs" / f"{job.key}.log"
                process = context.Process(target=work, args=(log, experiment, job, folder, device, save_s, slots))
                process.start()
                working[job.key] = (job, process)
            if not working:
                return
            time.sleep(POLL_S)
            for key, (job, process) in list(working.items()):
                if process.exitcode is not None:
                    del working[key]
                    if process.exitcode != STOPPED:  # it is missing still
                        yield outcome(experiment, job, folder, process.exitcode, slots)
    finally:
        for _, process in working.values():
            process.terminate()  # the run saves itself
        for _, process in working.values():
            process.join()


def work(log: Path, experiment: Experiment, job: Job, folder: Path, device: str, save_s: float, slots: int) -> None:
    """What the process of a run does; all that it prints goes to the log."""
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as stream:
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)
    try:
        perform(experiment, job, folder, device, save_s, slots)
    except (Stopped, KeyboardInterrupt):
        sys.exit(STOPPED)


def outcome(experiment: Experiment, job: Job, folder: Path, code: int, slots: int) -> Record:
    """The record that the process wrote, or one that says how it ended without."""
    if code == 0:
        return json.loads((folder / "runs" / f"{job.key}.json").read_text(encoding="utf-8"))
    how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
    if code == -9:
        how += " (out of memory?)"
    return record_failure(experiment, job, folder, f"the run's process was {how}; see logs/{job.key}.log", slots)


def record_failure(experiment: Experiment, job: Job, folder: Path, error: str, slots: int) -> Record:
    """For a run whose process cannot say so itself any more."""
    record = begun(experiment, job, slots) | failed(error)
    write_record(folder, record)
    return record


def has_room(device: str, memory_gib: float, others: bool) -> bool:
    """Whether another run fits on the GPU. The first one starts in any case: it says itself what is missing."""
    if not others or memory_gib == 0 or device == "cpu" or not torch.cuda.is_available():
        return True
    free, _ = torch.cuda.mem_get_info()
    return free / 2**30 >= memory_gib
