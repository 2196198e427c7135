"""`rankrace bench table`: what the records of a results folder say, method by method.

Legend: n seeds of a cell.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankrace.bench.claims import AGAIN, alone, claims
from rankrace.bench.paired import Difference, difference, t_975
from rankrace.bench.record import Record
from rankrace.bench.store import outdated
from rankrace.errors import RankraceError
from rankrace.methods import METHODS
from rankrace.methods.method import AVERAGE
from rankrace.tasks import TASKS
from rankrace.tasks.glue import GLUE, glue_score


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one task."""

    values: tuple[float, ...]
    """The task's first metric, of each seed."""
    seeds: tuple[int, ...]
    behind: Difference
    """The best method less this one."""
    best: bool
    parameters: float
    """Means over the seeds, as the costs that follow."""
    train_s: float
    """Of the runs that had a GPU to themselves, if there are such."""
    search_s: float
    slots: int
    """The most runs at once that those timed shared their GPU with, themselves counted."""
    peak_bytes: float | None

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def half_width(self) -> float:
        """Of the 95% interval of the mean over seeds; NaN with one seed."""
        return t_half_width(self.values)

    @property
    def tie(self) -> bool:
        return not self.best and self.behind.tie


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method over all tasks. Times are sums over `Table.timed` of means over seeds."""

    method: str
    cells: dict[str, Cell]
    glue: float | None
    """The mean over the GLUE tasks, if it has run on all of them that there are in the table."""
    parameters: float
    """Mean over those tasks."""
    ranks: tuple[int, ...]
    train_s: float | None
    """With the search, without the tuning of the learning rate; None where it would compare nothing."""
    search_s: float | None
    tuning_s: float
    peak_bytes: float | None
    """The largest, of those tasks."""
    at_edge: tuple[str, ...]
    """Tasks whose best learning rate was the smallest or the largest that was tried."""
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    model: str
    tasks: tuple[str, ...]
    common: tuple[str, ...]
    """The tasks on which every method in the table has run: only there costs can be compared."""
    timed: tuple[str, ...]
    """Those of them on which each had its GPU to itself at least once. Where there is none such: all of them, with
    the times of the methods that had on each; or, where these are fewer than two, with times of runs in company."""
    rows: list[Row]
    baselines: dict[str, dict[str, float]]
    """Constant answers: name → task → the task's first metric."""
    claims: list[str]
    notes: list[str]


def t_half_width(values: Sequence[float]) -> float:
    """t·s/√n: half the 95% interval of a mean."""
    n = len(values)
    if n < 2:
        return math.nan
    return t_975(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)


def build(records: dict[str, Record], times: dict[str, Record] | None = None) -> Table:
    """The table of the finished runs.

    Args:
        times: the same runs, or some of them, done again without others beside them: for the times alone.

    Raises:
        RankraceError: there is no finished run, or none of them is among `times`.
    """
    old = outdated(records)
    records = {key: record for key, record in records.items() if key not in old}
    records = records if times is None else with_times(records, times)
    runs = [r for r in records.values() if not r["tuning"] and r["status"] == "done"]
    if not runs:
        raise RankraceError(
            "there is no finished run to make a table of",
            why="every run is missing or failed",
            fix="run `rankrace bench run` first; runs/*.json say what failed",
        )
    tasks = tuple(task for task in TASKS if any(r["task"] == task for r in runs))
    methods = [m for m in METHODS if any(r["method"] == m for r in records.values())]
    cells = {task: cells_of(task, [r for r in runs if r["task"] == task]) for task in tasks}
    measured = [m for m in methods if any(m in cells[task] for task in tasks)]
    common = tuple(task for task in tasks if all(m in cells[task] for m in measured))
    undisturbed = {(r["method"], r["task"]) for r in alone(runs)}
    clean = tuple(task for task in common if all((m, task) in undisturbed for m in measured))
    timed = clean or common
    apart = [m for m in measured if all((m, task) in undisturbed for task in timed)]
    in_company = not clean and len([m for m in apart if m != "base"]) < 2
    rows = [
        row_of(method, tasks, common, timed, cells, records, None if in_company else method in apart)
        for method in methods
    ]
    return Table(
        model=runs[0]["settings"]["model"], tasks=tasks, common=common, timed=timed, rows=rows,
        baselines=baselines_of(runs), claims=claims(runs), notes=notes_of(rows, runs, common, timed, in_company),
    )  # fmt: skip


def baselines_of(runs: list[Record]) -> dict[str, dict[str, float]]:
    """Answers that need no model → task → mean metric over seeds, whose training rows have not the same commonest."""
    by_seed: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        for name, scores in run["baselines"].items():
            by_seed.setdefault((name, run["task"]), {})[run["seed"]] = scores[TASKS[run["task"]].metrics[0]]
    found: dict[str, dict[str, float]] = {}
    for (name, task), values in by_seed.items():
        found.setdefault(name, {})[task] = float(np.mean(list(values.values())))
    return found


