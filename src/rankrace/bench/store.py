"""The results folder: one JSON a run, an SQLite index of them, one runner at a time.

RESULTS/runs/*.json     the records; they alone are the truth
RESULTS/index.sqlite    made from them for queries: sqlite3 index.sqlite 'select method, avg(value) from runs …'
RESULTS/work/           checkpoints of runs in progress
RESULTS/logs/           what each run printed
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rankrace.bench.experiment import Experiment, Job, differences, fingerprint
from rankrace.bench.record import SCHEMA, Record
from rankrace.errors import RankraceError

COLUMNS = {
    "key": "text primary key", "experiment": "text", "method": "text", "task": "text", "seed": "integer",
    "scale": "real", "tuning": "integer", "status": "text", "error": "text", "metric": "text", "value": "real",
    "validation_loss": "real", "learning_rate": "real", "rank": "integer", "parameters": "integer",
    "train_s": "real", "search_s": "real", "peak_bytes": "integer", "slots": "integer", "device": "text",
    "commit_id": "text",
}  # fmt: skip


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.broken: list[Path] = []
        """Files among the records that are none, as `records` found them."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One runner at a time; the lock ends with the process that holds it.

        Raises:
            RankraceError: another runner works in this folder, or it cannot be written.
        """
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise RankraceError(
                f"cannot write {self.folder}: {error.strerror or error}",
                why="each run leaves a record there",
                fix="choose another --out",
            ) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RankraceError(
                    f"another runner is at work in {self.folder}",
                    why="both would do the same runs, and each would write over the other's records",
                    fix="wait for it, or choose another --out",
                ) from error
            yield
        finally:
            os.close(handle)

    def records(self) -> dict[str, Record]:
        """All whole records by key."""
        found, self.broken = {}, []
        for path in sorted(self.runs.glob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                if record["schema"] != SCHEMA or record["key"] != path.stem:
                    raise ValueError("it is no record of this kind")
                found[path.stem] = record
            except (ValueError, KeyError, TypeError):
                self.broken.append(path)
        return found

    def existing(self) -> dict[str, Record]:
        """`records`, of a folder that has to be there.

        Raises:
            RankraceError: it is no results folder.
        """
        if not self.runs.is_dir():
            raise RankraceError(
                f"{self.folder} is no results folder: there is no folder {self.runs}",
                why="a table is made of the records that `rankrace bench run` leaves there",
                fix="give what was its --out, by default results/NAME",
            )
        return self.records()

    def set_aside(self) -> list[Path]:
        """Renames what `records` found broken to *.broken, for these runs are done again; their new names."""
        return [path.rename(path.with_suffix(".json.broken")) for path in self.broken]

    def index(self, records: dict[str, Record]) -> None:
        """Makes index.sqlite anew."""
        partial = self.folder / ".index.partial"
        partial.unlink(missing_ok=True)
        with closing(sqlite3.connect(partial)) as database, database:
            database.execute(f"create table runs ({', '.join(f'{n} {kind}' for n, kind in COLUMNS.items())})")
            marks = ", ".join("?" * len(COLUMNS))
            rows = [[flat(record)[name] for name in COLUMNS] for record in records.values()]
            database.executemany(f"insert into runs values ({marks})", rows)
        partial.rename(self.folder / "index.sqlite")


def flat(record: Record) -> dict[str, Any]:
    """A record as a row of the index."""
    metric = next(iter(record["metrics"]), None)
    time, hardware = record.get("time", {}), record.get("hardware", {})
    more = {
        "metric": metric,
        "value": record["metrics"][metric] if metric else None,
        "train_s": time.get("train_s"),
        "search_s": time.get("search_s"),
        "device": hardware.get("device"),
        "commit_id": record["commit"],
    }
    return {name: more[name] if name in more else record.get(name) for name in COLUMNS}


def due(experiment: Experiment, records: dict[str, Record], *, retry: bool = False) -> list[Job]:
    """The runs that can start now: what is missing, tuning before the runs that need its outcome.

    Task by task, and in a task seed by seed, so that a sitting that ends early leaves whole columns of the table, or
    at least all methods with as many seeds.

    Args:
        retry: failed runs count as missing.
    """
    missing: list[Job] = []

    def wanted(job: Job) -> bool:
        record = records.get(job.key)
        return record is None or (retry and record["status"] == "failed")

    for task in experiment.tasks:
        tuned: dict[str, float] = {}
        for method in experiment.methods:
            tuning = tuning_jobs(experiment, method, task, records)
            open_ = [job for job in tuning if wanted(job)]
            missing += open_
            if not tuning:
                tuned[method] = 1.0 if method == "base" else experiment.tuning.scales[0]
            elif not open_:
                tuned[method] = best_scale(tuning, records)
        for seed in experiment.seeds:
            jobs = [Job(method=m, task=task, seed=seed, scale=scale, tuning=False) for m, scale in tuned.items()]
            missing += [job for job in jobs if wanted(job)]
    return missing


def tuning_jobs(experiment: Experiment, method: str, task: str, records: dict[str, Record]) -> list[Job]:
    """None where there is nothing to choose from or to train; one more where the best so far is at an edge."""
    tuning = experiment.tuning
    if len(tuning.scales) == 1 or method == "base":
        return []

    def job(scale: float) -> Job:
        return Job(method=method, task=task, seed=tuning.seed, scale=scale, tuning=True)

    jobs = [job(scale) for scale in sorted(tuning.scales)]
    for _ in range(tuning.beyond):
        if any(j.key not in records for j in jobs):
            break
        best, (low, next_), (before, high) = best_scale(jobs, records), jobs[:2], jobs[-2:]
        if best == low.scale:
            jobs = [job(float(f"{low.scale**2 / next_.scale:.2g}")), *jobs]
        elif best == high.scale:
            jobs = [*jobs, job(float(f"{high.scale**2 / before.scale:.2g}"))]
        else:
            break
    return jobs


def best_scale(tuning: list[Job], records: dict[str, Record]) -> float:
    """That of the lowest validation loss; of runs that failed none. 1 where nothing worked."""
    return lowest([records[job.key] for job in tuning])


def lowest(tuning: Iterable[Record]) -> float:
    """The scale of these runs' lowest validation loss; 1 where none has one."""
    losses = {record["scale"]: record["validation_loss"] for record in tuning}
    finite = {scale: loss for scale, loss in losses.items() if loss is not None}
    return min(finite, key=lambda scale: finite[scale]) if finite else 1.0


