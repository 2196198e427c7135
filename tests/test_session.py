"""Which held-out examples choose, and which only report."""

from dataclasses import replace

from examples import examples
from rankrace.plan import LookPlan
from rankrace.session import divide

PLAN = LookPlan(fractions=(0.2,), looked=1000, fresh=1000)
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


def test_too_few_to_halve_is_said() -> None:
    looked, fresh, notes = divide(ROWS[:18], PLAN, seed=0)
    assert looked == fresh == ROWS[:18]
    assert "too small to halve" in notes[0]
    assert "optimistic" in notes[0]
