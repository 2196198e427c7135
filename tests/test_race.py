"""What `race` decides on benches whose losses are known.

Shapes: N held-out examples.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter

from curves import Curves, held_out
from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.plan import ranks_looked_at
from rankrace.select.objective import Objective, linear_penalty, log2_penalty
from rankrace.select.race import MOST, Race
from rankrace.select.reason import is_confident, reason
from rankrace.select.search import SearchState
from rankrace.select.statistics import CLEARLY
from rankrace.select.strategy import WAITED, Cut, Keep, Look, Start, Strategy, Train

WIDE = 64
GRID = (2, 4, 8, 16, 32)
FREE = log2_penalty(0.0)
ONE_SE = Objective(penalty=FREE, rule="one_se")
ARGMIN = Objective(penalty=FREE, rule="argmin")
SHARED = Objective(penalty=FREE, rule="one_se", share=0.04)
Curve = Callable[[int], float]


def race(
    objective: Objective = ONE_SE, *, steps: int = 100, ranks: tuple[int, ...] = GRID, refine: bool = False
) -> Race:
    return Race(total_steps=steps, wide=WIDE, ranks=ranks, refine=refine, objective=objective)


def knee(r0: int) -> Curve:
    return lambda rank: 2.0 + 0.05 * max(0, r0 - rank)


def bench(cut: Curve, healed: Curve | None = None, *, noise: float = 0.001, examples: int = 400) -> Curves:
    """The losses when a rank has just been cut, and once it has healed."""
    own = {r: (healed or cut)(r) for r in range(1, WIDE + 1)}
    return Curves(held=held_out(examples), ranks=(WIDE,), truncation=cut, own=own, noise=noise)


def after(ranks: tuple[int, ...], look: Look) -> tuple[int, ...]:
    """The candidates that go on."""
    match look.action:
        case Keep(indices=indices):
            return tuple(ranks[i] for i in indices)
        case Cut(ranks=cuts):
            return cuts
        case _:
            return ranks


def play(strategy: Strategy, measured: Curves) -> tuple[list[Look], list[tuple[int, ...]]]:
    """Looks until the rank is decided, and the candidates after each."""
    measured.ranks = tuple(start.rank for start in strategy.start())
    looks: list[Look] = []
    going: list[tuple[int, ...]] = []
    while (step := strategy.next_look(looks)) is not None:
        looks.append(strategy.look(step, looks, measured))
        measured.ranks = after(measured.ranks, looks[-1])
        going.append(measured.ranks)
    return looks, going


def said(look: Look) -> str:
    return reason(look, share=0.2, examples=400)


# --- when


def test_one_wide_candidate_starts_and_is_looked_at_four_times():
    strategy = race()
    assert strategy.start() == (Start(rank=WIDE),)
    assert not strategy.averages
    assert strategy.next_look([]) == 10
    healed = {8: 2.0005, 16: 2.0}
    looks, _ = play(strategy, bench(knee(16), lambda rank: healed.get(rank, 2.01), noise=0.05))
    assert [look.step for look in looks] == [10, 12, 15, 20]


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("steps", range(1, 41))
def test_it_decides_in_time_however_short_the_training(steps: int, refine: bool):
    looks, going = play(race(steps=steps, refine=refine), bench(knee(8)))
    at = [look.step for look in looks]
    assert at == sorted(set(at))
    assert 1 <= at[-1] <= max(4, 0.2 * steps + 0.5)
    assert at[-1] < steps or steps == 1
    assert [look.final for look in looks] == [False] * (len(looks) - 1) + [True]
    assert going[-1] == (8,)
    assert not looks[-1].capped
    assert said(looks[-1])


def test_a_training_of_a_step_or_two_has_no_race_and_says_so():
    for steps in (1, 2):
        (look,), _ = play(race(steps=steps), bench(knee(8)))
        assert look.action == Cut(index=0, ranks=(8,))
        assert "a training too short for a race; no rank was trained beside it" in said(look)


def test_where_nothing_is_told_apart_it_is_probed_again_later():
    """A flat curve says nothing: the wide candidate trains on, and whether there is a race shows at 60%."""
    flat, learnt = bench(lambda rank: 2.0, noise=0.05), bench(knee(4))
    strategy = race()
    first = strategy.look(10, [], flat)
    assert (first.action, first.final) == (Train(), False)
    assert strategy.next_look([first]) == 60
    second = strategy.look(60, [first], learnt)
    assert second.action == Cut(index=0, ranks=(2, 4))
    assert strategy.next_look([first, second]) == 62
    never = strategy.look(60, [first], flat)
    assert (never.action, never.final) == (Cut(index=0, ranks=(2,)), True)
    assert WAITED in said(never)
    only = race(ranks=(8,)).look(10, [], flat)
    assert only.action == Cut(index=0, ranks=(8,)), "with one rank nothing is waited for"
    assert not is_confident(never)


def test_after_a_late_probe_the_heats_are_as_ever():
    strategy, learnt = race(ARGMIN), bench(knee(8), lambda rank: 2.0 + 0.001 * abs(rank - 8), noise=0.05)
    looks = [strategy.look(10, [], bench(lambda rank: 2.0, noise=0.05))]
    learnt.ranks = (WIDE,)
    while (step := strategy.next_look(looks)) is not None:
        looks.append(strategy.look(step, looks, learnt))
        learnt.ranks = after(learnt.ranks, looks[-1])
    assert [look.step for look in looks] == [10, 60, 62, 65, 70]
    assert WAITED in said(looks[-1])
    assert learnt.ranks == (8,)


# --- which ranks race


@pytest.mark.parametrize(
    ("r0", "racers"),
    [(2, (2,)), (3, (2, 4)), (8, (2, 4, 8)), (12, (2, 4, 8, 16)), (17, (4, 8, 16, 32)),
     (50, (4, 8, 16, 32))],
)  # fmt: skip
def test_a_rank_that_is_good_enough_when_just_cut_is_the_largest_to_race(r0: int, racers: tuple[int, ...]):
    measured = bench(knee(r0))
    look = race().look(10, [], measured)
    assert look.action == Cut(index=0, ranks=racers)
    assert look.final == (len(racers) == 1)
    assert [r for _, r in measured.asked] == [1, *GRID], "rank 1 says what rank buys"


def test_what_rank_buys_is_counted_from_rank_1_though_it_may_not_be_picked():
    """4% of what 16 buys over rank 1 is .024 nats, over rank 8 only .004."""
    curve = {1: 2.6, 8: 2.1, 16: 2.01, 32: 2.0}
    look = race(SHARED, ranks=(8, 16, 32)).look(10, [], bench(lambda rank: curve.get(rank, 9.0)))
    assert look.action == Cut(index=0, ranks=(8, 16))
    assert {p.rank for p in look.verdict.points} == {8, 16, 32}


def test_one_racer_needs_no_race():
    (look,), going = play(race(), bench(knee(2)))
    assert (look.step, look.final, look.edge) == (10, True, "low")
    assert going == [(2,)]
    assert "even cut to it, the update loses nothing that counts; no rank was trained beside it" in said(look)
    assert not is_confident(look)


def test_a_single_rank_to_pick_from():
    (look,), going = play(race(ranks=(8,)), bench(knee(20)))
    assert going == [(8,)]
    assert look.edge == "low"
    assert said(look)


@pytest.mark.parametrize("objective", [ONE_SE, ARGMIN, SHARED])
def test_where_rank_1_is_best_and_may_not_be_picked_the_smallest_is(objective: Objective):
    """What overfits already: every rank above 1 is worse. The sentence has no share of nothing in it."""
    (early, look), going = play(race(objective), bench(lambda rank: 2.0 + 0.1 * math.log2(rank)))
    assert (early.action, look.step) == (Train(), 60)
    assert going == [(WIDE,), (2,)]
    assert look.verdict.bought == 0.0
    assert said(look).startswith("rank 2 has the lowest validation loss")


def test_a_wide_candidate_that_diverged_ends_the_race():
    with pytest.raises(RankraceError, match="every candidate diverged"):
        race().look(10, [], bench(lambda rank: math.nan))


# --- the heats


def test_the_worst_drop_out_and_the_winner_goes_on_undisturbed():
    """As cut, 16 is needed; healed, 8 is as good, 4 a little and 2 much worse."""
    healed = {2: 2.2, 4: 2.0009, 8: 2.0, 16: 2.0}
    measured = bench(knee(16), lambda rank: healed.get(rank, 9.0), noise=0.01)  # paired errors of .0007
    looks, going = play(race(), measured)
    assert [look.step for look in looks] == [10, 12, 15, 20]
    assert going == [(2, 4, 8, 16), (4, 8), (4, 8), (8,)]
    assert looks[1].action == Keep(indices=(1, 2))
    assert looks[-1].action == Keep(indices=(1,))
    assert (looks[-1].final, looks[-1].edge, looks[-1].verdict.pick) == (True, None, 8)
    assert "ranks 4, 8 had been cut from 64 and trained on side by side" in said(looks[-1])


def test_the_smallest_that_cannot_be_told_apart_wins():
    looks, going = play(race(), bench(knee(16), lambda rank: 2.0 + 0.0001 * (16 - rank), noise=0.05))
    assert going == [(2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 8, 16), (2,)]
    assert looks[-1].edge == "low"
    assert "ranks 2 to 16 cannot be told apart on this validation set, and 2 is the smallest" in said(looks[-1])


def test_when_all_but_one_are_dropped_the_race_is_over():
    looks, going = play(race(), bench(knee(16), knee(16)))
    assert [look.step for look in looks] == [10, 12]
    assert going[-1] == (16,)
    assert looks[-1].final


def test_what_rank_buys_is_kept_from_the_first_heat():
    """2 buys nothing by itself and is dropped; 4 loses 3% of what 16 buys over 2, and all of what it does over 4."""
    healed = {2: 2.1, 4: 2.003, 8: 2.003, 16: 2.0}
    measured = bench(knee(16), lambda rank: healed.get(rank, 9.0), noise=0.0001)
    looks, going = play(race(SHARED), measured)
    assert going[1] == (4, 8, 16)
    assert going[-1] == (4,)
    assert looks[-1].verdict.bought == looks[1].verdict.bought == pytest.approx(0.1)
    assert "3% of the 0.1000 that rank buys, and no smaller one loses as little" in said(looks[-1])


def test_a_penalty_counts_in_the_race():
    charged = Objective(penalty=linear_penalty(0.02, float), rule="one_se")
    _, going = play(race(charged, ranks=(2, 4, 8, 16)), bench(lambda r: 2.0 + 0.5 / r, lambda r: 2.0 + 0.5 / r))
    assert going[-1] == (4,)  # J: .29, .205, .2225, .35


@pytest.mark.parametrize("objective", [ONE_SE, ARGMIN, SHARED])
def test_who_is_within_two_paired_errors_stays_and_never_more_than_four_race(objective: Objective):
    """300 random curves. Whoever is larger than the best is no better for being so, and goes."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        cut = dict(zip((1, *GRID), 2.0 + np.sort(rng.exponential(0.02, 6))[::-1], strict=True))
        healed = dict(zip(GRID, 2.0 + rng.exponential(0.01, 5), strict=True))
        measured = bench(
            cut.__getitem__, lambda rank, h=healed: h.get(rank, 9.0), noise=float(rng.uniform(0.01, 0.2))
        )
        looks, going = play(race(objective), measured)
        assert all(1 <= len(ranks) <= MOST for ranks in going)
        assert len(going[-1]) == 1
        assert going[-1][0] in GRID
        cuts = next(i for i, look in enumerate(looks) if isinstance(look.action, Cut))  # a flat probe is repeated
        for look, before, ranks in zip(looks[cuts + 1 : -1], going[cuts:], going[cuts + 1 :], strict=False):
            best = look.verdict.at(look.verdict.best)
            assert {best.rank, look.verdict.pick} <= set(ranks)
            for dropped in set(before) - set(ranks):
                p = look.verdict.at(dropped)
                assert dropped > best.rank or p.objective - best.objective > CLEARLY * p.se


