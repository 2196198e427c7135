"""The statistics behind docs/selection.md, on figures made by hand, and the records of all ages read as one.

Shapes: K arms, N fresh examples.
"""

import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import selection_figures, selection_runs
from benchmarks import selection_records as records
from benchmarks import selection_tables as tables
from benchmarks.selection_records import Adaptive, Arm, Curve, Ends, Fresh, Look, Sweep, Way
from benchmarks.selection_statistics import (
    Chance,
    Difference,
    End,
    alike,
    best_arm,
    best_arms,
    chances,
    clearly_better,
    correlation,
    default_pick,
    ends_of,
    lowest,
    over_runs,
    regret,
    tally,
)
from benchmarks.study import command_of
from rankrace.select.objective import Held, Objective, Trial, log2_penalty

FRESH = Fresh(tokens_N=np.full(4, 2), cluster_N=np.arange(4))


def curve(losses: list[float], se: float = 0.0) -> Curve:
    K = len(losses)
    return Curve(loss_K=np.array(losses), se_KK=se * (1 - np.eye(K)))


def end(loss_N: list[float], way: Way = "alone", rank: int = 16, setting: tuple[object, ...] = ()) -> End:
    return End(unit=("sst2", 0), way=way, setting=setting, rank=rank, loss_N=np.array(loss_N), fresh=FRESH)


def test_the_smallest_rank_within_the_share_or_the_error_is_picked():
    # Rank buys 0.10; the third is 0.03 behind, 30% of that.
    falling = [1.00, 0.95, 0.93, 0.90]
    assert default_pick(curve(falling), 0.04) == 3
    assert default_pick(curve(falling), 0.31) == 2
    assert default_pick(curve(falling, se=0.03), 0.04) == 1
    assert default_pick(curve([math.nan, 0.95, math.nan, 0.90]), 0.04) == 3
    assert default_pick(curve([math.nan, math.nan]), 0.04) is None


def test_the_pick_is_that_of_the_default_objective():
    rng = np.random.default_rng(0)
    objective = Objective(penalty=log2_penalty(0.0), rule="two_se", share=0.04)
    picked = set()
    for _ in range(200):
        tokens_N, cluster_N = rng.integers(1, 9, 30), rng.integers(0, 20, 30)
        shared_N = rng.gamma(2.0, size=30)
        loss_KN = shared_N + 0.3 * np.exp(-np.arange(5.0))[:, None] + 0.4 * rng.normal(size=(5, 30))
        held = Held(tokens_N=tokens_N, cluster_N=cluster_N, base_N=np.full(30, 100.0))
        verdict = objective.judge([Trial(rank=2**k, loss_N=x, source="direct") for k, x in enumerate(loss_KN)], held)
        se_KK = np.zeros((5, 5))
        best = [p.rank for p in verdict.points].index(verdict.best)
        se_KK[best] = se_KK[:, best] = [p.se for p in verdict.points]
        found = default_pick(Curve(loss_K=loss_KN.sum(1) / tokens_N.sum(), se_KK=se_KK), 0.04)
        assert found is not None
        assert 2**found == verdict.pick
        picked.add(found)
    assert len(picked) == 5


def test_order_and_regret():
    end_K = np.array([0.5, 0.3, math.nan, 0.4])
    assert regret(3, end_K) == pytest.approx(0.1)
    assert math.isnan(regret(None, end_K))
    assert lowest(end_K) == 1
    assert lowest(np.full(2, math.nan)) is None
    assert correlation(np.array([9.0, 1.0, 5.0, 2.0]), end_K) == pytest.approx(1.0)
    assert correlation(np.array([1.0, 9.0, 5.0, 2.0]), end_K) == pytest.approx(-1.0)
    assert math.isnan(correlation(np.array([1.0, 9.0]), np.array([1.0, 2.0])))


def sweep(looked: list[float], end_K: list[float]) -> Sweep:
    """Ranks 1 and 16 at half and the whole learning rate."""
    return Sweep(
        unit=("sst2", 0),
        data="d",
        warmup=0.03,
        ranks=(1, 16, 1, 16),
        rates=(0.5, 0.5, 1.0, 1.0),
        looks=(Look(share=1.0, direct=curve(looked), averaged=None, truncated={}),),
        loss_K=np.array(end_K),
        loss_KN=np.array(end_K)[:, None] * FRESH.tokens_N,
        fresh=FRESH,
        passes=1.0,
    )


def test_learning_rates_are_chosen_on_other_examples_than_they_are_judged_on():
    s = sweep([0.4, 0.3, 0.2, math.nan], [0.1, 0.5, 0.6, 0.0])
    assert best_arms(s) == {1: 2, 16: 1}
    assert best_arm(s) == 2
    assert s.at(0.5) == [0, 1]


