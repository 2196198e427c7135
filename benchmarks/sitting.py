"""A short sitting at a machine that is not kept: many commands, a few at a time, and nothing of their records lost.

    python -m benchmarks.sitting QUEUE --workers 2 --seconds 520 --pack FOLDER/a.tar.xz      # there
    tar -xJf a.tar.xz                                                                       # here, in the repository

QUEUE is a file with a command a line: `python -m benchmarks.sweep --units rte:0,rte:1 …`; # begins a comment. Workers
take the next line as soon as they are free, until the time is up; what runs then is stopped. One sitting a GPU:
CUDA_VISIBLE_DEVICES says which. Records that are new or changed under results/ and benchmarks/results/ are packed now
and then and at the end, for a sitting may be cut off. Beside the pack: what the commands printed (.log), and how each
ended and how long it took (.done).
"""

import argparse
import os
import queue
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from pathlib import Path

FOLDERS = ("results", "benchmarks/results")


def records(root: Path, since: float) -> list[Path]:
    """What is new or changed; no file that is being written, and no checkpoint of a run in progress (work/)."""
    found = []
    for folder in FOLDERS:
        for path in (root / folder).rglob("*"):
            if path.suffix == ".partial" or path.name[0] == "." or "work" in path.relative_to(root).parts:
                continue
            with suppress(FileNotFoundError):  # gone since it was listed
                if path.is_file() and path.stat().st_mtime >= since:
                    found.append(path)
    return sorted(found)


def pack(to: Path, root: Path, since: float) -> None:
    """All of them, in one rename."""
    partial = to.with_name(f".{to.name}")
    with tarfile.open(partial, "w:xz") as archive:
        for path in records(root, since):
            with suppress(FileNotFoundError):
                archive.add(path, path.relative_to(root))
    partial.rename(to)


def work(lines: "queue.SimpleQueue[str]", until: float, log: Path, done: Path) -> None:
    """One worker: a command after the other."""
    while time.monotonic() < until:
        try:
            line = lines.get_nowait()
        except queue.Empty:
            return
        began = time.monotonic()
        with log.open("ab") as stream:
            command = [sys.executable if word == "python" else os.path.expandvars(word) for word in shlex.split(line)]
            running = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
            try:
                code = str(running.wait(max(0.0, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
                code = "stopped"
        with done.open("a") as stream:
            stream.write(f"{code} {time.monotonic() - began:.0f} s: {line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queue", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between packs")
    given = parser.parse_args()
    root, since, until = Path.cwd(), time.time(), time.monotonic() + given.seconds
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    for line in given.queue.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            lines.put(line.strip())
    log, done = (given.pack.with_name(given.pack.name + end) for end in (".log", ".done"))
    workers = [threading.Thread(target=work, args=(lines, until, log, done)) for _ in range(given.workers)]
    for worker in workers:
        worker.start()
    packed = time.monotonic()
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.2)
        if time.monotonic() - packed > given.every:
            pack(given.pack, root, since)
            packed = time.monotonic()
    pack(given.pack, root, since)
    print(done.read_text() if done.exists() else "nothing ran", end="")


if __name__ == "__main__":
    main()
