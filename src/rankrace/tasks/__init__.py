"""Tasks with a prompt, three parts and a metric: one file each.

task = find_task("squad2")
parts = task.splits(data_root(), seed=0)
scores = task.score(predictions, parts.test)
"""

from difflib import get_close_matches

from rankrace.errors import RankraceError
from rankrace.tasks.glue import GLUE
from rankrace.tasks.gsm8k import GSM8K
from rankrace.tasks.medqa import MEDQA
from rankrace.tasks.scitldr import SCITLDR
from rankrace.tasks.source import data_root
from rankrace.tasks.squad2 import SQUAD2
from rankrace.tasks.task import Kind, Splits, Task, documents

__all__ = ["TASKS", "Kind", "Splits", "Task", "data_root", "documents", "find_task"]

TASKS: dict[str, Task] = {task.name: task for task in (SQUAD2, *GLUE, MEDQA, GSM8K, SCITLDR)}


def find_task(name: str) -> Task:
    """The task of a name; capitals and hyphens do not matter (SST-2 is sst2).

    Raises:
        RankraceError: no such task, with the nearest known one.
    """
    bare = name.lower().replace("-", "").replace("_", "")
    if bare in TASKS:
        return TASKS[bare]
    near = get_close_matches(bare, TASKS, n=1, cutoff=0.0)
    raise RankraceError(
        f"there is no task '{name}'; the nearest is '{near[0]}'.",
        why="a task says which rows, which prompt and which metric.",
        fix=f"use one of {', '.join(TASKS)}.",
    )
