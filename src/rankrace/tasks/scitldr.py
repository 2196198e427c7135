r"""SciTLDR: the abstract of a paper in one sentence.

    {abstract}\n\nSummary:    →    {summary}

The official parts (SciTLDR-A), less training rows that are also validation or test rows and validation rows
that are also test rows. The completion of a row with several summaries is the first one, the author's.

Metrics: ROUGE-1, -2 and -L (F-measure) by the package rouge-score. As in the official code (Cachola et al. 2020),
words are not stemmed, and of several references the one with the highest ROUGE-1 gives all three. That code
runs the old Perl script: its tokens, and its ROUGE-L of more than one sentence, differ a little.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankrace.data.files import Rows, read_file
from rankrace.errors import RankraceError
from rankrace.tasks.source import read_hub
from rankrace.tasks.task import Splits, Task, without_copies

HUB = ("allenai/scitldr", "Abstract")
# The data set is a script, which is not run any more; the hub keeps its rows converted under this revision.
HUB_REVISION = "refs/convert/parquet"
ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougel": "rougeL"}


def _read(root: Path | None, seed: int) -> Splits:
    """The parts are the same for every seed."""
    _scorer()  # what cannot be scored at its end should not begin
    if root is None:
        names = ("train", "validation", "test")
        parts = [_rows(_hub_columns(read_hub(*HUB, name, HUB_REVISION))) for name in names]
    else:
        parts = [_rows(read_file(root / "scitldr" / f"{name}.jsonl")) for name in ("train", "dev", "test")]
    train, validation, test = parts
    validation = without_copies(validation, test)
    return Splits(
        train=without_copies(train, validation + test),
        validation=validation,
        test=test,
        how="the official parts, without copies across them",
    )


def _hub_columns(rows: Rows) -> Rows:
    """The hub's rows have the abstract as a list of sentences."""
    return [{"document": " ".join(row["source"]), "summaries": row["target"]} for row in rows]


def _rows(papers: Rows) -> Rows:
    return [
        {
            "prompt": f"{paper['document'].strip()}\n\nSummary:",
            "completion": f" {paper['summaries'][0].strip()}",
            "answers": [summary.strip() for summary in paper["summaries"]],
        }
        for paper in papers
    ]


def _scorer() -> Any:
    """The package's own; it has no types."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise RankraceError(
            "scitldr is measured by ROUGE, which needs the package rouge-score.",
            why="it is an optional part of rankrace.",
            fix="pip install 'rankrace[eval]'.",
        ) from error
    return RougeScorer(list(ROUGE.values()))


def _measure(predictions: Sequence[str], rows: Rows) -> dict[str, float]:
    scorer = _scorer()
    sums = dict.fromkeys(ROUGE, 0.0)
    for prediction, row in zip(predictions, rows, strict=True):
        scores = [scorer.score(answer, prediction) for answer in row["answers"]]
        best = max(scores, key=lambda score: score["rouge1"].fmeasure)
        for metric, name in ROUGE.items():
            sums[metric] += best[name].fmeasure
    return {metric: 100 * total / len(rows) for metric, total in sums.items()}


SCITLDR = Task(
    name="scitldr",
    kind="generation",
    metrics=tuple(ROUGE),
    max_new_tokens=96,
    read=_read,
    measure=_measure,
)
