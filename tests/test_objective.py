"""Which rank a curve of losses leads to, and what is said of it."""

import math
import warnings
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from curves import GPT2_MEDIUM, GSM8K_BASE, GSM8K_DIRECT, GSM8K_TRUNCATED, held_out, trial, trials
from models import tiny
from rankrace.bank import Bank
from rankrace.config import Rule, RunConfig
from rankrace.errors import RankraceError
from rankrace.options import checked
from rankrace.select.build import SHARES, penalty_of
from rankrace.select.objective import (
    DRAWS,
    Curve,
    Held,
    Objective,
    Penalty,
    Trial,
    Verdict,
    linear_penalty,
    log2_penalty,
)
from rankrace.select.reason import doubt, is_confident, reason
from rankrace.select.statistics import bootstrap_weights
from rankrace.select.strategy import Edge, Look, Train

FREE = log2_penalty(0.0)
RULES: tuple[Rule, ...] = get_args(Rule)
both_rules = pytest.mark.parametrize("rule", RULES)
GRID: tuple[int, ...] = (2, 4, 8, 16, 32)


def judge(
    curve: dict[int, float],
    penalty: Penalty = FREE,
    *,
    rule: Rule = "argmin",
    share: float = 0.0,
    noise: float = 0.0,
    held: Held | None = None,
    draws: int = 0,
) -> Verdict:
    held = held or held_out()
    objective = Objective(penalty=penalty, rule=rule, share=share)
    return objective.judge(trials(curve, held, noise=noise), held, draws=draws)


def part(curve: dict[int, float], ranks: tuple[int, ...]) -> dict[int, float]:
    return {r: curve[r] for r in ranks}


def scaled(curve: dict[int, float], factor: float) -> dict[int, float]:
    return {r: loss * factor for r, loss in curve.items()}


# --- the published curve


@both_rules
def test_the_lora_papers_curve_gives_16_without_a_penalty(rule: Rule):
    verdict = judge(GPT2_MEDIUM, rule=rule)
    assert verdict.pick == verdict.best == 16
    assert verdict.edge is None


@pytest.mark.parametrize("kappa", [0.0, 0.001, 0.003])
@both_rules
def test_more_or_fewer_ranks_on_the_grid_flip_nothing(kappa: float, rule: Rule):
    """Nothing is normalised by the grid's largest rank or its size."""
    for ranks in (GRID, (*GRID, 64), (2, 8, 16, 32), (2, 8, 16, 32, 64), (16,), tuple(GPT2_MEDIUM)):
        assert judge(part(GPT2_MEDIUM, ranks), log2_penalty(kappa), rule=rule).pick == 16, ranks


def test_a_penalty_that_asks_more_than_a_doubling_buys_ends_lower():
    """G = 3 − 1.16 = 1.84; 8 → 16 and 4 → 8 buy .01, 2 → 4 buys .03, 1 → 2 buys .02."""
    assert judge(GPT2_MEDIUM, log2_penalty(0.0100 / 1.84 * 0.99)).pick == 16
    assert judge(GPT2_MEDIUM, log2_penalty(0.0100 / 1.84 * 1.01)).pick == 4
    assert judge(GPT2_MEDIUM, log2_penalty(0.05)).pick == 1


def test_ranks_that_do_not_improve_the_best_never_change_the_choice():
    """300 random curves, each extended by ranks that are no better than what was there."""
    rng = np.random.default_rng(0)
    held = held_out()
    for rule in RULES:
        for _ in range(150):
            curve = dict(zip(GRID, 2.0 + np.sort(rng.exponential(0.02, 5))[::-1], strict=True))
            more = {**curve, 64: min(curve.values()) + rng.exponential(0.01)}
            penalty = log2_penalty(rng.choice([0.0, 0.001, 0.01]))
            picks = [judge(c, penalty, rule=rule, noise=0.05, held=held).pick for c in (curve, more)]
            assert picks[0] == picks[1]


@both_rules
@pytest.mark.parametrize("kappa", [0.0, 0.001, 0.01])
def test_tenfold_units_of_loss_flip_nothing(rule: Rule, kappa: float):
    rng = np.random.default_rng(1)
    for _ in range(100):
        curve = dict(zip(GRID, 2.0 + rng.exponential(0.02, 5), strict=True))
        plain = judge(curve, log2_penalty(kappa), rule=rule, noise=0.05)
        tenfold = judge(scaled(curve, 10), log2_penalty(kappa), rule=rule, noise=0.5, held=held_out(base=30.0))
        assert (tenfold.pick, tenfold.best) == (plain.pick, plain.best)
        assert tenfold.gain == pytest.approx(10 * plain.gain)
        assert [p.se for p in tenfold.points] == pytest.approx([10 * p.se for p in plain.points])


# --- what the verdict contains


