"""What the paper claims of the adaptive rank, against what the runs say: a sentence for each strategy.

Its claims: as good as LoRA r=16 with half the parameters; with the search faster than LoRA r=8, and in 0.4 of the
time and 0.65 of the memory of full fine-tuning.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from rankrace.bench.paired import difference
from rankrace.bench.record import Record
from rankrace.methods import METHODS
from rankrace.methods.method import AVERAGE
from rankrace.methods.rankrace import Rankrace
from rankrace.tasks import TASKS

OURS = tuple(name for name, method in METHODS.items() if isinstance(method, Rankrace))
QUALITY_OF = "lora-r16"
COSTS = (
    ("parameters", "lora-r16", 0.5),
    ("time", "lora-r8", 0.95),
    ("time", "full", 0.4),
    ("memory", "full", 0.65),
)
"""A cost, the method it is compared with, and the share of that method's cost that is claimed."""
AGAIN = "again"
"""In a record: what it cost when it was done again with a GPU to itself."""


def claims(runs: Sequence[Record]) -> list[str]:
    """Of each strategy among the finished runs; a comparison is over the tasks on which both have run."""
    found = []
    for strategy in OURS:
        sentences = [quality(runs, strategy), *(cost(runs, strategy, *claimed) for claimed in COSTS)]
        if any(sentences):
            found.append(f"{strategy}: {'; '.join(filter(None, sentences))}.")
    return found


def shared(runs: Sequence[Record], strategy: str, reference: str) -> dict[str, tuple[list[Record], list[Record]]]:
    """Task → the runs of both."""
    by_task: dict[str, tuple[list[Record], list[Record]]] = {}
    for run in runs:
        if run["method"] in (strategy, reference):
            by_task.setdefault(run["task"], ([], []))[run["method"] == reference].append(run)
    return {task: both for task, both in by_task.items() if all(both)}


def quality(runs: Sequence[Record], strategy: str) -> str:
    """On how many tasks it is at most one paired standard error behind, of those where the error is known."""
    reference = peer(strategy)
    found = {task: difference(*both) for task, both in shared(runs, strategy, reference).items()}
    known = {task: d for task, d in found.items() if d.known}
    unknown = ", ".join(task for task in found if task not in known)
    if not known:
        return f"not to be compared with {reference} on {unknown}, no error is known" if unknown else ""
    behind = [f"{task} {d.mean:+.1f} ± {d.se:.1f}{of_the_set(runs, strategy, task)}"
              for task, d in known.items() if d.mean < -d.se]  # fmt: skip
    text = f"at most one paired standard error behind {reference} on {len(known) - len(behind)} of {len(known)} tasks"
    more = [f"behind: {', '.join(behind)}"] * bool(behind) + [f"no error is known: {unknown}"] * bool(unknown)
    return text + (f" ({'; '.join(more)})" if more else "")


def peer(strategy: str) -> str:
    """What its quality is held against: an average with an average."""
    return QUALITY_OF + (AVERAGE if strategy.endswith(AVERAGE) else "")


def of_the_set(runs: Sequence[Record], strategy: str, task: str) -> str:
    """Where rows are compared by another score than the table's, because that is one of the whole set: the difference
    of that, in words."""
    metric = TASKS[task].metrics[0]
    if metric not in TASKS[task].of_the_set:
        return ""
    both = shared(runs, strategy, peer(strategy))[task]
    mine, theirs = (float(np.mean([run["metrics"][metric] for run in some])) for some in both)
    return f" right rows, {mine - theirs:+.1f} {metric}"


def cost(runs: Sequence[Record], strategy: str, what: str, reference: str, claimed: float) -> str:
    """Its share of the reference's cost, and whether that is as claimed. Times are of runs alone, if there are."""
    both = shared(runs, strategy, reference)
    if what == "time":  # never a run that had company beside one that had none
        undisturbed = {task: (alone(mine), alone(theirs)) for task, (mine, theirs) in both.items()}
        both = {task: some for task, some in undisturbed.items() if all(some)} or both
    mine, theirs = (sum(mean(some[i], what) for some in both.values()) for i in (0, 1))
    if not theirs or math.isnan(mine / theirs):
        return ""
    verdict = "as claimed" if mine / theirs <= claimed else f"claimed: {claimed:g}"
    return f"{what} {mine / theirs:.2f} of {reference} ({verdict})"


def mean(runs: Sequence[Record], what: str) -> float:
    """Over the seeds; NaN where it was not measured."""
    read: dict[str, Callable[[Record], float | None]] = {
        "parameters": lambda r: r["parameters"],
        "time": lambda r: r["time"]["train_s"],
        "memory": lambda r: r["peak_bytes"],
    }
    known = [value for value in map(read[what], runs) if value is not None]
    return float(np.mean(known)) if known else math.nan


def alone(runs: Sequence[Record]) -> list[Record]:
    """Those that had their GPU (or the machine) to themselves at least once, as they were then: only their times can
    be compared."""
    return [run | run.get(AGAIN, {}) for run in runs if AGAIN in run or run["slots"] <= 1]