def test_a_rate_is_named_as_a_run_would_take_it():
    """At ×1, ×2 and ×4: another only if it is better by two errors, a raised one by 5% where rows come back often."""
    scales, ahead = (1.0, 2.0, 4.0), curve([1.00, 0.97, 0.98], se=0.01)
    assert clearly_better(ahead, 0, scales, 1.0) == 1
    assert clearly_better(ahead, 0, scales, 3.0) == 0
    assert clearly_better(curve([1.00, 0.94, 0.98], se=0.01), 0, scales, 3.0) == 1
    assert clearly_better(curve([1.00, 0.97, 0.98], se=0.02), 0, scales, 1.0) == 0
    assert clearly_better(curve([1.00, 1.01, 0.97], se=0.01), 2, scales, 3.0) == 2
    assert clearly_better(curve([0.90, 1.01, 0.97], se=0.01), 2, (0.5, 1.0, 2.0), 3.0) == 0, "a lower one is no risk"
    assert clearly_better(curve([math.nan, 1.01, 0.97], se=0.01), 0, scales, 3.0) == 2
    assert clearly_better(curve([math.nan] * 3), 0, scales, 1.0) is None


def test_what_counts_as_the_same_training():
    a, b = end([1.0, 2, 3, 4]), end([1.0, 2, 3, 5])
    assert alike(a, b)
    assert not alike(a, a), "a computation repeated to the last bit shows nothing"
    assert not alike(a, end([1.0, 2, 3, math.nan]))
    assert not alike(a, end([1.0, 2, 3, 5], rank=12)), "ranks that trained as such differ by more than chance"
    assert not alike(a, end([1.0, 2, 3, 5], setting=(2.0,)))
    assert not alike(a, end([1.0, 2, 3, 5], way="cut"))
    assert alike(end([1.0, 2, 3, 4], "cut", 3), end([1.0, 2, 3, 5], "cut", 4))
    assert not alike(end([1.0, 2, 3, 4], "cut", 2), end([1.0, 2, 3, 5], "cut", 3))
    assert not alike(end([1.0, 2, 3, 4], "own"), end([1.0, 2, 3, 5], "own"))


def test_chance_is_what_sampling_does_not_explain():
    """Three runs 0, 3 and 4 nats apart at every example alike: no sampling error."""
    ends = [end([2.0 * level] * 4) for level in (0.0, 3.0, 4.0)]
    found = chances(ends)["sst2"]
    assert found.pairs == 3
    assert found.rms == pytest.approx(math.sqrt((9 + 16 + 1) / 3))
    assert found.se == pytest.approx(0)
    assert found.run == pytest.approx(found.rms)
    assert Chance(pairs=1, rms=5.0, se=4.0).run == pytest.approx(3.0)
    assert Chance(pairs=1, rms=4.0, se=5.0).run == 0


def test_chance_is_found_in_made_up_trainings():
    """Pairs of runs that differ by 0.02 in truth and by sampling on 400 examples. Tolerance: 4·σ/√(2·pairs)."""
    rng = np.random.default_rng(1)
    fresh = Fresh(tokens_N=np.full(400, 2), cluster_N=np.arange(400))
    ends = []
    for seed in range(300):
        for _ in range(2):
            loss_N = 2 * (0.02 / math.sqrt(2) * rng.normal() + 0.2 * rng.normal(size=400))
            ends.append(End(unit=("t", seed), way="alone", setting=(), rank=1, loss_N=loss_N, fresh=fresh))
    found = chances(ends)["t"]
    assert found.pairs == 300
    assert found.se == pytest.approx(0.2 * math.sqrt(2 / 400), rel=0.05)
    assert found.run == pytest.approx(0.02, abs=0.0041)


def test_a_tally_with_and_without_chance():
    found = [Difference(d=d, se=3.0, run=4.0) for d in (-6.0, -4.0, 0.0, 4.0, 6.0)]
    assert [x.error for x in found] == [5.0] * 5
    alone, both = tally(found, chance=False), tally(found, chance=True)
    assert (alone.all, alone.within, alone.won, alone.lost) == (5, 3, 2, 2)
    assert (both.all, both.within, both.won, both.lost) == (5, 4, 1, 1)


def an_arm(way: Way, rank: int, loss_N: list[float], candidate_steps: float = 1.0) -> Arm:
    return Arm(
        rank=rank,
        scale=1.0,
        way=way,
        step=4,
        candidate_steps=candidate_steps,
        measured=9,
        looked=8,
        loss_N=np.array(loss_N),
    )