def test_nobody_is_dropped_for_an_error_that_is_unknown():
    """One document: the pick of the share rule is behind the best by an unknown number of errors. (By which nothing
    can be told apart, either, so that the race is a late one.)"""
    healed = {2: 2.1, 4: 2.002, 8: 2.0, 16: 2.1}
    measured = bench(lambda rank: 2.0 + 1.0 / rank, lambda rank: healed.get(rank, 9.0))
    measured.held = held_out(400, clusters=1)
    looks, going = play(race(SHARED, ranks=(2, 4, 8, 16)), measured)
    assert [look.step for look in looks] == [10, 60, 62, 65, 70]
    assert going[2] == going[3] == (2, 4, 8)
    assert looks[3].action == Train(), "where all stay nothing is copied"
    assert going[-1] == (4,)


@pytest.mark.parametrize("ranks", [(16,), (4, 16), GRID])
def test_its_first_look_is_planned_for(ranks: tuple[int, ...]):
    measured = bench(knee(2))
    race(ranks=ranks).look(10, [], measured)
    config = RunConfig(model="m", data="d", strategy="race", ranks=ranks)
    assert len(measured.asked) == ranks_looked_at(config)


# --- candidates that failed


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_racers_that_diverged_are_passed_over(lost: float):
    measured = bench(knee(16), knee(4), noise=0.001)
    measured.own |= {4: lost, 16: lost}
    looks, going = play(race(), measured)
    assert going == [(2, 4, 8, 16), (8,)]
    assert looks[-1].final
    assert said(looks[-1])


