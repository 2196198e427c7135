r"""MedQA (USMLE): choose one of four answers to a question of the medical licensing exam.

    Question: {question}\nA. {option}\nB. {option}\nC. {option}\nD. {option}\nAnswer:    →    {letter}

Local files: train on MedQA's official dev part and MedMCQA's validation part, since MedQA's train part is not
among them; test on MedQA's test part. Validation: a quarter of MedQA's rows, held out by seed, and none
of MedMCQA's, which are shorter and of another exam. From the hub: MedQA's own train part, a tenth held out.

Metric: accuracy, of the likeliest letter or of a generated one: `letter` finds it in either.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rankrace.data.files import Rows, read_file
from rankrace.tasks.source import read_hub
from rankrace.tasks.task import Splits, Task, hold_out, without_copies

HUB = "GBaker/MedQA-USMLE-4-options"
LETTERS = "ABCD"
_LETTER = re.compile(
    rf"\W*(?:(?i:(?:the\s+)?(?:(?:best|correct|right)\s+)?(?:answer|option|choice)(?:\s+is)?)\W+)?"
    rf"(?P<letter>[{LETTERS}])\b(?!(?<=A)[ -]+[a-z\d])"  # not the article
)


def _read(root: Path | None, seed: int) -> Splits:
    if root is None:
        train, test = (_medqa_rows(read_hub(HUB, None, split)) for split in ("train", "test"))
        return hold_out(train, test, seed)
    own, test = (_medqa_rows(read_file(root / "medqa" / f"{split}.4options.jsonl")) for split in ("dev", "test"))
    other = medmcqa_rows(read_file(root / "medmcqa" / "validation.jsonl"))
    parts = hold_out(own, test, seed, fraction=0.25)
    more = without_copies(other, parts.validation + test)
    how = f"{len(parts.validation):,} rows of MedQA's dev part held out by seed {seed}; train has MedMCQA too"
    return replace(parts, train=parts.train + more, how=how)


def _row(question: str, options: list[str], letter: str) -> dict[str, object]:
    lines = "\n".join(f"{name}. {option.strip()}" for name, option in zip(LETTERS, options, strict=True))
    return {
        "prompt": f"Question: {question.strip()}\n{lines}\nAnswer:",
        "completion": f" {letter}",
        "options": [f" {name}" for name in LETTERS],
        "answers": [letter],
    }


def _medqa_rows(rows: Rows) -> Rows:
    return [_row(row["question"], [row["options"][name] for name in LETTERS], row["answer_idx"]) for row in rows]


def medmcqa_rows(rows: Rows) -> Rows:
    """Options and answer as text: "A. ...", one a line."""
    return [
        _row(row["question"], [line[2:] for line in row["options"].split("\n")], row["answer"][0]) for row in rows
    ]


def letter(text: str) -> str | None:
    """The letter that a generated answer begins with, or None: "B", " B.", "(B) Aspirin", "The answer is B"."""
    match = _LETTER.match(text)
    return match["letter"] if match else None


def _measure(predictions: Sequence[str], rows: Rows) -> dict[str, float]:
    right = sum(letter(prediction) == row["answers"][0] for prediction, row in zip(predictions, rows, strict=True))
    return {"accuracy": 100 * right / len(rows)}


MEDQA = Task(name="medqa", kind="options", metrics=("accuracy",), max_new_tokens=8, read=_read, measure=_measure)