def whole_run(task: str = "sst2", **arms: Arm) -> Adaptive:
    return Adaptive(unit=(task, 0), data="d", warmup=0.03, examples=400, quantize="none", arms=arms, fresh=FRESH)


CUT = an_arm("cut", 2, [1.0, 2, 3, 4], candidate_steps=1.3)


def test_the_cost_counts_measurements_as_half_a_step():
    """Nine arms and the base on 8 examples: 80 examples forward, of the 400 that a training takes both ways."""
    assert selection_runs.cost(whole_run(shrink=CUT), "shrink") == pytest.approx(1.3 + 0.1)


def test_the_error_of_a_mean_over_units_takes_a_task_for_one():
    mean, error = over_runs([1.0, 2.0, 3.0, 6.0], ["a", "b", "c", "d"])
    assert mean == 3
    assert error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2), "s/√n"
    # Two tasks whose seeds agree are two values, not four.
    assert over_runs([1.0, 1.0, 3.0, 3.0], ["a", "a", "b", "b"]) == pytest.approx((2.0, math.sqrt(2) / math.sqrt(2)))
    assert math.isnan(over_runs([1.0, 2.0], ["a", "a"])[1])


def ending(last: float, average: float, averaged: bool) -> Ends:
    """Nats of each of the four examples; two tokens each."""
    return Ends(last_N=np.full(4, last), average_N=np.full(4, average), averaged=averaged)


def test_each_end_is_held_against_its_like(capsys: pytest.CaptureFixture[str]):
    """One run whose rows came back, one whose did not: an average is only in the first."""
    ours, theirs = ending(1.0, 0.6, averaged=True), ending(2.0, 0.4, averaged=False)
    back = whole_run(
        fixed=replace(an_arm("alone", 16, [2.0] * 4), ends=theirs),
        shrink=replace(an_arm("cut", 2, [0.6] * 4), ends=ours),
    )
    once = whole_run("rte", fixed=an_arm("alone", 16, [1.0] * 4), shrink=an_arm("cut", 2, [3.0] * 4))
    selection_runs.by_end([back, once])
    # Last: −0.5 and +1; average: +0.1; as they were chosen: 0.6 against 2, and +1.
    row = "| shrink | +0.2500 ± 0.7500, 1 / 2 | +0.1000 ± nan, 0 / 1 | +0.1500 ± 0.8500, 1 / 2 |"
    assert row in capsys.readouterr().out


def test_strategies_are_held_against_the_default(capsys: pytest.CaptureFixture[str]):
    one = whole_run(fixed=an_arm("alone", 16, [9.0] * 4), shrink=CUT, race=an_arm("own", 2, [1.0, 2, 1, 2]))
    other = whole_run("rte", shrink=CUT, race=an_arm("own", 2, [3.0, 4, 5, 6]))
    without = whole_run(shrink=CUT)
    selection_runs.among_themselves([one, other, without])
    # −4 and +8 nats over 8 tokens.
    assert "| race | 2 | +0.2500 ± 0.7500 | +0.2500 | 1 : 1 |" in capsys.readouterr().out


def test_fewer_bits_are_held_against_the_same_unit_in_16(capsys: pytest.CaptureFixture[str]):
    bits = replace(whole_run(shrink=an_arm("cut", 3, [2.0, 3, 4, 5])), quantize="fp8")
    elsewhere = replace(bits, data="other rows")
    selection_runs.in_fewer_bits([bits, elsewhere], [whole_run(shrink=CUT)])
    printed = capsys.readouterr().out
    assert printed.count("sst2, seed 0") == 1
    assert "| sst2, seed 0 | fp8 | shrink | 3, 2 | +0.5000 ± 0.0000 | +0.5000 ± 0.0000 |" in printed


def test_ways_of_cutting_are_held_against_the_plain_cut(capsys: pytest.CaptureFixture[str]):
    ends = [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]
    record = {**COMMON, "lr_scale": 1.0, "arms": ["kept", "cut-4", "warm-4"], "fresh": {"per_example": ends}}
    tables.after_cut([record])
    kept, plain = capsys.readouterr().out.split("that of the plain cut")
    assert "| warm-4 | +1.5000 ± 0.0000 |" in kept
    assert "| warm-4 | +1.0000 ± 0.0000 |" in plain
    assert "cut-4 |" not in plain


