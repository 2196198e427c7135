r"""GLUE: eight tasks, each as a short prompt whose completion is the label in words.

SST-2, MRPC, RTE and CoLA are read from the official files or the hub, QNLI, MNLI, QQP and STS-B from the hub.
The official dev part is the test part (MNLI: the matched one); the validation part is held out of train by
seed, whole premises (first sentences) of pairs at a time, and no copy is on two sides.

SST-2's training rows are phrases of sentences, most of them parts of other rows, while its dev rows are whole
sentences. Here whole sentences are held out, and every phrase of theirs leaves the training rows: else
the validation loss would reward memory.

Metrics, the official ones: accuracy; F1 and accuracy (MRPC, QQP); Matthews' correlation (CoLA); Pearson's and
Spearman's correlation (STS-B, where an answer that is no number counts as 0.0, one above 5 as 5.0). Rows of CoLA are
compared by whether they are right, rows of STS-B by closeness: 100 for the right number, 0 for one that is 5 off.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rankrace.data.files import Rows, read_file
from rankrace.tasks.metrics import accuracy, f1, matthews, pearson, spearman
from rankrace.tasks.source import hub_only, read_hub
from rankrace.tasks.task import Kind, Measure, Splits, Task, content, hold_out, in_random_order, without_copies

HUB = "nyu-mll/glue"
HIGHEST = 5.0
"""Similarity in STS-B; the lowest is 0."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """How one of the tasks is read."""

    subset: str
    """On the hub."""
    columns: tuple[str, ...]
    """The text, or the two texts."""
    prompt: str
    """With {0} and {1} for the texts."""
    words: dict[str, str]
    """Labels, by number (files) and by name (hub), in words. Empty: the label is a number."""
    folder: str | None = None
    """The folder of the official files; None: from the hub only."""
    file_columns: tuple[str, ...] = ()
    """The label's and the texts' columns in the files."""
    dev: str = "validation"
    """The hub's split with the dev rows."""


def _read(task: str, corpus: Corpus, root: Path | None, seed: int) -> Splits:
    if root is None:
        names = ("label", *corpus.columns)
        parts = [read_hub(HUB, corpus.subset, split) for split in ("train", corpus.dev)]
    elif corpus.folder is None:
        raise hub_only(task, root)
    else:
        names = corpus.file_columns
        parts = [read_file(root / "glue" / corpus.folder / f"{split}.tsv") for split in ("train", "dev")]
    train, test = ([_row(corpus, row, *names) for row in part] for part in parts)
    return _hold_out_sentences(train, test, seed) if corpus is SST2 else hold_out(train, test, seed)


def _row(corpus: Corpus, row: dict[str, Any], label: str, *columns: str) -> dict[str, Any]:
    texts = [row[column].strip() for column in columns]
    word = corpus.words[row[label]] if corpus.words else f"{float(row[label]):.1f}"
    built = {"prompt": corpus.prompt.format(*texts), "completion": f" {word}", "answers": [word], "text": texts[0]}
    if corpus.words:
        built["options"] = [f" {option}" for option in dict.fromkeys(corpus.words.values())]
    if len(texts) == 2:
        built |= {"document": texts[0], "text_pair": texts[1]}
    return built


def labelled(rows: Rows) -> Rows:
    """The rows for a classifier: text, text_pair and document if any, and as label the completion's word."""
    return [
        {column: row[column] for column in ("text", "text_pair", "document") if column in row}
        | {"label": row["answers"][0]}
        for row in rows
    ]


def _hold_out_sentences(rows: Rows, test: Rows, seed: int) -> Splits:
    """Hold out a tenth of the whole sentences, and leave all their parts out of the training rows."""
    fresh = without_copies(rows, test)
    texts = [content(row["text"]) for row in fresh]
    parts: set[str] = set()
    for text in sorted(set(texts), key=lambda text: -text.count(" ")):
        if text not in parts:
            parts |= _parts(text)
    sentences = in_random_order([text for text in texts if text not in parts], seed)
    held_out = set(sentences[: round(0.1 * len(sentences))])
    known = held_out.union(*map(_parts, held_out))
    by_text = {text: row for text, row in zip(texts, fresh, strict=True) if text in held_out}
    train = [row for text, row in zip(texts, fresh, strict=True) if text not in known]
    how = f"{len(by_text):,} whole sentences held out by seed {seed}, and their phrases left out of train"
    return Splits(train=train, validation=list(by_text.values()), test=test, how=how)


def _parts(text: str) -> set[str]:
    """All runs of words shorter than the text."""
    words = text.split()
    size = len(words)
    return {" ".join(words[i:j]) for i in range(size) for j in range(i + 1, size + 1) if j - i < size}


def _words(predictions: Sequence[str]) -> list[str]:
    """Each prediction's first word in lower case: an option as it is, or what a model wrote."""
    return [match[0].lower() if (match := re.search(r"[^\W\d_]+", text)) else "" for text in predictions]


def _answers(rows: Rows) -> list[str]:
    return [row["answers"][0] for row in rows]