def test_when_all_diverge_that_is_an_error():
    measured = bench(knee(16))
    measured.own = dict.fromkeys(measured.own, math.nan)
    with pytest.raises(RankraceError, match="every candidate diverged"):
        play(race(), measured)


# --- the integers between


@pytest.mark.parametrize("r0", [3, 5, 6, 7, 9, 11, 12, 15])
def test_an_integer_between_racers_is_cut_from_the_next_larger(r0: int):
    """The planted rank, once healed; before that the cut looked worse than it is."""
    measured = bench(knee(16), knee(r0), noise=0.0001)
    first = race(refine=True)
    looks, going = play(first, measured)
    assert looks[-1].final
    racers = going[-2]
    winner = min(r for r in racers if r >= r0)
    assert going[-1] == (winner,), "cut again it loses what it had healed"
    # Where a fresh cut is as good as what healed, the integer is found.
    measured = bench(knee(16), knee(r0), noise=0.0001)
    probed = first.look(10, [], measured)
    measured.ranks = after(measured.ranks, probed)
    measured.truncation = knee(r0)
    heats = [probed]
    while not heats[-1].final:
        heats.append(first.look(12, heats, measured))
        before, measured.ranks = measured.ranks, after(measured.ranks, heats[-1])
    assert measured.ranks == (r0,)
    assert heats[-1].action == Cut(index=before.index(winner), ranks=(r0,))
    assert f"and {r0} was cut from {winner}" in said(heats[-1])


