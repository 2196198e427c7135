"""Which held-out examples choose, and which only report."""

from dataclasses import replace

import pytest

from examples import examples
from rankrace.plan import LookPlan
from rankrace.session import divide

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


@pytest.mark.parametrize(("large", "rest"), [(60, 0), (55, 5)])
def test_one_document_that_holds_too_much_is_said(large: int, rest: int) -> None:
    """Whichever document comes first."""
    rows = [replace(e, group=0 if e.row < large else e.row) for e in examples(large + rest)]
    for seed in range(8):
        looked, fresh, notes = divide(rows, PLAN, seed=seed)
        assert looked == fresh == rows
        assert f"is not halved: documents stay whole, and {large} of its 60 examples are of one." in notes[0]
        assert "too small" not in notes[0]
        assert "optimistic" in notes[0]


@pytest.mark.parametrize(("documents", "halved"), [(2, False), (3, False), (4, True)])
def test_no_half_is_of_one_document(documents: int, halved: bool) -> None:
    """It would have no error, though there are documents enough for one."""
    rows = [replace(e, group=e.row % documents) for e in examples(60)]
    looked, fresh, notes = divide(rows, PLAN, seed=0)
    if halved:
        assert min(len({e.group for e in half}) for half in (looked, fresh)) == 2
        assert notes == []
    else:
        assert looked == fresh == rows
        assert f"documents stay whole, and no error is known from one; it has {documents}." in notes[0]