def test_the_numbers_of_a_verdict():
    held = held_out(base=3.0)
    verdict = judge({8: 2.0, 2: 2.5, 4: 2.1}, log2_penalty(0.1), held=held)
    assert [p.rank for p in verdict.points] == [2, 4, 8]  # sorted
    assert verdict.gain == pytest.approx(1.0)
    assert verdict.clusters == 64
    assert [p.loss for p in verdict.points] == pytest.approx([2.5, 2.1, 2.0])
    assert [p.penalty for p in verdict.points] == pytest.approx([0.1, 0.2, 0.3])
    assert [p.objective for p in verdict.points] == pytest.approx([2.6, 2.3, 2.3])
    assert verdict.pick == verdict.best == 4  # 4 and 8 tie
    assert verdict.at(4).se == 0.0


def test_standard_errors_are_paired_with_the_best():
    held = held_out(400)
    verdict = judge({2: 2.1, 4: 2.0, 8: 2.05}, noise=0.1, held=held)
    d_N = trial(2, 2.1, held, noise=0.1).loss_N - trial(4, 2.0, held, noise=0.1).loss_N
    e_N = d_N - 0.1 * held.tokens_N
    plain = math.sqrt(400 / 399 * (e_N**2).sum()) / held.tokens_N.sum()
    assert verdict.at(2).se == pytest.approx(plain)


# --- the rules


@both_rules
def test_ties_go_down(rule: Rule):
    curve = {2: 2.0, 4: 1.9, 8: 1.9, 16: 1.9}
    assert judge(curve, rule=rule).pick == 4
    # Sums in another order: equal up to rounding.
    assert judge({**curve, 8: 1.9 * (1 - 1e-15), 16: 1.9 * (1 + 1e-15)}, rule=rule).pick == 4
    assert judge(dict.fromkeys(GRID, 1.9), rule=rule).pick == 2


def test_a_candidate_that_runs_off_does_not_blur_the_others():
    """A loss of a million is finite; what counts as a tie must not grow with it."""
    assert judge({2: 1.9001, 4: 1.9, 8: 1e6}).pick == 4


def test_one_se_takes_the_smallest_that_cannot_be_told_apart():
    curve = {2: 2.02, 4: 2.002, 8: 2.001, 16: 2.0, 32: 2.0005}
    held = held_out(400)
    fuzzy = judge(curve, rule="one_se", noise=0.05, held=held)
    sharp = judge(curve, rule="one_se", noise=0.005, held=held)
    assert fuzzy.at(4).se > 0.002
    assert (fuzzy.pick, fuzzy.best) == (4, 16)
    assert sharp.at(8).se < 0.001
    assert (sharp.pick, sharp.best) == (16, 16)
    assert judge(curve, rule="argmin", noise=0.05, held=held).pick == 16


def test_two_se_takes_a_smaller_one():
    """The errors of 4, 8 and 16 are .0035; 4 is behind by .005, 8 by .002."""
    curve, held = {2: 2.02, 4: 2.005, 8: 2.002, 16: 2.0, 32: 2.0005}, held_out(400)
    one, two = (judge(curve, rule=rule, noise=0.05, held=held) for rule in ("one_se", "two_se"))
    assert one.at(4).se < 0.005 < 2 * one.at(4).se
    assert (one.pick, two.pick) == (8, 4)
    told = reason(Look(step=3, verdict=two, action=Train(), reason="r"), share=0.1, examples=9)
    assert told.startswith("ranks 4 to 32 cannot be told apart on this validation set, and 4 is the smallest")


def test_linear_penalty_takes_parameters_bytes_or_what_the_user_says():
    """In nats, whatever the gain: the classical L + λ·p."""
    curve = {2: 2.2, 4: 2.1, 8: 2.05, 16: 2.04}
    parameters, base_parameters = {r: r * 50_000 for r in curve}, 10_000_000
    share = linear_penalty(1.0, lambda r: parameters[r] / base_parameters)  # .01 at rank 2 … .08 at rank 16
    assert judge(curve, share).pick == 8
    assert [p.penalty for p in judge(curve, share).points] == pytest.approx([0.01, 0.02, 0.04, 0.08])
    per_byte = linear_penalty(1.0 / base_parameters / 2, lambda r: 2 * parameters[r])
    assert [p.penalty for p in judge(curve, per_byte).points] == pytest.approx([0.01, 0.02, 0.04, 0.08])
    only_small = linear_penalty(1.0, lambda r: 0.0 if r <= 4 else math.inf)
    assert judge(curve, only_small).pick == 4
    assert judge(curve, share, held=held_out(base=300.0)).pick == 8