def test_runs_of_the_sweep_and_whole_runs_are_paired():
    run = whole_run(shrink=CUT, fixed=an_arm("alone", 16, [1.0, 2, 1, 2]))
    s = sweep([0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.6, 0.7])
    found = chances(ends_of([s], [run]))
    assert list(found) == ["sst2"]
    assert found["sst2"].pairs == 1
    # 6 nats over 8 tokens against 0.7 a token.
    assert found["sst2"].rms == pytest.approx(6 / 8 - 0.7)


# --- records


def described(losses: list[float]) -> dict[str, Any]:
    return {"loss": losses, "se": [[0.1 * i] * i for i in range(len(losses))], "accuracy": losses}


COMMON = {"task": "sst2", "seed": 0, "data_sha256": "d", "fresh_tokens": [2, 2], "fresh_cluster": [0, 1]}
OLD = {
    **COMMON,
    "lr_scale": 1.0,
    "ranks": [1, 16, 64],
    "looks": [{"share": 0.1, "direct": described([3.0, 2.0, 1.0]), "truncated": described([3.5, 2.5])}],
    "fresh": {"loss": [0.3, 0.2, 0.1], "per_example": [[0.6, 0.6], [0.4, 0.4], [0.2, 0.2]]},
}
OLDEST = {**OLD, "task": "SST-2", "fresh": {"loss": [0.5, 0.4, 0.3]}}
RATED = {
    **COMMON,
    "task": "gsm8k",
    "warmup": 0.1,
    "ranks": [1, 1, 64, 64],
    "rates": [1.0, 2.0, 1.0, 2.0],
    "looks": [
        {
            "share": 0.1,
            "direct": described([1.0, 2, 3, 4]),
            "quarter": described([0.0] * 4),
            "half": described([9.0] * 4),
        }
    ],
    "fresh": {"loss": [0.4, 0.3, 0.2, 0.1], "per_example": [[1, 1]] * 4},
}
NEW = {
    **COMMON,
    "seed": 1,
    "warmup": 0.03,
    "ranks": [1, 16, 64, 1, 16, 64],
    "rates": [1.0, 1.0, 1.0, 2.0, 2.0, 2.0],
    "looks": [
        {
            "share": share,
            "direct": described([3.0, 2, 1, 4, 5, 6]),
            "averaged": described([1.0, 2, 3, 6, 5, 4]),
            "truncated-0": described([7.0, 6.0]),
            "truncated-1": described([9.0, 8.0]),
        }
        for share in (0.1, 1.0)
    ],
    "fresh": {"loss": [0.3, 0.2, 0.1, 0.6, 0.5, 0.4], "per_example": [[k / 5, k / 5] for k in range(6)]},
}


def adaptive_record() -> dict[str, Any]:
    def arm(rank: int, source: str, lr: float, fraction: float, **more: Any) -> dict[str, Any]:
        return {
            "rank": rank,
            "lr": lr,
            "curve": [[1, 0.3, 0.1, "truncated"], [rank, 0.2, 0.0, source]],
            "decision": {"step": 40, "fraction": fraction},
            "candidate_steps": 1.0,
            "looked": 8,
            "fresh": {"per_example": [[0.1 * rank, 0.2]]},
            **more,
        }

    arms = {
        "fixed": arm(16, "direct", 1e-3, 0.15),
        "shrink": arm(2, "truncated", 1e-3, 0.2, measured=30, rule="two_se"),
        "shrink-lr": arm(3, "truncated", 2e-3, 0.2),
        "race": arm(2, "direct", 1e-3, 0.12),
        "grid": arm(5, "truncated", 1e-3, 0.15),
    }
    return {**COMMON, "seed": 1, "warmup": 0.03, "lr": 1e-3, "steps": 200, "batch_size": 32, "arms": arms}


def test_records_of_all_ages_are_read_as_one():
    old, oldest, rated, new = map(records.sweep_of, (OLD, OLDEST, RATED, NEW))
    assert old.unit == oldest.unit == ("sst2", 0)
    assert old.rates == (1.0, 1.0, 1.0)
    assert oldest.loss_KN is None
    assert old.warmup == 0.03
    assert old.looks[0].averaged is None
    assert list(old.looks[0].truncated[1.0].loss_K) == [3.5, 2.5]
    assert old.looks[0].direct.se_KK[2, 0] == old.looks[0].direct.se_KK[0, 2] == pytest.approx(0.2)
    assert rated.looks[0].averaged is not None
    assert list(rated.looks[0].averaged.loss_K) == [9.0] * 4
    assert rated.looks[0].truncated == {}
    assert list(new.looks[0].truncated[2.0].loss_K) == [9.0, 8.0]
    assert new.at(2.0) == [3, 4, 5]


