"""A planted rank is found by the default strategy. The whole study is docs/planted.md."""

from dataclasses import replace

import pytest

from benchmarks.planted.teacher import Regime, plant
from benchmarks.planted.unit import Unit, prepared

SEED = 0
REGIME = Regime(layers=1)
"""Half the study's layers, for speed."""
SAMPLED = replace(REGIME, steps=300)
"""Fresh examples until shrink's last look: the choice sees no others."""


@pytest.mark.parametrize("rank", [3, 6])
def test_a_flat_rank_is_found_within_one(rank: int):
    """One standard error alone, the former rule, picks 8 and 14."""
    planted = plant("flat", rank, SEED, SAMPLED)
    search, _ = prepared(planted, Unit(kind="flat", rank=rank, seed=SEED, strategy="shrink"), REGIME)
    search.start()
    for _ in search.run(only_choice=True):
        pass
    assert search.trainer.total == REGIME.steps
    assert search.trainer.step <= SAMPLED.steps
    assert abs(search.state.looks[-1].verdict.pick - rank) <= 1
