"""Which held-out examples choose, and which only report."""

from dataclasses import replace

import pytest

from examples import examples
from rankrace.data.encoded import FEW_DOCUMENTS
from rankrace.plan import LookPlan
from rankrace.session import FRESH_LEAST, divide

PLAN = LookPlan(fractions=(0.2,), most=2, looked=1000, fresh=1000)
DOCUMENT = 3
"""Rows of each document."""
ROWS = [replace(e, group=e.row // DOCUMENT) for e in examples(60)]


def test_what_chooses_does_not_report() -> None:
    """Whole documents on either side, all of them, in halves; another seed, other halves."""
    looked, fresh, notes = divide(ROWS, PLAN, seed=0)
    assert notes == []
    assert sorted(e.row for e in looked + fresh) == list(range(60))
    assert not {e.group for e in looked} & {e.group for e in fresh}
    assert len(looked) == len(fresh) == 30
    assert {e.row for e in divide(ROWS, PLAN, seed=1)[0]} != {e.row for e in looked}


def test_no_more_than_planned() -> None:
    looked, fresh, _ = divide(ROWS, replace(PLAN, looked=12, fresh=15), seed=0)
    assert (len(looked), len(fresh)) == (12, 15)
    assert not {e.group for e in looked} & {e.group for e in fresh}


def test_looks_that_are_dear_are_said() -> None:
    """A tenth of the training's work is planned with; twice that is not worth a word."""
    plan = replace(PLAN, example_share=0.01)
    assert plan.warnings(20) == []
    (said,) = plan.warnings(36)
    assert said.startswith("A short training: its looks measure 36 examples,")
    assert "may take up to 36% of its own work; those of a longer one take 10%." in said


def test_too_few_to_halve_is_said() -> None:
    looked, fresh, notes = divide(ROWS[:18], PLAN, seed=0)
    assert looked == fresh == ROWS[:18]
    assert "too small to halve: it has 18 examples" in notes[0]
    assert "optimistic" in notes[0]


def test_examples_come_from_as_many_documents_as_there_are() -> None:
    """An error grows with what one document's examples share: 12 of 12 documents say more than 12 of 2."""
    rows = [replace(e, group=e.row // 10) for e in examples(240)]
    looked, fresh, notes = divide(rows, replace(PLAN, looked=12, fresh=30), seed=0)
    assert (len(looked), len(fresh), notes) == (12, 30, [])
    assert len({e.group for e in looked}) == 12
    assert len({e.group for e in fresh}) == 12
    assert not {e.group for e in looked} & {e.group for e in fresh}


@pytest.mark.parametrize("documents", [1, 2, 4, 9])
def test_few_documents_are_on_both_sides_and_their_examples_on_one(documents: int) -> None:
    """Whole ones would leave too few for an error; all of them for both would make the last figure optimistic."""
    rows = [replace(e, group=e.row % documents) for e in examples(60)]
    looked, fresh, notes = divide(rows, PLAN, seed=0)
    assert min(len(looked), len(fresh)) >= 29
    assert not {e.row for e in looked} & {e.row for e in fresh}
    assert len({e.group for e in looked}) == len({e.group for e in fresh}) == documents
    assert f"is of {documents} document{'s' * (documents > 1)}, too few to halve" in notes[0]
    assert "optimistic" not in notes[0]


def test_neither_half_of_uneven_documents_is_too_small() -> None:
    """Odd sizes do not add up on one side."""
    sizes = (4, 1, 3, 3, 4, 1, 1, 2, 1)
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    rows = [replace(e, group=g) for e, g in zip(examples(20), groups, strict=True)]
    for seed in range(8):
        looked, fresh, _ = divide(rows, PLAN, seed=seed)
        assert len(looked) == len(fresh) == FRESH_LEAST


@pytest.mark.parametrize("seed", range(4))
def test_one_document_that_holds_nearly_all(seed: int) -> None:
    """Whichever comes first: neither half is of it alone, or has too few examples."""
    rows = [replace(e, group=0 if e.row < 50 else e.row) for e in examples(60)]
    looked, fresh, notes = divide(rows, PLAN, seed=seed)
    assert min(len(looked), len(fresh)) >= FRESH_LEAST
    assert min(len({e.group for e in half}) for half in (looked, fresh)) >= FEW_DOCUMENTS // 2
    assert "is of 11 documents, too uneven to halve" in notes[0]
    assert not {e.row for e in looked} & {e.row for e in fresh}
