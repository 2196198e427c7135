r"""GSM8K: a worked answer to a question of grade-school mathematics.

    Question: {question}\nAnswer:    →    {steps}\n#### {number}

Steps as in the official files, with their <<48/2=24>> notes. Validation: rows of train, held out by seed.

Metric: the share of answers whose number after the first "####" equals the right one. As in the official
code, an answer without that mark is wrong. Numbers are compared as numbers: 1,000 = 1000.00 = $1000.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from rankrace.data.files import Rows, read_file
from rankrace.tasks.source import read_hub
from rankrace.tasks.task import Splits, Task, hold_out

HUB = ("openai/gsm8k", "main")
_FINAL = re.compile(r"####\s*(?P<sign>-?)\s*[$€£]?\s*(?P<number>-?(?:\d[\d,]*(?:\.\d+)?|\.\d+))")


def _read(root: Path | None, seed: int) -> Splits:
    if root is None:
        train, test = (read_hub(*HUB, split) for split in ("train", "test"))
    else:
        train, test = (read_file(root / "gsm8k" / f"{split}.jsonl") for split in ("train", "test"))
    return hold_out(_rows(train), _rows(test), seed)


def _rows(questions: Rows) -> Rows:
    return [
        {
            "prompt": f"Question: {question['question'].strip()}\nAnswer:",
            "completion": f" {question['answer'].strip()}",
            "answers": [question["answer"].rpartition("####")[2].strip()],
        }
        for question in questions
    ]


def final_number(text: str) -> Decimal | None:
    """The number after the first "####", or None."""
    match = _FINAL.search(text)
    if match is None:
        return None
    number = Decimal(match["number"].replace(",", ""))
    return -number if match["sign"] else number


def _measure(predictions: Sequence[str], rows: Rows) -> dict[str, float]:
    right = 0
    for prediction, row in zip(predictions, rows, strict=True):
        given = final_number(prediction)
        right += given is not None and given == final_number(f"#### {row['answers'][0]}")
    return {"exact": 100 * right / len(rows)}


GSM8K = Task(name="gsm8k", kind="generation", metrics=("exact",), max_new_tokens=400, read=_read, measure=_measure)
