"""`rankrace eval`: one adapter on one task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rankrace.config import RunConfig
from rankrace.data.encode import Encoder
from rankrace.data.encoded import Task as Kind
from rankrace.data.files import Rows
from rankrace.data.hub import reach_hub
from rankrace.errors import RankraceError
from rankrace.evaluate.predict import predict
from rankrace.merge import attached, description, labels
from rankrace.methods.parameters import Parameters
from rankrace.select.statistics import paired_difference
from rankrace.session import chosen_device, chosen_dtype, recipe_of
from rankrace.tasks import Task, data_root, documents, find_task
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel, load_tokenizer, readable

MICRO_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A metric times 100, or a difference of two."""

    value: float
    se: float | None
    """Standard error over the rows, clustered by document; None for a metric of the whole set, or of one document."""


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
    peft_model, kind = with_adapter(adapter, model, device)
    if with_base and kind == "classification":
        raise RankraceError(
            f"{adapter} is a classifier: there is no base to compare it with",
            why="the classifier came with the adapter; the base has one drawn at random, or none",
            fix="leave out --base",
        )
    base = inner(peft_model)
    tokenizer = load_tokenizer(str(adapter))
    splits = chosen.splits(data_root(), seed)
    rows = (splits.test if part == "test" else splits.validation)[:limit]
    config = RunConfig(model="model", data="data", seed=seed)
    names: dict[int, str] | None = base.config.id2label if kind == "classification" else None  # pyright: ignore[reportAssignmentType]
    encoder = Encoder(
        tokenizer,
        task=kind,
        max_length=config.max_length,
        labels=None if names is None else tuple(names[i] for i in range(len(names))),
    )
    packed = PackedModel(base, Parameters(base, {}), kind)
    trainer = Trainer(packed, [], recipe_of(config, MICRO_TOKENS))
    predictions = predict(trainer, encoder, tokenizer, chosen, rows, generated=generated)
    without = None
    if with_base:
        with peft_model.disable_adapter():
            without = predict(trainer, encoder, tokenizer, chosen, rows, generated=generated)
    return Evaluation(metrics=compared(chosen, rows, predictions, without), rows=len(rows))


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
        return Figure(value=value, se=None if math.isnan(se) else se)

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


def with_adapter(adapter: Path, model: str | None, device: str) -> tuple[PeftModel, Kind]:
    """The base with the adapter on it, and what it is for.

    Raises:
        RankraceError: no adapter there, no such base, or one that does not fit.
    """
    described = description(adapter)
    name, where = model or described["base_model_name_or_path"], chosen_device(device)
    classes = described["task_type"] == "SEQ_CLS"
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    extra = labels(adapter, described["modules_to_save"] or []) if classes else {}
    dtype = chosen_dtype("auto", where)
    reach_hub(name)
    base = readable(name, lambda: auto.from_pretrained(name, dtype=dtype, **extra))
    return attached(base, adapter, name).to(where), "classification" if classes else "causal"


def inner(peft_model: PeftModel) -> PreTrainedModel:
    """The base with the adapter's layers in it."""
    found = peft_model.get_base_model()
    assert isinstance(found, PreTrainedModel)
    return found


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """Raises RankraceError for a value that the option does not take."""
    if value not in known:
        near = get_close_matches(value, known, n=1, cutoff=0.0)
        raise RankraceError(
            f"--{option} {value!r} is none of {', '.join(known)}",
            why="the command would not know what to do",
            fix=f"did you mean {near[0]!r}?",
        )
