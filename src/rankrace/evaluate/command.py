"""`rankrace eval`: one adapter on one task."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from rankrace.adapter import Adapted, load_adapted
from rankrace.config import RunConfig
from rankrace.data.encode import Encoder, encode_all
from rankrace.data.files import Rows
from rankrace.data.formats import Example, LabelledText
from rankrace.errors import RankraceError
from rankrace.evaluate.predict import predict, task_examples
from rankrace.methods.parameters import Parameters
from rankrace.select.statistics import paired_difference
from rankrace.session import chosen_device, chosen_dtype, recipe_of
from rankrace.tasks import Task, data_root, documents, find_task
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel, load_tokenizer
from rankrace.words import listed

MICRO_TOKENS = 4096
VERIFIED = 16
"""Rows of which the shortest are compared with the model's own forward."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A metric times 100, or a difference of two."""

    value: float
    se: float | None
    """Standard error over the rows, clustered by document; None for a metric of the whole set, of one document, or of
    rows that all score alike."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric."""

    adapter: Figure
    base: Figure | None
    """Of the model without the adapter, where that was asked for."""
    gain: Figure | None
    """The adapter's less the base's, paired row by row."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    metrics: dict[str, Compared]
    rows: int


def evaluate(
    adapter: Path,
    task: str,
    *,
    model: str | None = None,
    part: str = "test",
    limit: int | None = None,
    generated: bool = False,
    with_base: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> Evaluation:
    """The task's metrics, and on how many rows.

    Args:
        model: the base, if it has moved.
        part: test or validation.
        limit: at most this many rows, the first ones.
        generated: let the model write the answer, also where it could choose.
        with_base: those of the base beside them.
        seed: draws the validation part of a task that has none of its own.

    Raises:
        RankraceError: no adapter there, it does not fit, an unknown task, no rows, or no base to compare with.
    """
    chosen = find_task(task)
    adapted = with_adapter(adapter, model, device)
    base, kind = adapted.base, adapted.task
    if with_base and kind == "classification":
        raise RankraceError(
            f"{adapter} is a classifier: there is no base to compare it with",
            why="the classifier came with the adapter; the base has one drawn at random, or none",
            fix="leave out --base",
        )
    tokenizer = load_tokenizer(str(adapter))
    splits = chosen.splits(data_root(), seed)
    rows = (splits.test if part == "test" else splits.validation)[:limit]
    config = RunConfig(model="model", data="data", seed=seed)
    names: dict[int, str] | None = base.config.id2label if kind == "classification" else None  # pyright: ignore[reportAssignmentType]
    labels = None if names is None else tuple(names[i] for i in range(len(names)))
    encoder = Encoder(tokenizer, task=kind, max_length=config.max_length, labels=labels)
    if labels is not None and rows:
        refuse_other_classes(task, labels, task_examples(chosen, rows, kind))
    packed = PackedModel(base, Parameters(base, {}), kind)
    if rows:
        packed.verify_on(encode_all(task_examples(chosen, rows[:VERIFIED], kind), encoder).examples)
    trainer = Trainer(packed, [], recipe_of(config, base, MICRO_TOKENS))
    predictions = predict(trainer, encoder, tokenizer, chosen, rows, generated=generated)
    without = None
    if with_base:
        with adapted.model.disable_adapter():
            without = predict(trainer, encoder, tokenizer, chosen, rows, generated=generated)
    return Evaluation(metrics=compared(chosen, rows, predictions, without), rows=len(rows))


def refuse_other_classes(task: str, labels: tuple[str, ...], examples: Sequence[Example]) -> None:
    """Raises RankraceError where the rows have classes that the adapter has not."""
    asked = {e.label for e in examples if isinstance(e, LabelledText)}
    if not asked <= set(labels):
        raise RankraceError(
            f"the adapter's classes are {listed(labels)}; those of {task} are {listed(sorted(asked))}",
            why="they are told apart by their names",
            fix=f"train on rows with the labels of {task}, or evaluate a task with the adapter's",
        )


def compared(
    task: Task, rows: Rows, predictions: Sequence[str], without: Sequence[str] | None
) -> dict[str, Compared]:
    """By metric.

    Args:
        without: the predictions of the base, if there are any.
    """
    ours, ours_by_row = task.score(predictions, rows), task.row_scores(predictions, rows)
    cluster_N = np.array(documents(rows) or range(len(rows)))
    nothing_N = np.zeros(len(rows))

    def figure(value: float, metric: str, a: dict[str, list[float]], b: dict[str, list[float]] | None) -> Figure:
        if metric not in a:
            return Figure(value=value, se=None)
        b_N = nothing_N if b is None else np.array(b[metric])
        _, se = paired_difference(np.array(a[metric]), b_N, np.ones(len(rows)), cluster_N)
        # Where all rows score alike nothing was seen of the spread: an error of 0 would claim to know it.
        return Figure(value=value, se=se if se > 0 else None)

    own = {m: figure(value, m, ours_by_row, None) for m, value in ours.items()}
    if without is None:
        return {m: Compared(adapter=own[m], base=None, gain=None) for m in own}
    theirs, theirs_by_row = task.score(without, rows), task.row_scores(without, rows)
    return {
        m: Compared(
            adapter=own[m],
            base=figure(theirs[m], m, theirs_by_row, None),
            gain=figure(ours[m] - theirs[m], m, ours_by_row, theirs_by_row),
        )
        for m in own
    }


def with_adapter(adapter: Path, model: str | None, device: str) -> Adapted:
    """The base with the adapter on it, on the device, in the device's own type.

    Raises:
        RankraceError: no adapter there, no such base, one that does not fit, or no such device.
    """
    where = chosen_device(device)
    adapted = load_adapted(adapter, model, chosen_dtype("auto", where))
    adapted.model.to(where)
    return adapted


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """Raises RankraceError for a value that the option does not take."""
    if value not in known:
        near = get_close_matches(value, known, n=1, cutoff=0.0)
        raise RankraceError(
            f"--{option} {value!r} is none of {', '.join(known)}",
            why="the command would not know what to do",
            fix=f"did you mean {near[0]!r}?",
        )