def test_prices_that_are_no_numbers_are_refused():
    curve = {2: 2.2, 4: 2.1}
    for prices in ({2: math.nan, 4: 0.0}, {2: 0.0, 4: math.nan}, {2: -math.inf, 4: 0.0}, {2: math.inf, 4: math.inf}):
        with pytest.raises(RankraceError, match="prices of ranks are no numbers, or rule all of them out"):
            judge(curve, linear_penalty(1.0, prices.__getitem__))
    assert judge(curve, linear_penalty(1.0, {2: math.inf, 4: 0.0}.__getitem__), rule="two_se").pick == 4
    with pytest.raises(RankraceError, match="rule all of them out"):  # the only one that may be had has diverged
        judge(curve | {8: math.nan}, linear_penalty(1.0, {2: math.inf, 4: math.inf, 8: 0.0}.__getitem__))


# --- a share of what rank itself buys


def shared(curve: dict[int, float], penalty: Penalty = FREE, *, share: float = 0.04, **options: Any) -> Verdict:
    return judge(curve, penalty, rule="one_se", share=share, **options)


def test_a_smaller_rank_may_lose_four_percent_of_what_rank_buys():
    """Rank buys 2.2 − 2.0 = .2 nats here; 4% of it are .008. No error hides anything."""
    curve = {1: 2.2, 2: 2.1, 4: 2.0081, 8: 2.0079, 16: 2.0001, 32: 2.0}
    verdict = shared(curve)
    assert (verdict.pick, verdict.best) == (8, 32)
    assert verdict.bought == pytest.approx(0.2)
    assert shared({**curve, 4: 2.0079}).pick == 4
    assert [shared(curve, share=share).pick for share in (0.0, 0.01, 0.05, 0.6, 1.0)] == [32, 16, 4, 2, 1]
    assert judge(curve, share=0.04).pick == 32, "argmin takes the lowest"
    assert sentence(seen(verdict)).startswith(
        "rank 8 is 0.0079 ± 0.0000 nats behind the best, rank 32, 3.9% of the 0.2000 that rank buys, "
        "and no smaller one loses as little; rank 4 is 0.0081"
    )


def test_what_the_noise_hides_may_be_more_than_the_share():
    curve, held = {1: 2.1, 2: 2.01, 4: 2.002, 8: 2.0}, held_out(400)
    assert shared(curve, held=held).pick == 4
    fuzzy = shared(curve, noise=0.2, held=held)  # errors of .014
    assert (fuzzy.pick, fuzzy.best) == (2, 8)
    assert "cannot be told apart" in sentence(seen(fuzzy))
    unknown = shared(curve, noise=0.2, held=held_out(400, clusters=1))
    assert unknown.pick == 4, "an error that is unknown hides nothing, and the share is as it was"
    assert "(error unknown)" in sentence(seen(unknown))


def test_the_named_shares_on_the_lora_papers_curve():
    """.07 nats from rank 1 to 16: 1%, 4% and 8% are .0007, .0028 and .0056; 8 loses .01."""
    assert set(SHARES) == {"quality", "balanced", "small"}
    assert SHARES["quality"] < SHARES["balanced"] == 0.04 < SHARES["small"]
    for share in SHARES.values():
        verdict = shared(GPT2_MEDIUM, share=share)
        assert verdict.pick == verdict.best == 16
    assert shared(GPT2_MEDIUM, share=0.15).pick == 8


@pytest.mark.parametrize("share", SHARES.values())
def test_with_a_share_too_more_or_fewer_ranks_flip_nothing(share: float):
    for ranks in (GRID, (*GRID, 64), (2, 8, 16, 32), (2, 8, 16, 32, 64), (16,), tuple(GPT2_MEDIUM)):
        assert shared(part(GPT2_MEDIUM, ranks), share=share).pick == 16, ranks


def test_with_a_share_ranks_that_do_not_improve_the_best_never_change_the_choice():
    """Larger ones that are no better, or one from the middle less that was not picked."""
    rng, held = np.random.default_rng(0), held_out()
    for _ in range(150):
        curve = dict(zip(GRID, 2.0 + np.sort(rng.exponential(0.02, 5))[::-1], strict=True))
        share = float(rng.choice(list(SHARES.values())))
        verdict = shared(curve, share=share, noise=0.02, held=held)
        more = {**curve, 64: min(curve.values()) + rng.exponential(0.01)}
        assert shared(more, share=share, noise=0.02, held=held).pick == verdict.pick
        for rank in set(GRID[1:]) - {verdict.pick, verdict.best}:
            fewer = {r: loss for r, loss in curve.items() if r != rank}
            assert shared(fewer, share=share, noise=0.02, held=held).pick == verdict.pick


