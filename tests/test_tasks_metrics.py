"""Metrics: hand-made cases after the official rules, and plain formulas."""

import math
import random
import statistics
import sys
from typing import Any

import pytest

from rankrace.errors import RankraceError
from rankrace.tasks import TASKS, find_task
from rankrace.tasks.glue import glue_score
from rankrace.tasks.gsm8k import final_number
from rankrace.tasks.medqa import letter
from rankrace.tasks.metrics import accuracy, f1, matthews, pearson, spearman
from rankrace.tasks.squad2 import normalise


def rows(*answers: list[str] | str) -> list[dict[str, Any]]:
    return [{"answers": [answer] if isinstance(answer, str) else answer} for answer in answers]


# --- SQuAD 2.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat", "cat"),
        ("a cat, an owl and the dog.", "cat owl and dog"),
        ("U.S.A.", "usa"),  # punctuation goes before articles are looked for
        ("the-end", "theend"),
        ("Theatre", "theatre"),
        ("Ångström\n", "ångström"),
        ("10–20", "10–20"),  # only ASCII punctuation, as in the official script
        ("A", ""),
        ("...", ""),
    ],
)
def test_squad_normalisation(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1_score"),
    [
        (" The Normans.", ["Normans"], 100.0, 100.0),
        ("in Normandy, France", ["Normandy", "France"], 0.0, 50.0),  # 2·1/(3+1), not over both together
        ("big red dog", ["red dog", "dog house of mine"], 0.0, 80.0),  # the best answer: 2·2/(3+2)
        ("dog dog", ["dog"], 0.0, 200 / 3),  # words count as often as they are there
        ("unanswerable", [], 100.0, 100.0),
        (" Unanswerable.", [], 100.0, 100.0),
        ("", [], 100.0, 100.0),
        ("the", [], 100.0, 100.0),  # nothing is left of it
        ("Normandy", [], 0.0, 0.0),
        ("unanswerable", ["Normandy"], 0.0, 0.0),
        ("", ["Normandy"], 0.0, 0.0),
        ("unanswerable question", [], 0.0, 0.0),
        ("!", ["?"], 100.0, 100.0),  # an answer that normalises to nothing is no answer
        ("x", ["x", "?"], 100.0, 100.0),
        ("?", ["x", "?"], 0.0, 0.0),
    ],
)
def test_squad_scores(prediction: str, answers: list[str], exact: float, f1_score: float) -> None:
    found = TASKS["squad2"].score([prediction], rows(answers))
    assert found == pytest.approx({"f1": f1_score, "exact": exact})


def test_squad_is_a_mean_over_questions() -> None:
    found = TASKS["squad2"].score(["x", "unanswerable", "no", "y z"], rows("x", [], [], "y"))
    assert found == pytest.approx({"exact": 50.0, "f1": 100 * (1 + 1 + 0 + 2 / 3) / 4})


# --- GSM8K


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### $70,000.", "70000"),
        ("####-5", "-5"),
        ("#### -$5.50", "-5.5"),
        ("#### $-5", "-5"),
        ("#### .5", "0.5"),
        ("#### 18.00 dollars", "18"),
        ("#### 50%", "50"),
        ("#### 18\nQuestion: and now?\n#### 20", "18"),
        ("#### 007", "7"),
        ("The answer is 18", None),
        ("#### eighteen", None),
        ("####", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    found = final_number(text)
    assert (found is None) == (number is None)
    assert number is None or found == pytest.approx(float(number))


def test_gsm8k_counts_equal_numbers() -> None:
    predictions = ["#### 1000", "#### 2.50", "3", "#### -4", "#### 1,00"]
    assert TASKS["gsm8k"].score(predictions, rows("1,000", "2.5", "3", "4", "100")) == {"exact": 60.0}


# --- MedQA


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" B", "B"),
        ("B. Aspirin", "B"),
        ("\n(C) Atropine", "C"),
        ("**D**", "D"),
        ("The answer is A.", "A"),
        ("Answer: B", "B"),
        ("the correct answer is (D)", "D"),
        ("Aspirin", None),
        ("BC", None),
        ("E", None),
        ("I think B", None),
        ("The best answer is B", "B"),
        ("Option C", "C"),
        ("A Aspirin", "A"),
        ("A 45-year-old man", None),
        ("A man", None),
        ("B aspirin", "B"),
        ("a drug", None),
        ("", None),
    ],
)
def test_letter(text: str, expected: str | None) -> None:
    assert letter(text) == expected