def test_arms_of_two_folders_are_put_together(tmp_path: Path):
    """Those of the first count; other rows are another unit's, and another base is a run of its own."""
    first, second = adaptive_record(), adaptive_record()
    del first["arms"]["grid"]
    second["arms"]["fixed"]["candidate_steps"] = 9.0
    for folder, record in (("a", first), ("b", second)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text(json.dumps(record))
    (run,) = records.adaptives(tmp_path, ("a", "b"))
    assert list(run.arms) == ["fixed", "shrink", "shrink-lr-one", "race-one", "grid-one"]
    assert run.arms["fixed"].candidate_steps == 1
    (tmp_path / "b" / "x.json").write_text(json.dumps(second | {"data_sha256": "other"}))
    with pytest.raises(ValueError, match="differ in rows"):
        records.adaptives(tmp_path, ("a", "b"))
    for base in ("fp8", "nf4"):
        (tmp_path / "b" / f"{base}.json").write_text(json.dumps(second | {"quantize": base}))
    (tmp_path / "b" / "x.json").unlink()
    assert [(r.quantize, len(r.arms)) for r in records.adaptives(tmp_path, ("a", "b"))] == [
        ("fp8", 5), ("nf4", 5), ("none", 4),
    ]  # fmt: skip


def test_how_an_adaptive_run_came_to_its_rank():
    run = records.adaptive_of(adaptive_record())
    assert {name: arm.way for name, arm in run.arms.items()} == {
        "fixed": "alone",
        "shrink": "cut",
        "shrink-lr-one": "cut",
        "race-one": "own",
        "grid-one": "own",
    }
    assert {name: arm.measured for name, arm in run.arms.items()} == {
        "fixed": 2,
        "shrink": 30,
        "shrink-lr-one": 5,
        "race-one": 8,
        "grid-one": 2,
    }
    assert run.arms["shrink-lr-one"].scale == 2
    assert run.examples == 6400


def test_newer_records_of_a_unit_take_the_place_of_older_ones(tmp_path: Path):
    write(tmp_path / "first" / "sst2-seed0-lr1-healed.json", OLD)
    write(tmp_path / "first" / "SST-2-seed0-lr1.json", OLDEST)
    write(tmp_path / "sweep" / "sst2-seed1.json", NEW)
    (first,) = records.first_ranks(tmp_path)
    assert first.loss_KN is not None
    assert [s.unit[1] for s in records.newest(records.sweeps(tmp_path), [first])] == [0, 1]
    assert records.newest([first], [records.sweep_of(OLDEST)]) == [first]


def test_every_table_is_printed_from_whatever_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "sweep" / "sst2-seed1.json", NEW)
    write(tmp_path / "adaptive" / "sst2-seed1.json", adaptive_record())
    tables.main(tmp_path)
    printed = capsys.readouterr().out
    # Rank 1 at ×1: 0 nats over 4 tokens less 0.4.
    assert "| sst2, seed 1 | -0.1000 ± 0.0000 (×1) | 0.2000 (×1) |" in printed
    assert "### Whole runs less the sweep's best arm" in printed
    assert "### After a cut" not in printed


def test_the_figures_say_what_they_show(tmp_path: Path):
    write(tmp_path / "sweep" / "sst2-seed1.json", NEW)
    write(tmp_path / "sweep" / "gsm8k-seed1.json", {**NEW, "task": "gsm8k"})
    write(tmp_path / "adaptive" / "sst2-seed1.json", adaptive_record())
    selection_figures.main(["adaptive"], tmp_path)
    early = (tmp_path / "early.svg").read_text()
    # Ranks 1, 16 and 64 have 3, 2 and 1 at each look, 0.3, 0.2 and 0.1 at the end.
    assert "GSM8K, trained side by side: +1.00, +1.00" in early
    whole = (tmp_path / "whole.svg").read_text()
    assert "shrink less fixed r = 16 in 1 whole runs" in whole
    assert "sst2 1, rank 2" in whole


def write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record), encoding="utf-8")


def test_a_record_names_every_option_that_says_what_is_run():
    options = Namespace(
        model="m", data=Path("d"), units="rte:0,rte:1", warmup=0.03, steps=200, quantize="none", arms="race,grid",
        only_choice=True, no_compile=False, stop_after=9.0, out=Path("o"), device="cuda", micro_tokens=20480,
    )  # fmt: skip
    assert command_of(options, "benchmarks.adaptive", "rte:1") == (
        "python -m benchmarks.adaptive --units rte:1 --warmup 0.03 --steps 200 --quantize none --arms race,grid "
        "--only-choice --micro-tokens 20480"
    )
