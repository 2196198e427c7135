"""The lm-evaluation-harness as evaluator, for every task that it knows."""

from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from rankrace.errors import RankraceError
from rankrace.evaluate.command import with_adapter
from rankrace.training.model import load_tokenizer


def evaluate_with_lm_eval(
    adapter: Path, task: str, *, model: str | None = None, limit: int | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Its metrics of the adapter, as it gives them.

    Args:
        task: a name that the harness knows, or a YAML file of its own kind.

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
    name = yaml.safe_load(file.read_text(encoding="utf-8"))["task"] if file.is_file() else task
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
    found = harness.simple_evaluate(model=wrapped, tasks=[name], limit=limit, task_manager=manager, bootstrap_iters=0)
    metrics = {key: value for key, value in found["results"][name].items() if isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in metrics.items()}
