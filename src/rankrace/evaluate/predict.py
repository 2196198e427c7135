"""Rows of a task → predictions, the way that the task wants them.

Options are compared by their likelihood on packed rows, as in training, and so are classes; answers are generated.

Shapes: K = 1 candidate, N examples.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rankrace.data.encode import Encoder
from rankrace.data.encoded import Encoded
from rankrace.data.encoded import Task as Kind
from rankrace.data.files import Rows
from rankrace.data.formats import Example, read_examples
from rankrace.errors import RankraceError
from rankrace.evaluate.generate import generate
from rankrace.tasks import Task
from rankrace.tasks.glue import labelled
from rankrace.training.loop import Trainer


def training_rows(task: Task, rows: Rows, *, classification: bool) -> Rows:
    """The columns that training needs, in the shape that the model needs.

    Raises:
        RankraceError: a classifier is asked for text.
    """
    if not classification:
        return [{c: row[c] for c in ("prompt", "completion", "document") if c in row} for row in rows]
    if task.kind != "label":
        raise RankraceError(
            f"{task.name} cannot be done by an encoder",
            why="its answers are text, or options that differ from row to row, and no fixed classes",
            fix="use a causal language model for it, or a GLUE task",
        )
    return labelled(rows)


def task_examples(task: Task, rows: Rows, kind: Kind) -> Sequence[Example]:
    """The rows as examples for a model of this kind.

    Raises:
        RankraceError: a classifier is asked for text.
    """
    return read_examples(training_rows(task, rows, classification=kind == "classification"), task.name)[1]


def predict(
    trainer: Trainer[Any],
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Rows,
    *,
    generated: bool = False,
) -> list[str]:
    """One prediction a row: the text generated, or the option chosen.

    Args:
        generated: let the model write the answer, also where it could choose.
    """
    if not rows:
        return []
    examples = task_examples(task, rows, encoder.task)
    if encoder.task == "classification":
        assert encoder.labels is not None
        classes = classified(trainer, encoder.encode_batch(examples), len(encoder.labels))
        return [encoder.labels[c] for c in classes]
    if task.kind == "generation" or generated:
        prompts = [e.input_ids[: int(np.argmax(e.supervised))] for e in encoder.encode_batch(examples)]
        return generate(trainer.model, tokenizer, prompts, task.max_new_tokens, trainer.recipe.micro_tokens)
    flat = [{"prompt": row["prompt"], "completion": option} for row in rows for option in row["options"]]
    encoded = iter(encoder.encode_batch(read_examples(flat, task.name)[1]))
    choices = [[next(encoded) for _ in row["options"]] for row in rows]
    best = likeliest(trainer, choices)
    return [row["options"][i].strip() for row, i in zip(rows, best, strict=True)]


def classified(trainer: Trainer[Any], encoded: Sequence[Encoded], classes: int) -> list[int]:
    """Each example's likeliest class: what is neither the first nor the second … is the last."""
    found_N, left = np.full(len(encoded), classes - 1), np.arange(len(encoded))
    for c in range(classes - 1):
        is_c = trainer.measure([replace(encoded[i], label=c) for i in left.tolist()]).correct_KN[0]
        found_N[left[is_c]] = c
        left = left[~is_c]
    return found_N.tolist()


def likeliest(trainer: Trainer[Any], choices: Sequence[Sequence[Encoded]]) -> list[int]:
    """Of each row's choices the one with the smallest loss, summed over its tokens and its EOS."""
    loss_N = trainer.measure([e for options in choices for e in options]).loss_KN[0]
    ends = np.cumsum([len(options) for options in choices])[:-1]
    return [int(np.argmin(part)) for part in np.split(loss_N, ends)]