def with_times(records: dict[str, Record], times: dict[str, Record]) -> dict[str, Record]:
    """The records, those of them that are among `times` with what they cost there."""
    again = {key: r for key, r in times.items() if key in records and r["status"] == "done" and not r["tuning"]}
    different = [key for key, r in again.items() if r["fingerprint"] != records[key]["fingerprint"]]
    if different or not again:
        raise RankraceError(
            f"{different[0]} was run with other settings" if different else "no run of the table was done again",
            why="its time would be that of something else",
            fix="copy the tuning's records into the folder of --times, and run the same experiment into it",
        )
    costs = {key: {AGAIN: {"time": r["time"]}} for key, r in again.items() if r["slots"] <= 1}
    return {key: r | costs.get(key, {}) for key, r in records.items()}


def cells_of(task: str, runs: list[Record]) -> dict[str, Cell]:
    """By method; the best ones have the highest mean metric over seeds.

    Raises:
        RankraceError: the runs have not the same test rows.
    """
    hashes = {r["data"]["test_sha256"] for r in runs if "test_sha256" in r["data"]}  # older records have none
    if len({(len(r["rows"]), r["settings"]["test_max"]) for r in runs}) > 1 or len(hashes) > 1:
        raise RankraceError(
            f"the runs on {task} have different test rows",
            why="a difference between scores on different rows compares nothing",
            fix="keep experiments of different test_max in different folders",
        )
    metric = TASKS[task].metrics[0]
    by_method: dict[str, list[Record]] = {}
    for record in sorted(runs, key=lambda r: r["seed"]):
        by_method.setdefault(record["method"], []).append(record)
    means = {method: float(np.mean([r["metrics"][metric] for r in found])) for method, found in by_method.items()}
    best = max(means, key=lambda method: means[method])
    return {
        method: Cell(
            values=tuple(r["metrics"][metric] for r in found),
            seeds=tuple(r["seed"] for r in found),
            behind=difference(by_method[best], found),
            best=means[method] == means[best],
            **costs_of(found),
        )
        for method, found in by_method.items()
    }


def costs_of(runs: list[Record]) -> dict[str, Any]:
    """Of one method on one task, as `Cell` has them."""
    apart, peaks = alone(runs), [r["peak_bytes"] for r in runs if r["peak_bytes"] is not None]
    timed = apart or runs
    return {
        "parameters": float(np.mean([r["parameters"] for r in runs])),
        "train_s": float(np.mean([r["time"]["train_s"] for r in timed])),
        "search_s": float(np.mean([r["time"]["search_s"] for r in timed])),
        "slots": 1 if apart else max(r["slots"] for r in runs),
        "peak_bytes": float(np.mean(peaks)) if peaks else None,
    }


def row_of(
    method: str,
    tasks: Sequence[str],
    common: Sequence[str],
    timed: Sequence[str],
    cells: dict[str, dict[str, Cell]],
    records: dict[str, Record],
    apart: bool | None,
) -> Row:
    """Args:
    apart: it was timed with a GPU to itself; None: no times are, and those in company are shown.
    """
    mine = {task: cells[task][method] for task in tasks if method in cells[task]}
    runs = [r for r in records.values() if r["method"] == method]
    done = [r for r in runs if r["status"] == "done" and not r["tuning"]]
    tuning = [r for r in runs if r["status"] == "done" and r["tuning"]]
    on = {task: [r for r in done if r["task"] == task] for task in common}

    def total(name: str) -> float:
        """Σ over tasks of the mean over seeds."""
        found = [on[task] if apart is None else alone(on[task]) for task in timed]
        return sum(float(np.mean([r["time"][name] for r in some])) for some in found if some)

    glue = [task.name for task in GLUE if task.name in tasks]
    metrics = {
        t: {m: float(np.mean([r["metrics"][m] for r in done if r["task"] == t])) for m in TASKS[t].metrics}
        for t in glue
        if t in mine
    }
    peaks = [r["peak_bytes"] for found in on.values() for r in found if r["peak_bytes"] is not None]
    sizes = [float(np.mean([r["parameters"] for r in found])) for found in on.values() if found]
    return Row(
        method=method,
        cells=mine,
        glue=glue_score(metrics) if glue and len(metrics) == len(glue) else None,
        parameters=float(np.mean(sizes)) if sizes else 0.0,
        ranks=tuple(r["rank"] for r in done if r["rank"] is not None),
        train_s=None if apart is False else total("train_s"),
        search_s=None if apart is False else total("search_s"),
        tuning_s=sum(r["time"]["train_s"] for r in tuning if r["task"] in timed),
        peak_bytes=max(peaks) if peaks else None,
        at_edge=tuple(task for task in mine if edge(task, done, tuning)),
        failures=tuple(f"{r['key']}: {r['error'].splitlines()[0]}" for r in runs if r["status"] == "failed"),
    )


def edge(task: str, done: list[Record], tuning: list[Record]) -> bool:
    scales = [r["scale"] for r in tuning if r["task"] == task]
    used = {r["scale"] for r in done if r["task"] == task}
    return bool(scales) and bool(used & {min(scales), max(scales)})