def test_refinement_may_go_below_the_smallest_rank():
    measured = bench(lambda rank: 2.0 + 0.05 * max(0, 16 - rank), knee(5), noise=0.0001)
    strategy = race(ranks=(8, 16), refine=True)
    probed = strategy.look(10, [], measured)
    measured.ranks, measured.truncation = after(measured.ranks, probed), knee(5)
    look = strategy.look(12, [probed, replace(probed)], measured)
    assert look.final or look.action == Keep(indices=(0,))
    heat = strategy.look(20, [probed, look, look], measured)
    assert heat.action == Cut(index=0, ranks=(5,))
    assert heat.edge is None, "4 was tried and refused"


@pytest.mark.parametrize(("r0", "edge"), [(2, "low"), (8, None), (32, "high")])
def test_an_edge_is_said(r0: int, edge: str | None):
    looks, _ = play(race(), bench(knee(32), knee(r0)))
    assert looks[-1].verdict.pick == max(r0, 4)
    assert looks[-1].edge == (None if r0 == 2 else edge), "4 of 2, 4, 8, 16, 32: the probe left 2 behind"
    looks, _ = play(race(ranks=(2, 4, 32)), bench(knee(32), knee(r0)))
    assert looks[-1].edge == ("high" if r0 > 4 else edge)


# --- decisions depend on nothing but the looks and the measurements


def noisy(seed: int) -> Curves:
    rng = np.random.default_rng(seed)
    healed = dict(zip(GRID, 2.0 + rng.exponential(0.005, 5), strict=True))
    return bench(lambda rank: 2.0 + 0.3 / rank, lambda rank: healed.get(rank, 2.0 + 0.1 / rank), noise=0.05)


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_asked_twice_it_decides_the_same(seed: int, refine: bool):
    once = play(race(refine=refine), noisy(seed))
    assert play(race(refine=refine), noisy(seed)) == once


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_race_that_was_saved_goes_on_to_the_same_choice(seed: int, refine: bool):
    strategy, adapter = race(refine=refine), TypeAdapter(SearchState)
    whole, going = play(strategy, noisy(seed))
    for i in range(len(whole)):
        state = json.loads(json.dumps(adapter.dump_python(SearchState(looks=whole[:i]), mode="json")))
        looks = adapter.validate_python(state).looks
        assert looks == whole[:i]
        measured = noisy(seed)
        measured.ranks = going[i - 1] if i else (WIDE,)
        while (step := strategy.next_look(looks)) is not None:
            looks.append(strategy.look(step, looks, measured))
            measured.ranks = after(measured.ranks, looks[-1])
        assert looks == whole


def test_equal_ranks_mostly_give_the_smallest_and_hardly_ever_confidence():
    """Truly equal: the differences are noise of about one standard error, another for each rank. (Truncations of one
    candidate share most of theirs.) Where it fools one standard error, it does not often fool two."""
    smallest, sure = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        healed = dict(zip(GRID, 2.0 + 0.001 * rng.normal(size=5), strict=True))
        measured = bench(lambda rank: 2.0 + 0.3 / rank, lambda rank, h=healed: h.get(rank, 9.0), noise=0.02)
        looks, going = play(race(), measured)
        smallest.append(going[-1] == going[0][:1])
        sure.append(is_confident(looks[-1]))
    assert np.mean(smallest) >= 0.6
    assert np.mean(sure) <= 0.1
    looks, going = play(race(), bench(lambda rank: 2.0 + 0.3 / rank, lambda rank: 2.0, noise=0.02))
    assert going[-1] == going[0][:1] == (4,)
    assert not is_confident(looks[-1])