@pytest.mark.parametrize("share", SHARES.values())
def test_with_a_share_tenfold_units_of_loss_flip_nothing(share: float):
    rng = np.random.default_rng(1)
    for _ in range(100):
        curve = dict(zip(GRID, 2.0 + rng.exponential(0.02, 5), strict=True))
        plain = shared(curve, share=share, noise=0.02)
        tenfold = shared(scaled(curve, 10), share=share, noise=0.2, held=held_out(base=30.0))
        assert (tenfold.pick, tenfold.best) == (plain.pick, plain.best)
        assert tenfold.bought == pytest.approx(10 * plain.bought)


def test_with_a_share_ties_go_down():
    curve = {2: 2.0, 4: 1.9, 8: 1.9, 16: 1.9}
    assert shared(curve).pick == 4
    assert shared({**curve, 8: 1.9 * (1 - 1e-15), 16: 1.9 * (1 + 1e-15)}).pick == 4
    equal = shared(dict.fromkeys(GRID, 1.9))
    assert (equal.pick, equal.bought) == (2, 0.0)
    assert sentence(seen(equal))


def test_what_rank_buys_may_be_known_from_another_curve():
    held = held_out()
    objective = Objective(penalty=FREE, rule="one_se", share=0.04)
    late = trials({4: 2.007, 8: 2.0}, held)
    assert objective.judge(late, held).pick == 8
    known = objective.judge(late, held, 0.2)
    assert (known.pick, known.bought) == (4, 0.2)


def test_what_diverged_buys_nothing():
    verdict = shared({1: math.nan, 2: 2.2, 4: 2.007, 8: 2.0, 16: math.inf})
    assert verdict.bought == pytest.approx(0.2)
    assert verdict.pick == 4


def test_where_every_rank_gets_nearly_all_of_the_gain_the_share_is_of_the_rest():
    """SQuAD: of 3.7 nats all ranks get all but .03; 4% of that are .001, a price on the whole gain would take rank 2
    for a loss of .027."""
    curve = {2: 0.4498, 4: 0.4272, 8: 0.4233, 64: 0.4235}
    assert shared(curve, held=held_out(400, base=4.14)).pick == 8


@pytest.mark.parametrize("share", SHARES.values())
def test_what_overfits_takes_the_smallest_rank(share: float):
    """The more rank, the more of the noise in few rows is learnt: the validation loss rises from rank 1 on."""
    verdict = shared({1: 2.0, 2: 2.02, 4: 2.05, 8: 2.1, 16: 2.2}, share=share, noise=0.02)
    assert (verdict.pick, verdict.edge) == (1, "low")
    assert verdict.bought == 0.0
    assert sentence(seen(verdict, edge="low")).startswith("rank 1 has the lowest validation loss")


