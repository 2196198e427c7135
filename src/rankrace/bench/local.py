"""Runs the jobs of an experiment on this machine.

slots = 0: one after another in this process, so that nothing is loaded twice.
slots ≥ 1: so many processes at once, spread evenly over the GPUs. One that is killed is recorded; the rest goes on.

On a GPU a process does one run after another, since its start and the data cost as much as a short training; after a
failure, or if something is left in the GPU's memory, a fresh one takes its place. On a CPU each run has a process of
its own, whose peak of memory is then the run's.

A run that finds no memory beside others on its GPU goes again when the rest is done, with the GPU to itself.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path

import torch

from rankrace.bench.experiment import Experiment, Job
from rankrace.bench.job import Stopped, perform
from rankrace.bench.record import Record, begun, failed, remove_record, write_record
from rankrace.bench.store import Store
from rankrace.interrupt import Interrupted

POLL_S = 0.2
VISIBLE = "CUDA_VISIBLE_DEVICES"
STOPPED = 130
"""The exit code of a run that a signal stopped, and that can go on."""
LEFT_BYTES = 2**26
"""What may stay in a GPU's memory after a run: the libraries' own workspaces."""
Next = Callable[[set[str]], list[Job]]
"""Keys of runs in progress → jobs that may start now."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all processes of a sitting have in common."""

    experiment: Experiment
    folder: Path
    device: str
    save_s: float
    sharing: int
    """How many runs share a GPU, or the machine."""
    threads: int
    """Of each process."""


