"""What a task is: rows with a fixed prompt in three parts, and a metric.

A row has the columns that `rankrace.data` reads, `prompt` and `completion` (and `document`, where rows share
one), and those that the metric needs: `answers`, all the right ones as text, and, where the model chooses,
`options`, the completions to choose from. No prompt ends in white space and every completion begins with a
space, so the border between them is a border between tokens.

No selection, early stop or tuning may look at `Splits.test`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from rankrace.data.files import Rows
from rankrace.errors import RankraceError

Kind = Literal["generation", "options", "label"]
"""How a prediction is made. generation: the text that the model writes after the prompt, up to EOS.
options: the likeliest of the row's options. label: the same, and the options are those of every row."""


Measure = Callable[[Sequence[str], Rows], dict[str, float]]
"""Predictions and their rows → name → score, times 100."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The rows of the three parts."""

    train: Rows
    validation: Rows
    test: Rows
    how: str
    """Where the parts come from, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. Its name is what people call it; `find_task` knows it in lower case."""

    name: str
    kind: Kind
    metrics: tuple[str, ...]
    """What `score` gives; the first is the one that is reported where there is room for one."""
    of_the_set: tuple[str, ...] = ()
    """Those of them that only a whole set of rows has, such as F1 of a class or a correlation; the others are means
    over rows."""
    max_new_tokens: int
    """Room for a generated answer, also of a task whose kind is options or label: these can be written too."""
    read: Callable[[Path | None, int], Splits]
    measure: Measure
    by_row: Measure | None = None
    """What rows are compared by where each metric is one of the set, times 100: 100 is right."""

    def splits(self, root: Path | None, seed: int) -> Splits:
        """Read the rows.

        Args:
            root: a folder with the local files; None: from the hub.
            seed: draws the held-out rows, where the task has no validation part of its own.

        Raises:
            RankraceError: missing or broken files, or no way to reach the hub.
        """
        try:
            return self.read(root, seed)
        except (KeyError, IndexError, ValueError) as error:
            raise RankraceError(
                f"{self.name}: the rows of {root or 'the hub'} are not laid out as expected ({error!r}).",
                why="prompts are built from known columns.",
                fix="compare the files with the official ones.",
            ) from error

    def row_scores(self, predictions: Sequence[str], rows: Rows) -> dict[str, list[float]]:
        """The score of each row, times 100, by each metric that is a mean over rows; where there is none, by
        `by_row`. For paired comparisons: the first is that of the task's first metric, or what stands in for it.

        Arguments and errors as for `score`.
        """
        self._check(predictions, rows)
        measure = self.by_row or self.measure
        single = [measure([p], [row]) for p, row in zip(predictions, rows, strict=True)]
        return {name: [scores[name] for scores in single] for name in single[0] if name not in self.of_the_set}

    def score(self, predictions: Sequence[str], rows: Rows) -> dict[str, float]:
        """The task's metrics, each times 100.

        Args:
            predictions: of each row, the text generated or the option chosen.
            rows: rows of this task's splits, in the same order.

        Raises:
            RankraceError: no predictions.
            ValueError: another number of predictions than of rows.
        """
        self._check(predictions, rows)
        return self.measure(predictions, rows)

    def _check(self, predictions: Sequence[str], rows: Rows) -> None:
        if len(predictions) != len(rows):
            raise ValueError(f"{len(predictions)} predictions for {len(rows)} rows")
        if not rows:
            raise RankraceError(
                f"{self.name}: there is no prediction to score.",
                why="a mean over nothing is not a number.",
                fix="evaluate on at least one row.",
            )


def documents(rows: Rows) -> list[int] | None:
    """Which rows share a document, as numbers; None where rows have none."""
    if not rows or "document" not in rows[0]:
        return None
    numbers: dict[str, int] = {}
    return [numbers.setdefault(row["document"], len(numbers)) for row in rows]


def content(text: str) -> str:
    """In lower case and with single spaces: equal for copies."""
    return " ".join(text.split()).casefold()


def without_copies(rows: Rows, known: Rows) -> Rows:
    """The rows whose prompt is none of the known rows' prompts, whatever their completion."""
    prompts = {content(row["prompt"]) for row in known}
    return [row for row in rows if content(row["prompt"]) not in prompts]


def in_random_order(texts: Sequence[str], seed: int) -> list[str]:
    """The different texts in an order that depends on the seed and not on the order given."""
    return sorted(set(texts), key=lambda text: blake2b(f"{seed}\x1f{text}".encode()).digest())


def hold_out(rows: Rows, test: Rows, seed: int, fraction: float = 0.1, maximum: int = 1000) -> Splits:
    """Hold out whole documents, drawn by the seed: rows with one `document`, a part of their prompts, or one prompt.

    Training rows that are also test rows are left out. About `fraction` of the rows is held out, and at most
    `maximum` of them.
    """
    fresh = without_copies(rows, test)
    documents: dict[str, Rows] = defaultdict(list)
    for row in fresh:
        documents[content(row.get("document", row["prompt"]))].append(row)
    wanted = min(maximum, round(fraction * len(fresh)))
    held_out: set[str] = set()
    count = 0
    for document in in_random_order(list(documents), seed):
        if count + len(documents[document]) <= wanted:
            held_out.add(document)
            count += len(documents[document])
    validation = [row for document in documents if document in held_out for row in documents[document]]
    train = [row for document in documents if document not in held_out for row in documents[document]]
    left_out = len(rows) - len(fresh)
    how = f"{len(validation):,} training rows held out by seed {seed}"
    how += f", {left_out:,} left out that are also test rows" if left_out else ""
    return Splits(train=train, validation=validation, test=test, how=how)
