"""Preflight: what must never be trained on silently, and how rows look as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NoReturn

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rankrace.data import Data
from rankrace.data.encoded import FEW_DOCUMENTS, Encoded, EncodedSet, Task
from rankrace.errors import RankraceError
from rankrace.words import counted

FEW_TRAINING = 50
"""Fewer rows than these are sooner learnt by heart than learnt from."""
FEW_VALIDATION = 100
MANY_TRUNCATED = 0.05
SUPERVISED = "bold green"
CONTEXT = "dim"


@dataclass(frozen=True)
class Finding:
    """Something that may be meant, but that a user should know. Faults are raised, not found."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what} {self.fix}"


def checked_data(data: Data, tokenizer: PreTrainedTokenizerBase, task: Task, vocab_size: int | None = None) -> Data:
    """The same data, with what `check_encoded` found among their notes."""
    found = check_encoded(
        data.train, data.validation, tokenizer=tokenizer, task=task, vocab_size=vocab_size, labels=data.labels
    )
    return replace(data, notes=[*data.notes, *map(str, found)])


def check_encoded(
    train: EncodedSet,
    validation: EncodedSet,
    *,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    vocab_size: int | None = None,
    labels: tuple[str, ...] | None = None,
) -> list[Finding]:
    """Check both sides before a run.

    Args:
        vocab_size: rows of the model's embedding.
        labels: the classes, for classification.

    Raises:
        RankraceError: an example without a target; no EOS to learn in any example; two BOS in a row; every
            example cut to max_length; a token that the model does not have; a label outside the set.
    """
    for name, side in (("training", train), ("validation", validation)):
        _check_tokens(name, side, tokenizer, vocab_size)
        if task == "causal":
            _check_targets(name, side, tokenizer)
        else:
            _check_labels(name, side, labels or ())
    return _findings(train, validation)


def _fault(what: str, why: str, fix: str) -> NoReturn:
    raise RankraceError(what, why=why, fix=fix)


def _check_tokens(name: str, side: EncodedSet, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    largest = max(int(example.input_ids.max()) for example in side.examples)
    if vocab_size is not None and largest >= vocab_size:
        _fault(
            f"a {name} example has the token {largest}; the model has {vocab_size} tokens.",
            "tokenizer and model do not belong together, or tokens were added without making room for them.",
            "use the model's own tokenizer, or resize its embeddings and save it first.",
        )
    bos = tokenizer.bos_token_id
    doubled = [e.row for e in side.examples if bos is not None and e.input_ids[:2].tolist() == [bos, bos]]
    if doubled:
        _fault(
            f"{len(doubled)} {name} examples begin with two BOS tokens (first: example {doubled[0] + 1}).",
            "the model has seen one BOS in its training, and its loss suffers from a second one.",
            f"remove {tokenizer.bos_token!r} from the texts or from the chat template.",
        )
    if all(example.truncated for example in side.examples):
        _fault(
            f"every {name} example is cut to {max(len(example) for example in side.examples)} tokens.",
            "prompts without their beginning, or answers without their end, are all that would be learned.",
            "raise --max-length, or split the texts.",
        )


def _check_targets(name: str, side: EncodedSet, tokenizer: PreTrainedTokenizerBase) -> None:
    empty = [example.row for example in side.examples if not example.supervised[1:].any()]
    if empty:
        _fault(
            f"{len(empty)} {name} examples have no supervised token (first: example {empty[0] + 1}).",
            "they would teach nothing, and a batch of them gives a loss that is not a number.",
            "remove them, or raise --max-length.",
        )
    eos = tokenizer.eos_token_id
    if not any((example.input_ids[example.supervised] == eos).any() for example in side.examples):
        _fault(
            f"no {name} example has its EOS token ({tokenizer.eos_token!r}) among the supervised ones.",
            "the model would never learn to stop.",
            "raise --max-length, so that answers keep their end.",
        )


def _check_labels(name: str, side: EncodedSet, labels: tuple[str, ...]) -> None:
    outside = [example.row for example in side.examples if not 0 <= example.label < len(labels)]
    if outside:
        _fault(
            f"{len(outside)} {name} examples have a label outside the set (first: example {outside[0] + 1}).",
            f"the model has {len(labels)} classes: {', '.join(labels) or 'none'}.",
            "correct these rows.",
        )


def _findings(train: EncodedSet, validation: EncodedSet) -> list[Finding]:
    findings: list[Finding] = []
    share = train.truncated / (len(train) + train.dropped)
    if share > MANY_TRUNCATED:
        findings.append(Finding(f"{share:.0%} of the training examples are cut.", "Consider a larger --max-length."))
    if len(train) < FEW_TRAINING:
        what = f"Only {counted(len(train), 'training example')}: so few are sooner learnt by heart than learnt from."
        findings.append(Finding(what, "Give more rows, hundreds if you can."))
    if len(validation) < FEW_VALIDATION:
        examples = counted(len(validation), "validation example")
        what = f"Only {examples}: the choice of the rank will be uncertain."
        findings.append(Finding(what, "Hold out more with --validation-fraction or --validation."))
    if validation.documents < min(FEW_DOCUMENTS, len(validation)):
        documents = counted(validation.documents, "document")
        what = f"The validation examples come from {documents}: standard errors will be rough."
        findings.append(Finding(what, "Hold out more with --validation-fraction."))
    return findings


def preview_text(examples: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, n: int = 3) -> Text:
    """The first n examples as text, with ⟦supervised parts⟧ marked by brackets and colour."""
    text = Text()
    for example in examples[:n]:
        targets = f"{int(example.supervised.sum())} supervised" if example.label < 0 else f"class {example.label}"
        cut = ", cut" if example.truncated else ""
        text.append(f"example {example.row + 1}: {len(example)} tokens, {targets}{cut}\n", style="bold")
        for start, end in _runs(example.supervised):
            part = _decode_part(example.input_ids, start, end, tokenizer)
            if example.supervised[start]:
                text.append(f"⟦{part}⟧", style=SUPERVISED)
            else:
                text.append(part, style=CONTEXT)
        text.append("\n\n")
    return text


def _runs(supervised: np.ndarray) -> list[tuple[int, int]]:
    """Borders of the runs of equal values."""
    borders = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(supervised)]
    return list(pairwise(borders))


def _decode_part(ids: np.ndarray, start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    # Decoded with what stands before: some tokenizers drop the space in front of a text's first token.
    before, through = (str(tokenizer.decode(ids[:k].tolist())) for k in (start, end))
    return through[len(before) :]
