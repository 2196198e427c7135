"""The lm-evaluation-harness as evaluator, for every task that it knows."""

from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from rankrace.errors import RankraceError
from rankrace.evaluate.command import with_adapter
from rankrace.training.model import load_tokenizer

BOOTSTRAPS = 1000
"""For the errors of metrics that are no means."""


def evaluate_with_lm_eval(
    adapter: Path, task: str, *, model: str | None = None, limit: int | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Its metrics of the adapter, as it gives them; those of several tasks with the task's name before each.

    Args:
        task: a task, group or tag that the harness knows, or a YAML file of its own kind.

    Raises:
        RankraceError: the harness is not installed, does not know the task, or the adapter is a classifier.
    """
    try:
        harness: Any = import_module("lm_eval")
        models: Any = import_module("lm_eval.models.huggingface")
        tasks: Any = import_module("lm_eval.tasks")
    except ImportError as error:
        raise RankraceError(
            "--evaluator lm-eval needs the package lm-eval",
            why="it is an optional part of rankrace",
            fix="pip install 'rankrace[eval]'",
        ) from error
    file = Path(task)
    manager = tasks.TaskManager(include_path=str(file.parent) if file.is_file() else None)
    name = name_in(file) if file.is_file() else task
    if name not in manager.all_tasks:
        raise RankraceError(
            f"lm-eval knows no task {name!r}",
            why="neither its own list nor a file of that name has it",
            fix="see `lm-eval ls tasks`, or give the YAML file of a task",
        )
    adapted = with_adapter(adapter, model, device)
    if adapted.task == "classification":
        raise RankraceError(
            f"{adapter} is a classifier",
            why="lm-eval measures causal language models",
            fix="use --evaluator rankrace",
        )
    wrapped = models.HFLM(pretrained=adapted.base, tokenizer=load_tokenizer(str(adapter)), batch_size=8)
    found = harness.simple_evaluate(
        model=wrapped, tasks=[name], limit=limit, task_manager=manager, bootstrap_iters=BOOTSTRAPS
    )
    return {
        (key if of_task == name else f"{of_task} {key}").removesuffix(",none"): float(value)
        for of_task, metrics in found["results"].items()
        for key, value in metrics.items()
        if isinstance(value, int | float)
    }


class _Names(yaml.SafeLoader):
    """Reads no more than names: what the harness means by a tag of its own (!function) is for the harness."""


_Names.add_multi_constructor("!", lambda loader, tag, node: None)


def name_in(file: Path) -> str:
    """Of the task or group that the file describes.

    Raises:
        RankraceError: it names none.
    """
    try:
        described = yaml.load(file.read_text(encoding="utf-8"), _Names)
    except yaml.YAMLError as error:
        raise RankraceError(
            f"{file} is not YAML: {error}", why="a task of lm-eval is described in that format", fix="mend the file"
        ) from error
    name = described.get("group") or described.get("task") if isinstance(described, dict) else None
    if not isinstance(name, str):
        raise RankraceError(
            f"{file} names no task of lm-eval",
            why="a description has a line `task: NAME`, or `group: NAME` and the tasks in it",
            fix="give a file of that kind, or the name of a task that lm-eval knows",
        )
    return name