@pytest.mark.parametrize("share", SHARES.values())
def test_equal_ranks_give_the_smallest_whatever_the_seed(share: float):
    """Differences of rounding, or of noise well within its error: the share of next to nothing is nothing."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        for spread in (1e-15, 0.0003):
            curve = {r: 2.0 + spread * rng.normal() for r in GRID}
            verdict = shared(curve, share=share, noise=0.02, held=held_out(400, seed=seed))  # errors of .0014
            assert verdict.pick == 2
            assert not is_confident(seen(verdict, edge=verdict.edge))


def test_ranks_that_are_truly_equal_give_the_smallest_in_most_samples_and_no_confidence():
    """As truncations of one candidate: they differ by sampling alone, of as many held-out examples as a whole run
    looks at. The lowest of eleven equals is ahead of any one by an error or two, which two errors allow for."""
    one, two, sure = [], [], []
    for seed in range(200):
        rng, held = np.random.default_rng(seed), held_out(80, seed=seed)
        shared_N = 2.0 + 0.5 * rng.normal(size=80)
        equal = [
            Trial(rank=r, loss_N=(shared_N + 0.05 * rng.normal(size=80)) * held.tokens_N, source="truncated")
            for r in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48)
        ]
        judged = {rule: Objective(penalty=FREE, rule=rule, share=0.04).judge(equal, held) for rule in RULES}
        one.append(judged["one_se"].pick == 1)
        two.append(judged["two_se"].pick == 1)
        sure.append(is_confident(seen(judged["two_se"], edge=judged["two_se"].edge)))
    assert np.mean(two) >= 0.75
    assert np.mean(two) > np.mean(one) + 0.2
    assert np.mean(sure) <= 0.05


# --- penalties as the configuration has them


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank(tiny("llama", torch.float32))


def configured(**options: Any) -> RunConfig:
    return checked({"model": "m", "data": "d", **options})


def test_without_a_price_nothing_is_charged(bank: Bank):
    assert [penalty_of(configured(), bank)(r, 1.0) for r in GRID] == [0.0] * 5


def test_shares_of_the_gain_are_charged_by_doublings(bank: Bank):
    charged = penalty_of(configured(kappa=0.01), bank)
    assert [charged(r, 2.0) for r in (1, 2, 8)] == pytest.approx([0.0, 0.02, 0.06])
    assert charged(8, -1.0) == 0.0


def test_parameters_are_charged_as_a_share_of_the_base(bank: Bank):
    charged = penalty_of(configured(penalty="parameters", penalty_weight=0.5), bank)
    one = sum(layer.d_in + layer.d_out for layer in bank.layers.values())
    everything = sum(p.numel() for p in tiny("llama").parameters())
    assert [charged(r, 1.0) for r in (1, 8)] == pytest.approx([0.5 * one / everything, 4 * one / everything])
    assert charged(8, 1.0) == charged(8, 100.0), "in nats, whatever the gain"


def test_bytes_are_charged_as_the_adapter_is_written(bank: Bank):
    charged = penalty_of(configured(penalty="bytes", penalty_weight=1e-6), bank)
    one = sum(layer.d_in + layer.d_out for layer in bank.layers.values())
    assert charged(8, 1.0) == pytest.approx(8 * one * 4 * 1e-6)
    halved = Bank(tiny("llama", torch.bfloat16))
    halved_charge = penalty_of(configured(penalty="bytes", penalty_weight=1e-6), halved)
    assert halved_charge(8, 1.0) == charged(8, 1.0), "the factors are kept and written in float32"


# --- candidates that failed, and gains that are none


@pytest.mark.parametrize("lost", [math.nan, math.inf])
@both_rules
def test_a_diverged_candidate_is_never_picked_and_changes_nothing(lost: float, rule: Rule):
    """Whether one example is lost or all are; nothing is printed either (warnings are errors here)."""
    held = held_out()
    plain = judge(part(GPT2_MEDIUM, GRID), rule=rule, noise=0.001, held=held, draws=DRAWS)
    for rank in (1, 12, 64):
        one_N = trial(rank, 1.0, held).loss_N.astype(float)
        one_N[3] = lost
        for loss_N in (one_N, np.full(64, lost)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                measured = [
                    *trials(part(GPT2_MEDIUM, GRID), held, noise=0.001),
                    Trial(rank=rank, loss_N=loss_N, source="direct"),
                ]
                verdict = Objective(penalty=FREE, rule=rule).judge(measured, held, draws=DRAWS)
            assert (verdict.pick, verdict.best, verdict.gain) == (plain.pick, plain.best, plain.gain)
            assert [p for p in verdict.points if p.rank != rank] == list(plain.points)
            dead = verdict.at(rank)
            assert not dead.alive
            assert dead.objective == math.inf
            assert math.isnan(dead.se)


def test_when_all_diverged_that_is_an_error():
    held = held_out()
    dead = [Trial(rank=r, loss_N=np.full(64, x), source="direct") for r, x in ((2, math.nan), (4, math.inf))]
    with pytest.raises(RankraceError, match="every candidate diverged"):
        Objective(penalty=FREE, rule="argmin").judge(dead, held)


@both_rules
def test_ranks_that_are_behind_the_base_are_compared_as_any_others(rule: Rule):
    """Early on a training may be behind its start: a fresh head of a classifier is, at a good learning rate."""
    losses = {2: 3.3, 4: 3.2, 8: 3.1}
    verdict = judge(losses, log2_penalty(0.001), rule=rule, held=held_out(base=3.0))
    assert verdict.gain == pytest.approx(-0.1)
    ahead = judge(losses, log2_penalty(0), rule=rule, held=held_out(base=4.0))
    assert (verdict.pick, verdict.best) == (ahead.pick, ahead.best) == (8, 8)
    assert {p.penalty for p in verdict.points} == {0.0}  # a negative gain must not pay for rank
    look = seen(verdict, edge=verdict.edge)
    assert sentence(look).startswith("no rank has lowered the validation loss yet; rank 8 has the lowest")
    assert not is_confident(look)


@both_rules
def test_rows_learnt_by_heart_take_the_smallest_and_that_is_said(rule: Rule):
    losses = {2: 3.3, 4: 3.2, 8: 3.1}
    verdict = judge(losses, rule=rule, held=replace(held_out(base=3.0), epochs=1.5))
    assert (verdict.pick, verdict.best) == (2, 8)
    look = seen(verdict, edge=verdict.edge)
    assert "no rank lowered the validation loss, so the smallest, 2, was taken;" in sentence(look)
    assert not is_confident(look)
    better = replace(held_out(base=4.0), epochs=1.5)
    assert judge(losses, rule=rule, held=better).pick == 8, "something was learnt"


def test_nothing_is_sure_before_there_is_a_gain():
    losses = {1: 3.5, 2: 3.4, 4: 3.1, 8: 3.1, 16: 3.1}
    assert is_confident(seen(judge(losses, held=held_out(base=4.0))))
    assert not is_confident(seen(judge(losses, held=held_out(base=3.0))))


@pytest.mark.parametrize(
    ("curve", "edge"),
    [
        ({2: 1.0, 4: 1.1, 8: 1.2}, "low"),
        ({2: 1.2, 4: 1.0, 8: 1.1}, None),
        ({2: 1.2, 4: 1.1, 8: 1.0}, "high"),
        ({2: math.nan, 4: 1.0, 8: 1.1}, "low"),
        ({2: 1.2, 4: 1.0, 8: math.nan}, "high"),
        ({8: 1.0}, "low"),
    ],
)
def test_a_pick_at_the_edge_is_said_to_be_one(curve: dict[int, float], edge: Edge):
    assert judge(curve).edge == edge


# --- few held-out examples


@both_rules
@pytest.mark.parametrize("examples", [1, 8, 64])
def test_few_examples_give_honest_errors_and_no_crash(examples: int, rule: Rule):
    held = held_out(examples)
    verdict = judge(part(GPT2_MEDIUM, GRID), log2_penalty(0.001), rule=rule, noise=0.02, held=held)
    others = [p.se for p in verdict.points if p.rank != verdict.best]
    look = seen(verdict, edge=verdict.edge)
    if examples == 1:
        assert all(math.isnan(se) for se in others)
        assert verdict.pick == verdict.best
        assert not is_confident(look)
        assert "(error unknown)" in sentence(look)
        assert "nan" not in sentence(look)
    else:
        # √2·.02/√N, as far as so few can tell.
        assert others == pytest.approx([0.02 * math.sqrt(2 / examples)] * 4, rel=0.8)


def test_the_standard_error_shrinks_with_the_root_of_the_number_of_examples():
    se = {n: judge({2: 2.1, 4: 2.0}, noise=0.1, held=held_out(n)).at(2).se for n in (64, 6400)}
    assert se[64] / se[6400] == pytest.approx(10, rel=0.25)


# --- the choice from other held-out examples


def sampled(seed: int, documents: int = 60) -> tuple[list[Trial], Held]:
    """Documents of 1 to 4 examples, some of which want a larger rank than others."""
    rng = np.random.default_rng(seed)
    cluster_N = np.repeat(np.arange(documents), rng.integers(1, 5, documents))
    tokens_N = rng.integers(5, 60, len(cluster_N))
    hard_N, wants_N = rng.gamma(2.0, 0.5, documents)[cluster_N], rng.exponential(1.0, documents)[cluster_N]
    held = Held(tokens_N=tokens_N, cluster_N=cluster_N, base_N=9.0 * tokens_N)
    losses = {r: hard_N + 0.2 * wants_N / r + 0.002 * r * rng.normal(size=documents)[cluster_N] for r in (1, *GRID)}
    return [Trial(rank=r, loss_N=x * tokens_N, source="direct") for r, x in losses.items()], held


@both_rules
def test_a_bootstrap_sample_is_judged_as_a_validation_set_of_those_documents(rule: Rule):
    given, held = sampled(0, documents=12)
    objective = Objective(penalty=log2_penalty(0.0005), rule=rule, share=0.04)
    weight_BC = bootstrap_weights(12, DRAWS)
    picks = []
    for weight_C in weight_BC[:40]:
        # Each time a document is drawn it is another document.
        drawn = [np.flatnonzero(held.cluster_N == c) for c, times in enumerate(weight_C) for _ in range(times)]
        at_N, cluster_N = np.concatenate(drawn), np.repeat(np.arange(12), [len(d) for d in drawn])
        again = Held(tokens_N=held.tokens_N[at_N], cluster_N=cluster_N, base_N=held.base_N[at_N])
        picks.append(objective.judge([replace(t, loss_N=t.loss_N[at_N]) for t in given], again).pick)
    curve = Curve.of(given, held)
    found_B = objective.choose(curve, weight_BC, 0.0, None).pick_B
    assert [curve.ranks[i] for i in found_B[:40]] == picks
    assert len(set(picks)) > 1, "or it would not matter"
    shares = [p.bootstrap for p in objective.judge(given, held, draws=DRAWS).points]
    assert shares == [float(np.mean(found_B == i)) for i in range(len(given))]


def test_intervals_hold_the_choices_of_other_validation_sets():
    """Those of 95% would hold 83% of the picks of another set of the same size, both being chance, if picks were
    normal and any rank could be picked; whole ranks make it more."""
    objective = Objective(penalty=FREE, rule="two_se", share=0.04)
    verdicts = [objective.judge(*sampled(seed), draws=DRAWS) for seed in range(60)]
    held = []
    for v in verdicts:
        assert v.interval is not None
        low, high = v.interval
        assert low <= v.pick <= high
        held += [low <= other.pick <= high for other in verdicts if other is not v]
    assert len({v.pick for v in verdicts}) > 1, "or it would not matter"
    assert 0.8 <= np.mean(held) <= 0.999


def test_the_interval_of_what_is_certain_or_unknown():
    assert judge({1: 3.0, 2: 2.0, 4: 2.5}, noise=1e-6, draws=DRAWS).interval == (2, 2)
    assert judge({1: 3.0, 2: 2.0, 4: 2.5}, held=held_out(clusters=1), draws=DRAWS).interval is None, "one document"
    assert judge({2: 2.0}, draws=DRAWS).interval is None, "one rank"
    diverged = judge({1: 3.0, 2: 2.0, 4: math.inf}, noise=1e-6, draws=DRAWS)
    assert diverged.interval == (2, 2)
    assert diverged.at(4).bootstrap == 0


# --- what was measured on real tasks, as documentation of the defaults


def pick_of(curve: dict[int, float], kappa: float, se: float, base: float) -> int:
    """By one_se, with paired standard errors of about `se`."""
    held = held_out(400, base=base)
    return judge(curve, log2_penalty(kappa), rule="one_se", noise=se / math.sqrt(2 / 400), held=held).pick


def test_the_rule_on_gsm8k():
    """Rank matters to the end, and the rule gives up no more than the noise (paired errors .0003 to .0013)."""
    direct, truncated = GSM8K_DIRECT[1.0], GSM8K_TRUNCATED[1.0]
    assert [pick_of(direct, 0.0, se, GSM8K_BASE) for se in (0.0003, 0.0013)] == [64, 32]
    assert [pick_of(truncated, 0.0, se, GSM8K_BASE) for se in (0.0003, 0.0013)] == [64, 64]
    # κ = .001 of a gain of .8 nats asks .0008 of a doubling.
    assert [pick_of(direct, 0.001, se, GSM8K_BASE) for se in (0.0003, 0.0013)] == [32, 16]
    assert [pick_of(truncated, 0.001, se, GSM8K_BASE) for se in (0.0003, 0.0013)] == [64, 32]


def test_the_rule_on_squad():
    """Truncated from 64 at the end. Of the 3.72 nats that adapters gain, every rank gets all but .03: a price in
    shares of that gain buys the format, and takes a rank that is clearly worse."""
    curve = {2: 0.4498, 4: 0.4272, 8: 0.4233, 64: 0.4235}
    assert pick_of(curve, 0.0, 0.001, 4.14) == 8
    assert pick_of(curve, 0.001, 0.001, 4.14) == 4  # .0039 nats worse, four standard errors
    assert pick_of(curve, 0.01, 0.001, 4.14) == 2


# --- in words


def seen(verdict: Verdict, *, edge: Edge = None, capped: bool = False) -> Look:
    return Look(step=20, verdict=verdict, action=Train(), final=True, edge=edge, capped=capped, reason="so it was")


def sentence(look: Look, *, share: float = 0.2, examples: int = 64) -> str:
    text = reason(look, share=share, examples=examples)
    assert text.endswith(": so it was.")
    assert "  " not in text
    return text


def test_the_sentence_of_a_plain_best():
    verdict = judge({4: 2.1, 8: 2.0, 16: 2.05})
    assert sentence(seen(verdict)) == (
        "rank 8 has the lowest validation loss (2.0000 nats); rank 4 is 0.1000 ± 0.0000 behind; "
        "measured on 64 held-out examples after 20% of the training: so it was."
    )


def test_the_sentence_with_a_penalty():
    verdict = judge({4: 2.1, 8: 2.0, 16: 2.05}, log2_penalty(0.001))  # G = 1 nat: .002 at 4, .003 at 8
    assert sentence(seen(verdict)).startswith(
        "rank 8 has the lowest loss plus penalty (2.0030 nats); rank 4 is 0.0990 ± 0.0000 behind;"
    )


@pytest.mark.parametrize(("rule", "within"), [("one_se", "one standard error"), ("two_se", "two standard errors")])
def test_the_sentence_of_a_smaller_rank_within_the_error(rule: Rule, within: str):
    held = held_out(400)
    verdict = judge({1: 2.2, 4: 2.002, 16: 2.0}, rule=rule, noise=0.05, held=held)
    assert (verdict.pick, verdict.best) == (4, 16)
    errors = {r: f"{verdict.at(r).se:.4f}" for r in (1, 4)}
    assert sentence(seen(verdict), share=0.025, examples=400) == (
        "ranks 4 to 16 cannot be told apart on this validation set, and 4 is the smallest: "
        f"0.0020 ± {errors[4]} nats behind the best, rank 16 (within {within}); rank 1 is 0.2000 ± {errors[1]} "
        "behind; measured on 400 held-out examples after 2.5% of the training: so it was."
    )


def test_the_sentence_of_the_smallest_rank_names_no_smaller_one():
    verdict = judge({1: 2.0, 2: 2.1})
    assert sentence(seen(verdict), examples=1) == (
        "rank 1 has the lowest validation loss (2.0000 nats); "
        "measured on 1 held-out example after 20% of the training: so it was."
    )


def test_the_sentence_without_any_gain():
    verdict = judge({1: 3.1, 2: 3.2})
    assert sentence(seen(verdict)) == (
        "no rank has lowered the validation loss yet; rank 1 has the lowest validation loss (3.1000 nats); "
        "measured on 64 held-out examples after 20% of the training: so it was."
    )


def test_the_smaller_rank_that_is_named_is_clearly_smaller():
    """Rank 11 next to 12 says nothing; a diverged one neither."""
    verdict = judge({4: 2.2, 8: math.nan, 10: 2.02, 11: 2.01, 12: 2.0, 16: 2.1})
    assert "; rank 4 is 0.2000" in sentence(seen(verdict))


def test_confidence():
    """Settled, well inside the range, and a clearly smaller rank worse by two standard errors."""
    held = held_out(400)
    inside = {4: 2.02, 7: 2.0021, 8: 2.0, 16: 2.1}
    sure = judge(inside, noise=0.05, held=held)  # rank 4: .02 behind, error .0035
    assert sure.pick == 8
    assert is_confident(seen(sure))  # though 7 is within the error: next-door integers always are
    assert not is_confident(seen(sure, capped=True))
    assert not is_confident(seen(sure, edge="high"))
    assert not is_confident(seen(sure, edge="low"))
    unsure = judge(inside, noise=0.25, held=held)  # error .018
    assert unsure.pick == 8
    assert not is_confident(seen(unsure))
    # The same figures from 19 documents: their standard error is too rough.
    few = held_out(400, clusters=19)
    assert not is_confident(seen(judge(inside, noise=0.0, held=few)))
    assert is_confident(seen(judge(inside, noise=0.0, held=held_out(400, clusters=20))))
    # All smaller ones diverged: nothing to compare with.
    assert not is_confident(seen(judge({4: math.nan, 8: 2.0, 16: 2.1}, noise=0.05, held=held)))
    # Next to the upper edge.
    assert not is_confident(seen(judge({4: 2.1, 14: 2.0, 16: 2.1}, held=held)))


def test_a_choice_that_other_examples_would_make_otherwise_is_not_sure():
    """Early ranks of one training differ by next to nothing, with errors to match: 8 is behind 32 by what it may be,
    with half of the samples for 8 and half for 32, though 4 is clearly behind."""
    held = held_out(400, base=4.0)
    judged = {
        loss: judge({1: 3.0, 4: 2.5, 8: loss, 32: 2.0, 64: 2.5}, rule="two_se", noise=0.05, held=held, draws=DRAWS)
        for loss in (2.007, 2.0)
    }
    torn, sure = judged[2.007], judged[2.0]
    assert torn.pick == sure.pick == 8
    assert torn.interval == (8, 32)
    why = doubt(seen(torn))
    assert why == "other examples may lead to other ranks, 8 to 32 in 95% of bootstrap samples"
    assert sure.interval == (8, 8)
    assert is_confident(seen(sure))
    handful = judge({1: 3.0, 4: 2.5, 8: 2.0, 64: 2.5}, noise=0.05, held=held_out(400, clusters=19), draws=DRAWS)
    assert handful.interval is None, "samples of so few documents are too much alike"


def test_confidence_holds_the_pick_against_its_neighbour_not_the_neighbour_against_the_best():
    """Rank 4 is more than two errors behind the best, 16: that is how the rule came to 8, which is itself 1.5 errors
    behind. Between 4 and 8 there is nothing to be told, so another seed may as well choose 4."""
    held = held_out(400, base=4.0)
    one = float(np.sqrt(2 / 400) * 0.1)  # about one paired error
    curve = {1: 3.0, 4: 2.0 + 2.6 * one, 8: 2.0 + 1.5 * one, 16: 2.0, 64: 2.0}
    verdict = judge(curve, rule="two_se", noise=0.1, held=held)
    assert (verdict.pick, verdict.best) == (8, 16)
    assert verdict.at(4).objective - verdict.at(16).objective > 2 * verdict.at(4).se
    assert verdict.smaller is not None
    assert (verdict.smaller.rank, verdict.smaller.behind) == (4, pytest.approx(1.1 * one))
    assert 0 < verdict.smaller.behind < 2 * verdict.smaller.se
    why = doubt(seen(verdict))
    assert why is not None
    assert "nats behind it, which the paired errors do not tell from nothing" in why
    assert is_confident(seen(judge(curve | {4: 2.0 + 9 * one}, rule="two_se", noise=0.1, held=held)))