def outdated(records: dict[str, Record]) -> set[str]:
    """Runs at a learning rate that is no more the best, since a tuning run that had failed was done again."""
    tuning: dict[tuple[str, str], list[Record]] = {}
    for record in records.values():
        if record["tuning"]:
            tuning.setdefault((record["method"], record["task"]), []).append(record)
    best = {both: lowest(runs) for both, runs in tuning.items()}
    return {
        key for key, r in records.items()
        if not r["tuning"] and r["scale"] != best.get((r["method"], r["task"]), r["scale"])
    }  # fmt: skip


def check(experiment: Experiment, records: dict[str, Record]) -> None:
    """Raises RankraceError when a record of the grid was made with other settings than are asked for now."""
    for key, record in records.items():
        if record["method"] not in experiment.methods or record["task"] not in experiment.tasks:
            continue
        names = ("method", "task", "seed", "scale", "tuning")
        job = Job(**{name: record[name] for name in names})
        pairs = differences(experiment, job, record["settings"], record.get("config", {}))
        if pairs or fingerprint(record["settings"]) != record["fingerprint"]:
            differing = "; ".join(f"{k}: {before} there, {after} now" for k, (before, after) in sorted(pairs.items()))
            raise RankraceError(
                f"{key} was run with other settings ({differing or 'unknown'})",
                why="a table of runs with different settings compares nothing",
                fix="choose another --out, or put the old settings back",
            )