def _accuracy(predictions: Sequence[str], rows: Rows) -> dict[str, float]:
    return {"accuracy": 100 * accuracy(_words(predictions), _answers(rows))}


def _f1_accuracy(predictions: Sequence[str], rows: Rows) -> dict[str, float]:
    return {"f1": 100 * f1(_words(predictions), _answers(rows), "yes")} | _accuracy(predictions, rows)


def _matthews(predictions: Sequence[str], rows: Rows) -> dict[str, float]:
    return {"matthews": 100 * matthews(_words(predictions), _answers(rows), "yes")}


def _correlations(predictions: Sequence[str], rows: Rows) -> dict[str, float]:
    numbers, right = _numbers(predictions), [float(answer) for answer in _answers(rows)]
    return {"pearson": 100 * pearson(numbers, right), "spearman": 100 * spearman(numbers, right)}


def _closeness(predictions: Sequence[str], rows: Rows) -> dict[str, float]:
    pairs = zip(_numbers(predictions), _answers(rows), strict=True)
    off = [abs(number - float(answer)) for number, answer in pairs]
    return {"closeness": 100 - 100 / HIGHEST * sum(off) / len(off)}


def _numbers(predictions: Sequence[str]) -> list[float]:
    """Each prediction's first number."""
    found = [re.search(r"\d+(?:\.\d+)?", text) for text in predictions]
    return [min(HIGHEST, float(match[0])) if match else 0.0 for match in found]


def _task(
    name: str,
    corpus: Corpus,
    measure: Measure,
    metrics: tuple[str, ...],
    kind: Kind = "label",
    by_row: Measure | None = None,
) -> Task:
    return Task(
        name=name,
        kind=kind,
        metrics=metrics,
        of_the_set=tuple(m for m in metrics if m != "accuracy"),
        max_new_tokens=8,
        read=partial(_read, name, corpus),
        measure=measure,
        by_row=by_row,
    )


def glue_score(scores: dict[str, dict[str, float]]) -> float:
    """The mean over tasks of the mean over each task's metrics."""
    means = [sum(metrics.values()) / len(metrics) for metrics in scores.values()]
    return sum(means) / len(means)


SST2 = Corpus(
    subset="sst2",
    columns=("sentence",),
    prompt="Review: {0}\nSentiment:",
    words={"0": "negative", "1": "positive", "negative": "negative", "positive": "positive"},
    folder="SST-2",
    file_columns=("label", "sentence"),
)
MRPC = Corpus(
    subset="mrpc",
    columns=("sentence1", "sentence2"),
    prompt="Sentence 1: {0}\nSentence 2: {1}\nSame meaning:",
    words={"0": "no", "1": "yes", "not_equivalent": "no", "equivalent": "yes"},
    folder="MRPC",
    file_columns=("Quality", "#1 String", "#2 String"),
)
RTE = Corpus(
    subset="rte",
    columns=("sentence1", "sentence2"),
    prompt="Premise: {0}\nHypothesis: {1}\nEntailed:",
    words={"not_entailment": "no", "entailment": "yes"},
    folder="RTE",
    file_columns=("label", "sentence1", "sentence2"),
)
COLA = Corpus(
    subset="cola",
    columns=("sentence",),
    prompt="Sentence: {0}\nAcceptable grammar:",
    words={"0": "no", "1": "yes", "unacceptable": "no", "acceptable": "yes"},
    folder="CoLA",
    file_columns=("label", "text"),
)
QNLI = Corpus(
    subset="qnli",
    columns=("question", "sentence"),
    prompt="Question: {0}\nSentence: {1}\nAnswered:",
    words={"not_entailment": "no", "entailment": "yes"},
)
MNLI = Corpus(
    subset="mnli",
    columns=("premise", "hypothesis"),
    prompt="Premise: {0}\nHypothesis: {1}\nRelation:",
    words={word: word for word in ("entailment", "neutral", "contradiction")},
    dev="validation_matched",
)
QQP = Corpus(
    subset="qqp",
    columns=("question1", "question2"),
    prompt="Question 1: {0}\nQuestion 2: {1}\nSame question:",
    words={"not_duplicate": "no", "duplicate": "yes"},
)
STSB = Corpus(
    subset="stsb",
    columns=("sentence1", "sentence2"),
    prompt="Sentence 1: {0}\nSentence 2: {1}\nSimilarity from 0 to 5:",
    words={},
)

GLUE = (
    _task("sst2", SST2, _accuracy, ("accuracy",)),
    _task("mrpc", MRPC, _f1_accuracy, ("f1", "accuracy")),
    _task("rte", RTE, _accuracy, ("accuracy",)),
    _task("cola", COLA, _matthews, ("matthews",), by_row=_accuracy),
    _task("qnli", QNLI, _accuracy, ("accuracy",)),
    _task("mnli", MNLI, _accuracy, ("accuracy",)),
    _task("qqp", QQP, _f1_accuracy, ("f1", "accuracy")),
    _task("stsb", STSB, _correlations, ("pearson", "spearman"), kind="generation", by_row=_closeness),
)
