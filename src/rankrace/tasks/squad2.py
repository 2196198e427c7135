r"""SQuAD 2.0: answer from the passage, or say that it holds no answer.

    {passage}\n\nQuestion: {question}\nAnswer:    →    {first answer, or "unanswerable"}

Parts: articles sorted by title. Of the official dev file, where it is all there is, every fifth article
(0, 5, 10, ...) is the test part; of the rest every eighth (0, 8, ...) is the validation part. From the hub, the
test part is the official dev set, and every eighth article of train is the validation part.

Metrics: exact match and F1 over words as in the official script (Rajpurkar et al. 2018): lower case, no
punctuation, no articles a/an/the, single spaces; the best over all answers; a question without an answer
is right only where none is given, which a model here does by writing "unanswerable" or nothing.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankrace.data.files import Rows, read_file
from rankrace.data.formats import UNANSWERABLE
from rankrace.tasks.source import read_hub
from rankrace.tasks.task import Splits, Task, without_copies

HUB = "rajpurkar/squad_v2"
TEST_EVERY, VALIDATION_EVERY = 5, 8
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _read(root: Path | None, seed: int) -> Splits:
    """The parts are the same for every seed."""
    if root is None:
        rows, test = (_rows(read_hub(HUB, None, split)) for split in ("train", "validation"))
        which = "the official dev set"
    else:
        every = _rows(read_file(root / "squad2" / "dev-v2.0.json"))
        test, rows = _every(every, TEST_EVERY)
        which = "every fifth article of the official dev set"
    validation, train = _every(without_copies(rows, test), VALIDATION_EVERY)
    how = f"by article: test is {which}, validation every eighth of the other articles"
    return Splits(train=train, validation=without_copies(validation, train), test=test, how=how)


def _rows(questions: Rows) -> Rows:
    return [_row(question) for question in questions]


def _row(question: dict[str, Any]) -> dict[str, Any]:
    answers = [text.strip() for text in question["answers"]["text"]]
    return {
        "prompt": f"{question['context'].strip()}\n\nQuestion: {question['question'].strip()}\nAnswer:",
        "completion": f" {answers[0] if answers else UNANSWERABLE}",
        "document": question["title"],
        "answers": answers,
    }


def _every(rows: Rows, step: int) -> tuple[Rows, Rows]:
    """The rows of every step-th article in the order of the titles, and the others."""
    chosen = set(sorted({row["document"] for row in rows})[::step])
    return [row for row in rows if row["document"] in chosen], [row for row in rows if row["document"] not in chosen]


def normalise(text: str) -> str:
    """The official normalisation of an answer."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact(prediction: str, answer: str) -> float:
    """1 if both are the same once normalised, else 0."""
    return float(normalise(prediction) == normalise(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words; without words on one side, 1 if on both, else 0."""
    predicted, right = normalise(prediction).split(), normalise(answer).split()
    if not predicted or not right:
        return float(predicted == right)
    common = (Counter(predicted) & Counter(right)).total()
    return 2 * common / (len(predicted) + len(right))


def _measure(predictions: Sequence[str], rows: Rows) -> dict[str, float]:
    sums = {"f1": 0.0, "exact": 0.0}
    for prediction, row in zip(predictions, rows, strict=True):
        given = "" if normalise(prediction) == UNANSWERABLE else prediction
        # As the official script: answers that normalise to nothing do not count; none left: no answer.
        answers = [answer for answer in row["answers"] if normalise(answer)] or [""]
        sums["f1"] += max(f1(given, answer) for answer in answers)
        sums["exact"] += max(exact(given, answer) for answer in answers)
    return {metric: 100 * total / len(rows) for metric, total in sums.items()}


SQUAD2 = Task(
    name="squad2",
    kind="generation",
    metrics=("f1", "exact"),
    max_new_tokens=48,
    read=_read,
    measure=_measure,
)
