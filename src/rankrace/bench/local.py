"""Runs the jobs of an experiment on this machine.

slots = 0: one after another in this process, so that nothing is loaded twice (short sittings on a GPU).
slots ≥ 1: each run in a process of its own, so many at once; one that is killed is recorded and the rest goes on.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from rankrace.bench.experiment import Experiment, Job
from rankrace.bench.job import Stopped, perform
from rankrace.bench.record import Record, begun, failed, write_record
from rankrace.bench.store import Store
from rankrace.interrupt import Interrupted
from rankrace.result import replace_text

POLL_S = 0.2
Next = Callable[[set[str]], list[Job]]
"""Keys of runs in progress → jobs that may start now."""


def run_inline(experiment: Experiment, store: Store, upcoming: Next, device: str, save_s: float) -> Iterator[Record]:
    """One after another in this process."""
    while jobs := upcoming(set()):
        try:
            yield perform(experiment, jobs[0], store.folder, device, save_s, slots=0)
        except (Stopped, KeyboardInterrupt):
            raise Interrupted("the same command again") from None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_processes(
    experiment: Experiment, store: Store, upcoming: Next, device: str, save_s: float, slots: int, memory_gib: float
) -> Iterator[Record]:
    """Each in a process of its own, at most `slots` at once; on a GPU only where `memory_gib` are free."""
    working: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    try:
        while True:
            for job in upcoming(set(working)):
                if len(working) >= slots or not has_room(device, memory_gib, bool(working)):
                    break
                working[job.key] = (job, start(experiment, job, store.folder, device, save_s, slots))
            if not working:
                return
            time.sleep(POLL_S)
            for key, (job, process) in list(working.items()):
                if process.poll() is not None:
                    del working[key]
                    yield outcome(experiment, job, store.folder, process.returncode, slots)
    except KeyboardInterrupt:
        raise Interrupted("the same command again") from None
    finally:
        for _, process in working.values():
            process.terminate()  # the run saves itself
        for _, process in working.values():
            process.wait()


def start(
    experiment: Experiment, job: Job, folder: Path, device: str, save_s: float, slots: int
) -> subprocess.Popen[bytes]:
    request = folder / "work" / f"{job.key}.request.json"
    values = {"experiment": experiment.model_dump(mode="json"), "job": asdict(job), "folder": str(folder),
              "device": device, "save_s": save_s, "slots": slots}  # fmt: skip
    replace_text(request, json.dumps(values))
    log = folder / "logs" / f"{job.key}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "rankrace.bench.job", str(request)], stdout=stream, stderr=subprocess.STDOUT
        )


def outcome(experiment: Experiment, job: Job, folder: Path, code: int, slots: int) -> Record:
    """The record that the process wrote, or one that says how it ended without."""
    (folder / "work" / f"{job.key}.request.json").unlink(missing_ok=True)
    path = folder / "runs" / f"{job.key}.json"
    if code == 0:
        return json.loads(path.read_text(encoding="utf-8"))
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