def test_medqa_takes_options_and_generated_text() -> None:
    assert TASKS["medqa"].score([" A", "B. Aspirin", "none", "D"], rows("A", "B", "C", "C")) == {"accuracy": 50.0}


# --- GLUE


def test_accuracy_and_f1_by_hand() -> None:
    predicted, right = ["yes", "yes", "no", "no", "", "yes"], ["yes", "no", "no", "yes", "yes", "yes"]
    assert accuracy(predicted, right) == 0.5
    # TP 2, FP 1, FN 2
    assert f1(predicted, right, "yes") == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert f1(["no", "no"], ["no", "no"], "yes") == 0.0


def test_matthews_is_the_formula_of_the_four_counts() -> None:
    draw = random.Random(0)
    right = [draw.choice(["yes", "no"]) for _ in range(200)]
    predicted = [draw.choice([r, "yes", "no"]) for r in right]
    pairs = list(zip(predicted, right, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in (("yes", "yes"), ("no", "no"), ("yes", "no"), ("no", "yes")))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert 0.1 < expected < 0.9
    assert matthews(predicted, right, "yes") == pytest.approx(expected)
    swapped = ["no" if p == "yes" else "yes" for p in predicted]
    assert matthews(swapped, right, "yes") == pytest.approx(-expected)


@pytest.mark.parametrize("constant", ["yes", "no", ""])
def test_constant_predictions_give_zero_and_never_nan(constant: str) -> None:
    assert matthews([constant] * 4, ["yes", "no", "no", "yes"], "yes") == 0.0
    assert matthews(["yes", "no", "no", "yes"], [constant] * 4, "yes") == 0.0
    assert TASKS["cola"].score([constant] * 3, rows("yes", "no", "yes")) == {"matthews": 0.0}
    assert TASKS["stsb"].score([constant] * 3, rows("1.0", "2.0", "3.0")) == {"pearson": 0.0, "spearman": 0.0}


def test_correlations() -> None:
    draw = random.Random(1)
    x = [draw.gauss(0, 1) for _ in range(50)]
    y = [value + draw.gauss(0, 1) for value in x]
    assert pearson(x, y) == pytest.approx(statistics.correlation(x, y))
    # Ranks of x: 1, 2.5, 2.5, 4; of y: 1, 3, 2, 4.
    assert spearman([1, 2, 2, 30], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(x, [math.exp(value) for value in x]) == pytest.approx(1.0)
    assert pearson([0.1] * 3, [0.1, 0.2, 0.3]) == 0.0


def test_stsb_reads_numbers() -> None:
    found = TASKS["stsb"].score([" 1.0", "about 2", "9999", "none"], rows("1.0", "2.0", "5.0", "0.0"))
    assert found == pytest.approx({"pearson": 100.0, "spearman": 100.0})


def test_glue_labels_written_or_chosen() -> None:
    found = TASKS["mrpc"].score([" yes", "Yes, both do", "no", "maybe"], rows("yes", "no", "no", "yes"))
    assert found == pytest.approx({"f1": 50.0, "accuracy": 50.0})
    assert TASKS["sst2"].score([" positive", ""], rows("positive", "negative")) == {"accuracy": 50.0}
    assert TASKS["mnli"].score([" neutral", " entailment"], rows("neutral", "neutral")) == {"accuracy": 50.0}


def test_glue_score_is_a_mean_of_means() -> None:
    assert glue_score({"mrpc": {"f1": 80.0, "accuracy": 60.0}, "rte": {"accuracy": 50.0}}) == 60.0


# --- SciTLDR


def test_rouge_of_one_reference_by_hand() -> None:
    found = TASKS["scitldr"].score(["the cat sat on mats"], rows("The cat sat on a mat."))
    # 4 of 5 and of 6 words; 3 of 4 and of 5 pairs; "mats" is not stemmed to "mat".
    assert found == pytest.approx({"rouge1": 800 / 11, "rouge2": 600 / 9, "rougel": 800 / 11})


def test_rouge_takes_all_three_from_the_reference_best_in_rouge1() -> None:
    references = ["a b c d x y", "c d e f b a"]  # of "a b c d e f": 4 words in order; 6 words out of order
    found = TASKS["scitldr"].score(["a b c d e f"], rows(references))
    assert found == pytest.approx({"rouge1": 100.0, "rouge2": 60.0, "rougel": 400 / 6})
    first = TASKS["scitldr"].score(["a b c d e f"], rows(references[:1]))
    assert first["rougel"] == pytest.approx(400 / 6)


def test_rouge_of_nothing_is_zero_and_mean_is_over_rows() -> None:
    found = TASKS["scitldr"].score(["", "one two"], rows("one two", "one two"))
    assert found == pytest.approx({"rouge1": 50.0, "rouge2": 50.0, "rougel": 50.0})


def test_rouge_without_the_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(RankraceError, match=r"rankrace\[eval\]"):
        TASKS["scitldr"].score(["x"], rows("x"))
    with pytest.raises(RankraceError, match=r"rankrace\[eval\]"):  # before anything is trained, too
        TASKS["scitldr"].splits(None, 0)


# --- every task


@pytest.mark.parametrize("name", TASKS)
def test_every_task_scores_what_it_says_and_nothing_on_nothing(name: str) -> None:
    task = TASKS[name]
    answers = rows("yes", "no") if task.kind == "label" else rows("1", "2")
    assert tuple(task.score(["", ""], answers)) == task.metrics
    with pytest.raises(RankraceError, match=f"{name}: there is no prediction"):
        task.score([], [])
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        task.score([""], answers)


def test_find_task() -> None:
    assert all(find_task(name) is task and task.name == name for name, task in TASKS.items())
    assert find_task("SST-2") is TASKS["sst2"]
    assert find_task("STS-B") is TASKS["stsb"]
    with pytest.raises(RankraceError, match="no task 'sqad'; the nearest is 'squad2'"):
        find_task("sqad")


@pytest.mark.parametrize("name", TASKS)
def test_metrics_are_means_over_rows_but_those_of_the_set(name: str) -> None:
    """For answers of which one in three is wrong."""
    task = TASKS[name]
    known = {"medqa": "AB", "gsm8k": "12", "stsb": "14", "scitldr": ("one two", "three")}
    answers = [known.get(name, ("yes", "no"))[i % 2] for i in range(9)]
    given = rows(*answers)
    predictions = [answers[i + 1] if i % 3 == 1 else answer for i, answer in enumerate(answers)]
    predictions = [f"#### {p}" if name == "gsm8k" else p for p in predictions]
    whole, single = task.score(predictions, given), task.row_scores(predictions, given)
    means = set(task.metrics) - set(task.of_the_set)
    assert set(single) == (means or {{"cola": "accuracy", "stsb": "closeness"}[name]})
    for metric, value in whole.items():
        mean = statistics.mean(task.score([p], [row])[metric] for p, row in zip(predictions, given, strict=True))
        assert (metric in task.of_the_set) == (abs(mean - value) > 1)
        if metric in single:
            assert statistics.mean(single[metric]) == pytest.approx(value)
            assert 0 < value < 100


def test_rows_of_a_correlation_are_compared_by_closeness() -> None:
    """One row has no correlation: perfect and awful answers would be the same. 2 off of 5 is 60."""
    given = rows("5.0", "0.0", "3.0")
    assert TASKS["stsb"].row_scores(["5", "0.0", "3.0"], given) == {"closeness": [100, 100, 100]}
    assert TASKS["stsb"].row_scores(["0", "5.0", "1.0"], given) == {"closeness": [0, 0, pytest.approx(60)]}
    assert TASKS["stsb"].row_scores(["none", "none", "9"], given) == {"closeness": [0, 100, pytest.approx(60)]}


def test_rows_of_classes_are_right_or_not() -> None:
    for name in ("rte", "cola", "mrpc"):
        assert TASKS[name].row_scores(["yes", "no"], rows("yes", "yes")) == {"accuracy": [100, 0]}


def test_no_rows_have_no_scores() -> None:
    with pytest.raises(RankraceError, match="there is no prediction"):
        TASKS["rte"].row_scores([], [])
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        TASKS["rte"].row_scores([""], rows("yes", "no"))