def gaps_of(row: Row, tasks: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Tasks, or some seeds of them, that this method has not been run on."""
    gaps = []
    for task in tasks:
        there = row.cells[task].seeds if task in row.cells else ()
        if lacking := [str(seed) for seed in seeds if seed not in there]:
            gaps.append(f"{task} {', '.join(lacking)}" if there else task)
    return gaps


def of_documents(runs: list[Record], task: str) -> str:
    """Where rows share documents, how many these are: so many independent examples there are."""
    found = next((r["documents"] for r in runs if r["task"] == task and r["documents"]), [])
    return f" in {len(set(found))} documents" if len(set(found)) < len(found) else ""


def cut(runs: list[Record], task: str) -> str:
    """How many test rows did not fit; records before 27 November do not say."""
    most = max(r["data"].get("test_truncated", 0) for r in runs if r["task"] == task)
    return f", {most:,} of them cut to fit" if most else ""


def trained_on(runs: list[Record], task: str) -> str:
    """How many rows, and which."""
    some = [r["data"] for r in runs if r["task"] == task]
    counts = sorted({data["train_examples"] for data in some})
    rows = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return f"{task} {rows} rows ({some[0]['how']})"


def notes_of(
    rows: list[Row], runs: list[Record], common: Sequence[str], timed: Sequence[str], in_company: bool
) -> list[str]:
    """What a reader must know, a sentence each."""
    devices = sorted({r["hardware"]["device"] for r in runs})
    commits = sorted({str(r["commit"])[:12] + ("+" if r["dirty"] else "") for r in runs})
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items() if k != "device") for r in runs})
    names = sorted({r["experiment"] for r in runs})
    sizes = {r["task"]: len(r["rows"]) for r in runs}
    seeds = sorted({seed for row in rows for cell in row.cells.values() for seed in cell.seeds})
    most_slots = max(r["slots"] for r in runs)
    tested = ", ".join(f"{task} {n:,}{of_documents(runs, task)}{cut(runs, task)}" for task, n in sizes.items())
    averaging = any(r["method"].endswith(AVERAGE) for r in runs)
    ends = f"; those named {AVERAGE} may end with the average of their values, as validation rows have it" * averaging
    notes = [
        f"Experiment: {', '.join(names)} (`rankrace bench run experiments/{names[0]}.yaml`).",
        f"Seeds {', '.join(map(str, seeds))}; ± is half the 95% t interval of the mean over seeds, and says nothing "
        "of other test rows.",
        "Bold: the highest mean. †: not to be told from it (with 95% confidence, by the difference paired "
        "over test rows and seeds, and Student's t of the rows' documents; for F1 of classes "
        "and Matthews' correlation the share of right rows"
        + ("; for STS-B closeness, 100 where the number is right and 0 where it is 5 off" if "stsb" in sizes else "")
        + ").",
        f"Test rows: {tested}. They chose nothing.",
        "Trained on: " + "; ".join(trained_on(runs, task) for task in sizes) + ".",
        "Time: wall clock of preparing and training, the search within it; tuning the learning rate apart. No method "
        f"stops early{ends}. Times are sums over {', '.join(timed) or 'no task'}, parameters means over "
        f"{', '.join(common) or 'no task'}.",
        f"Device: {', '.join(devices)}. Commit: {', '.join(commits)} (+: with local changes). "
        f"Versions: {'; '.join(versions)}.",
    ]  # fmt: skip
    if most_slots > 1 and not in_company:
        notes.append("Some runs shared the machine, or a GPU of it, with others. Times are only of runs that had it "
                     "to themselves, and missing for methods that had not; those of the tuning may not have had "
                     "it.")  # fmt: skip
    elif most_slots > 1:
        notes.append(f"Up to {most_slots} runs shared the machine, or a GPU of it, and no task was timed without "
                     "others by two methods: times are longer than they need be, and by how much differs. Against "
                     "the claims stand those that had a GPU to themselves, where both have such.")  # fmt: skip
    if any(row.glue is not None for row in rows):
        counted = ", ".join(task.name for task in GLUE if task.name in sizes)
        notes.append(f"GLUE: the mean over {counted}, each by the mean of its metrics (MRPC: F1 and accuracy).")
    notes.append("Peak memory: the largest of a method's runs. Against the claims stand means over seeds, summed "
                 "over tasks.")  # fmt: skip
    smaller = Counter(r["method"] for r in runs if any("Out of memory" in note for note in r.get("notes", [])))
    if smaller:
        found = ", ".join(f"{method} {count}" for method, count in sorted(smaller.items()))
        notes.append(f"Runs that went on in smaller passes after running out of memory beside others: {found}.")
    missing = [f"{row.method} ({', '.join(gaps)})" for row in rows if (gaps := gaps_of(row, list(sizes), seeds))]
    if missing:
        notes.append(f"Missing runs, tasks and seeds of them: {'; '.join(missing)}. Means are over what is there.")
    edges = [f"{row.method} ({', '.join(row.at_edge)})" for row in rows if row.at_edge]
    if edges:
        notes.append(f"Best learning rate at the edge of those tried: {'; '.join(edges)}.")
    notes += [f"Failed: {failure}." for row in rows for failure in row.failures]
    return notes
