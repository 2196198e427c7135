"""`rankrace eval`: one adapter on one task."""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rankrace.config import RunConfig
from rankrace.data.encode import Encoder
from rankrace.data.encoded import Task as Kind
from rankrace.errors import RankraceError
from rankrace.evaluate.predict import predict
from rankrace.merge import attached, description, labels
from rankrace.methods.parameters import Parameters
from rankrace.session import chosen_device, chosen_dtype, recipe_of
from rankrace.tasks import find_task
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel, load_tokenizer, readable

MICRO_TOKENS = 4096


def evaluate(
    adapter: Path,
    task: str,
    *,
    model: str | None = None,
    part: str = "test",
    limit: int | None = None,
    generated: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """The task's metrics of base and adapter, and on how many rows.

    Args:
        model: the base, if it has moved.
        part: test or validation.
        limit: at most this many rows, the first ones.
        generated: let the model write the answer, also where it could choose.
        seed: draws the validation part of a task that has none of its own.

    Raises:
        RankraceError: no adapter there, it does not fit, an unknown task, or no rows.
    """
    chosen = find_task(task)
    base, kind = with_adapter(adapter, model, device)
    tokenizer = load_tokenizer(str(adapter))
    root = os.environ.get("RANKRACE_DATA")
    splits = chosen.splits(Path(root) if root else None, seed)
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
    return {**chosen.score(predictions, rows), "rows": len(rows)}


def with_adapter(adapter: Path, model: str | None, device: str) -> tuple[PreTrainedModel, Kind]:
    """The base with the adapter's layers in it, and what it is for.

    Raises:
        RankraceError: no adapter there, no such base, or one that does not fit.
    """
    described = description(adapter)
    name, where = model or described["base_model_name_or_path"], chosen_device(device)
    classes = described["task_type"] == "SEQ_CLS"
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    extra = labels(adapter, described["modules_to_save"] or []) if classes else {}
    dtype = chosen_dtype("auto", where)
    base = readable(name, lambda: auto.from_pretrained(name, dtype=dtype, **extra))
    peft_model: PeftModel = attached(base, adapter, name).to(where)
    inner = peft_model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    return inner, "classification" if classes else "causal"


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """Raises RankraceError for a value that the option does not take."""
    if value not in known:
        near = get_close_matches(value, known, n=1, cutoff=0.0)
        raise RankraceError(
            f"--{option} {value!r} is none of {', '.join(known)}",
            why="the command would not know what to do",
            fix=f"did you mean {near[0]!r}?",
        )
