"""From the name of a data set to encoded training and validation examples.

    read = read_splits(config)                      # files or hub → rows → examples → two sides
    encoder = make_encoder(config, tokenizer, task, read)
    data = encode_splits(read, encoder)             # examples → tokens

or, where the task is known from the start, `load_data(config, tokenizer, task)`.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rankrace.config import RunConfig
from rankrace.data.encode import Encoder, encode_all, label_set
from rankrace.data.encoded import EncodedSet, Task
from rankrace.data.formats import Conversation, Example, PlainText, read_examples
from rankrace.data.sources import SourceRows, load_rows
from rankrace.data.split import draw, split_examples
from rankrace.errors import RankraceError


@dataclass(frozen=True, kw_only=True)
class ReadData:
    """Both sides of the data as examples, before any tokenizer is known."""

    train: list[Example]
    validation: list[Example]
    format: str
    """The shape of the rows: a name from the table in formats.py."""
    how_split: str
    sha256: str
    """Of the rows read: see SourceRows.sha256."""
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains and selects on."""

    train: EncodedSet
    validation: EncodedSet
    labels: tuple[str, ...] | None
    """The classes in the order of their indices; None for causal."""
    format: str
    how_split: str
    sha256: str
    notes: list[str]
    """What the user should be told about the data, a sentence each."""


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: Task) -> Data:
    """All steps at once.

    Raises:
        RankraceError: data that cannot be read, split or encoded.
    """
    read = read_splits(config)
    return encode_splits(read, make_encoder(config, tokenizer, task, read))


def read_splits(config: RunConfig) -> ReadData:
    """Read config.data (and config.validation) and split it."""
    return split_rows(load_rows(config.data, config.validation), config)


def split_rows(source: SourceRows, config: RunConfig) -> ReadData:
    """Rows, wherever they come from → examples on two sides."""
    form, train = read_examples(source.train, source.train_where, config.group_column)
    notes = [f"Read {len(train):,} rows of {source.train_where} as {form}."]
    validation: list[Example] | None = None
    if source.validation is not None:
        where = source.validation_where or "the validation rows"
        other, validation = read_examples(source.validation, where, config.group_column)
        if other != form:
            raise RankraceError(
                f"{where} has rows of the shape {other}, {source.train_where} of the shape {form}.",
                why="a loss on other rows does not say how well these are learned.",
                fix="write both in one shape.",
            )
        notes.append(f"Read {len(validation):,} validation rows of {where}.")
    splits = split_examples(train, validation, config.validation_fraction, config.validation_max, config.seed)
    notes += [f"Split: {splits.how}.", *splits.leaks]
    if splits.dropped_duplicates:
        notes.append(f"Left out {splits.dropped_duplicates:,} validation rows that are also training rows.")
    drawn = draw(splits.train, config.train_max, config.seed)
    if len(drawn) < len(splits.train):
        notes.append(f"Drew {len(drawn):,} of {len(splits.train):,} training rows (train_max).")
    return ReadData(
        train=drawn,
        validation=splits.validation,
        format=form,
        how_split=splits.how,
        sha256=source.sha256(),
        notes=notes,
    )


def make_encoder(config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: Task, read: ReadData) -> Encoder:
    """The encoder for a task; the classes are those of the training rows."""
    return Encoder(
        tokenizer,
        task=task,
        max_length=config.max_length,
        template=config.template,
        labels=label_set(read.train) if task == "classification" else None,
    )


def encode_splits(read: ReadData, encoder: Encoder) -> Data:
    """Encode both sides."""
    train, validation = encode_all(read.train, encoder), encode_all(read.validation, encoder)
    notes = list(read.notes)
    if encoder.task == "causal":
        first, has_template = read.train[0], encoder.tokenizer.chat_template is not None
        if isinstance(first, Conversation) and encoder.template == "auto" and not has_template:
            notes.append("The model has no chat template: conversations are written as plain text.")
        if isinstance(first, PlainText) and encoder.template == "chat":
            notes.append("Rows of plain text have no turns: --template chat has no effect on them.")
    limit = ", the most that the model takes" if encoder.max_length == encoder.tokenizer.model_max_length else ""
    for name, side in (("training", train), ("validation", validation)):
        if side.truncated:
            total = len(side) + side.dropped
            left = f"; {side.dropped:,} of them have no target left and are dropped" if side.dropped else ""
            notes.append(
                f"Cut {side.truncated:,} of {total:,} {name} examples to {encoder.max_length} tokens{limit}{left}."
            )
    return Data(
        train=train,
        validation=validation,
        labels=encoder.labels,
        format=read.format,
        how_split=read.how_split,
        sha256=read.sha256,
        notes=notes,
    )
