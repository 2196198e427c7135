"""What a run reads: the rows of its task, encoded for its model."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rankrace.config import RunConfig
from rankrace.data import Data, encode_splits, make_encoder, split_rows
from rankrace.data.encode import Encoder
from rankrace.data.files import Rows
from rankrace.data.formats import PromptCompletion
from rankrace.data.sources import SourceRows
from rankrace.data.split import draw
from rankrace.evaluate.predict import training_rows
from rankrace.tasks import Splits, Task, data_root, find_task
from rankrace.training.model import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Read:
    splits: Splits
    data: Data
    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase


def read(config: RunConfig, kind: Literal["causal", "classification"]) -> Read:
    """The task config.data for the model config.model. Runs in one process share what they read."""
    return _read(kind, config.model_copy(update={"out": Path(), "device": "auto"}).model_dump_json())


@lru_cache(maxsize=2)
def _read(kind: Literal["causal", "classification"], options: str) -> Read:
    config = RunConfig.model_validate_json(options)
    task = find_task(config.data)
    splits = task.splits(data_root(), config.seed)
    groups = "document" if "document" in splits.train[0] else None
    source = source_of(task, splits, classification=kind == "classification")
    examples = split_rows(source, config.model_copy(update={"group_column": groups}))
    tokenizer = load_tokenizer(config.model)
    encoder = make_encoder(config, tokenizer, kind, examples)
    return Read(splits=splits, data=encode_splits(examples, encoder), encoder=encoder, tokenizer=tokenizer)


def source_of(task: Task, splits: Splits, *, classification: bool) -> SourceRows:
    """Only the parts that may choose something: the test rows are not among them."""
    return SourceRows(
        train=training_rows(task, splits.train, classification=classification),
        validation=training_rows(task, splits.validation, classification=classification),
        train_where=f"{task.name} (train)",
        validation_where=f"{task.name} (validation)",
    )


def test_rows(splits: Splits, most: int | None) -> Rows:
    """The test part, or the same draw of it for every method and seed."""
    if most is None or most >= len(splits.test):
        return splits.test
    examples = [PromptCompletion(row["prompt"], row["completion"]) for row in splits.test]
    rows = {id(example): row for example, row in zip(examples, splits.test, strict=True)}
    return [rows[id(example)] for example in draw(examples, most, 0)]


def sha256(rows: Rows) -> str:
    """Of the rows and their order."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def commonest(rows: Rows) -> str:
    """The commonest answer of the training rows."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["completion"].strip()] = counts.get(row["completion"].strip(), 0) + 1
    return max(counts, key=lambda text: counts[text])
