"""What is kept of a run: one JSON with all that is needed to judge it.

Settings, versions, commit, hardware, data, times, and every test row's score. It is written in one piece, so it is
there and whole, or not there.
"""

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rankrace.bench.experiment import Experiment, Job, fingerprint, settings_of
from rankrace.result import replace_text

SCHEMA = "rankrace/bench/1"
Record = dict[str, Any]


def begun(experiment: Experiment, job: Job, slots: int) -> Record:
    """What is known before the run.

    Args:
        slots: how many runs share the GPU, or without one the machine; 0: one after another in one process.
    """
    settings = settings_of(experiment, job)
    return {
        "schema": SCHEMA,
        "key": job.key,
        "experiment": experiment.name,
        **asdict(job),
        "status": "done",
        "error": None,
        "settings": settings,
        "fingerprint": fingerprint(settings),
        "slots": slots,
        **provenance(),
    }


def failed(error: str) -> Record:
    """What a failure puts in place of figures."""
    return {"status": "failed", "error": error, "metrics": {}, "validation_loss": None, "rows": [],
            "baselines": {}}  # fmt: skip


def write_record(folder: Path, record: Record) -> None:
    """One top-level key a line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items()]
    replace_text(folder / "runs" / f"{record['key']}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def remove_record(folder: Path, key: str) -> None:
    """The run is missing again."""
    (folder / "runs" / f"{key}.json").unlink()


def provenance() -> Record:
    """When it ran and which code: $RANKRACE_COMMIT (+: changed) where it is set, for copies that carry the code but
    not its history as it is; else git's commit."""

    def git(*arguments: str) -> str | None:
        package = Path(__file__).parents[1]
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    given = os.environ.get("RANKRACE_COMMIT")
    if given:
        commit, changes = given.rstrip("+"), "+" if given.endswith("+") else ""
    else:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ".")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "code_sha256": code_sha256(),
    }


@cache
def code_sha256() -> str:
    """Of the package's files as they are: it tells two trees apart that a commit does not."""
    package, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def hardware(device: torch.device) -> Record:
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_of": "device" if gpu else "process",
    }