@dataclass(kw_only=True)
class Slot:
    """Room for one run at a time."""

    gpu: int | None
    process: ForkServerProcess | SpawnProcess | None = None
    pipe: Connection | None = None
    job: Job | None = None
    alone: bool = False
    """Nothing else may begin on the GPU."""

    def begin(self, job: Job, work: Work, context: ForkServerContext | SpawnContext, *, alone: bool = False) -> None:
        if self.process is not None and not self.process.is_alive():  # it died while it was idle
            self.release()
        if self.process is None:
            self.pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, work, self.gpu is not None))
            with sight_of(self.gpu), deaf_to_interrupts():
                process.start()
            theirs.close()
            self.process = process
        assert self.pipe is not None
        self.job, self.alone = job, alone
        self.pipe.send(job)

    def end(self) -> None:
        """The run is over."""
        self.job, self.alone = None, False

    def release(self) -> None:
        """Lets an idle process end, and forgets it."""
        if self.process is not None:
            assert self.pipe is not None
            self.pipe.close()
            self.process.join()
        self.process = self.pipe = None


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
    """In processes, at most `slots` runs at once; on a GPU a further one only where `memory_gib` are free."""
    gpus = gpus_of(device)
    # A server that has all modules loaded forks: a process starts at once. But no fork may use a GPU whose driver was
    # set up before it, and some libraries (bitsandbytes) do that when they are loaded.
    context = multiprocessing.get_context("spawn") if gpus else multiprocessing.get_context("forkserver")
    if not gpus:
        context.set_forkserver_preload(["rankrace.bench.preloaded"])
    places = [Slot(gpu=gpus[i % len(gpus)] if gpus else None) for i in range(slots)]
    work = Work(
        experiment=experiment, folder=store.folder.absolute(), device="cuda" if gpus else device, save_s=save_s,
        sharing=-(-slots // max(1, len(gpus))), threads=max(1, torch.get_num_threads() // slots),
    )  # fmt: skip
    crowded_out: set[str] = set()
    try:
        while True:
            jobs = upcoming({slot.job.key for slot in places if slot.job})
            for job in sorted(jobs, key=lambda job: job.key in crowded_out):
                slot, alone = free_slot(places), job.key in crowded_out
                if slot is None or not has_room(slot.gpu, memory_gib, places, alone=alone):
                    break
                slot.begin(job, work, context, alone=alone)
            busy = [slot for slot in places if slot.job]
            if not busy:
                return
            wait([slot.pipe for slot in busy if slot.pipe], POLL_S)
            for slot in busy:
                company = any(other is not slot and other.gpu == slot.gpu for other in busy)
                for record in finished(slot, work):
                    if company and slot.gpu is not None and ran_out_of_memory(record):
                        crowded_out.add(record["key"])
                        remove_record(store.folder, record["key"])
                    else:
                        yield record
    finally:
        for slot in places:
            if slot.process is not None and slot.job is not None:
                slot.process.terminate()  # the run saves itself
        for slot in places:
            slot.release()


def gpus_of(device: str) -> list[int]:
    """Those that runs may use: all, or the one asked for; none on a CPU."""
    if device == "cpu" or not torch.cuda.is_available():
        return []
    asked = None if device == "auto" else torch.device(device).index
    return list(range(torch.cuda.device_count())) if asked is None else [asked]


@contextmanager
def sight_of(gpu: int | None) -> Iterator[None]:
    """Processes that are started meanwhile see this GPU alone, from their first import on."""
    before = os.environ.get(VISIBLE)
    if gpu is not None:
        os.environ[VISIBLE] = before.split(",")[gpu] if before else str(gpu)
    try:
        yield
    finally:
        os.environ.pop(VISIBLE, None)
        if before is not None:
            os.environ[VISIBLE] = before


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile get no SIGINT. A terminal sends Ctrl-C to them, too, and the SIGTERM by
    which the runner then asks them to save would be taken for a second, impatient one."""
    resource_tracker.ensure_running()  # its start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def free_slot(slots: Sequence[Slot]) -> Slot | None:
    """Of those on the GPU with the fewest runs one whose process is there already, if there is one."""
    running = [slot.gpu for slot in slots if slot.job]
    closed = {slot.gpu for slot in slots if slot.alone}
    free = [slot for slot in slots if slot.job is None and slot.gpu not in closed]
    return min(free, key=lambda slot: (running.count(slot.gpu), slot.process is None), default=None)


def has_room(gpu: int | None, memory_gib: float, slots: Sequence[Slot], *, alone: bool = False) -> bool:
    """Whether another run fits on the GPU. The first one starts in any case: it says itself what is missing."""
    if gpu is None or not any(slot.job for slot in slots if slot.gpu == gpu):
        return True
    if alone:
        return False
    if memory_gib == 0:
        return True
    free, _ = torch.cuda.mem_get_info(gpu)
    return free / 2**30 >= memory_gib


def finished(slot: Slot, work: Work) -> Iterator[Record]:
    """The record of the slot's run, if it has ended and was not stopped."""
    job, process, pipe = slot.job, slot.process, slot.pipe
    assert job is not None
    assert process is not None
    assert pipe is not None
    try:
        if not pipe.poll():
            return
        stays = pipe.recv()
    except (EOFError, ConnectionError):  # it ended without a word
        process.join()
        code = process.exitcode
        assert code is not None
        slot.end()
        slot.release()
        if code not in (STOPPED, -signal.SIGTERM):  # a run that was asked to stop is missing still
            yield record_failure(work.experiment, job, work.folder, how_it_ended(job, code), work.sharing)
        return
    slot.end()
    if not stays:
        slot.release()
    yield json.loads((work.folder / "runs" / f"{job.key}.json").read_text(encoding="utf-8"))


def ran_out_of_memory(record: Record) -> bool:
    return record["status"] == "failed" and "out of memory" in record["error"].splitlines()[0].lower()


def how_it_ended(job: Job, code: int) -> str:
    how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
    if code == -signal.SIGKILL:
        how += " (out of memory?)"
    return f"the run's process was {how}; see logs/{job.key}.log"


def record_failure(experiment: Experiment, job: Job, folder: Path, error: str, slots: int) -> Record:
    """For a run whose process cannot say so itself any more."""
    record = begun(experiment, job, slots) | failed(error)
    write_record(folder, record)
    return record


# --- in the process


def serve(pipe: Connection, work: Work, on_gpu: bool) -> None:
    """Does the runs that come through the pipe, until it is closed; says after each whether it can do another."""
    os.setsid()  # a terminal that is closed ends the runner alone, and that lets this run save itself
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # where it comes of a server that was there already
    torch.set_num_threads(work.threads)
    threading.Thread(target=end_with_runner, daemon=True).start()
    try:
        while True:
            job: Job = pipe.recv()
            log_to(work.folder / "logs" / f"{job.key}.log")
            record = perform(work.experiment, job, work.folder, work.device, work.save_s, work.sharing)
            stays = on_gpu and record["status"] == "done" and is_clean()
            pipe.send(stays)
            if not stays:
                return
    except EOFError:  # the runner has nothing more to do
        return
    except (Stopped, KeyboardInterrupt):
        sys.exit(STOPPED)


def end_with_runner() -> None:
    """A run whose runner was killed saves itself and ends: another runner may be at work in the folder soon."""
    runner = multiprocessing.parent_process()
    assert runner is not None
    wait([runner.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def log_to(log: Path) -> None:
    """All that the process prints from now on goes there."""
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as stream:
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)


def is_clean() -> bool:
    """Whether the GPU's memory is as before the run: else the next one's peak would be wrong."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() <= LEFT_BYTES
