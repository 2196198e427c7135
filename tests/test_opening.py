"""Learning rates side by side before the search, and a twin: what is decided, and that the rest of the run is that of
the rate that was kept.

Shapes: N held-out examples.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import pytest
import torch
from pydantic import TypeAdapter

from commandline import Ran, rankrace
from curves import Curves, held_out
from models import tiny
from rankrace.bank import Bank
from rankrace.bank.dropout import counter_seed
from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.report.text import doubts
from rankrace.result import Decision, Result
from rankrace.select.build import make_strategy
from rankrace.select.grid import Grid
from rankrace.select.learning_rate import scale_at
from rankrace.select.objective import Objective, Trial, log2_penalty
from rankrace.select.opening import Opening
from rankrace.select.race import Race
from rankrace.select.reason import doubt, is_confident
from rankrace.select.search import SearchState
from rankrace.select.shrink import Shrink
from rankrace.select.strategy import Keep, Look, Start, Strategy
from tinyfolder import SUMS, tiny_llama, write_rows

WIDE = 16
SCALES = (0.5, 1.0, 2.0)
OBJECTIVE = Objective(penalty=log2_penalty(0.0), rule="one_se")


def shrink() -> Shrink:
    return Shrink(total_steps=100, wide=WIDE, largest=8, refine=True, objective=OBJECTIVE)


def race() -> Race:
    return Race(total_steps=100, wide=WIDE, ranks=(2, 4, 8), refine=False, objective=OBJECTIVE)


def opening(
    inner: Strategy | None = None, *, scales: tuple[float, ...] = SCALES, twin: bool = False, at: int = 10
) -> Opening:
    inner = inner or shrink()
    return Opening(inner=inner, scales=scales, twin=twin, look_step=at, total_steps=100, objective=OBJECTIVE)


class Rates(Curves):
    """Candidates of one rank, of these mean losses; each scatters around its own by itself."""

    def __init__(self, *losses: float, noise: float = 0.01, clusters: int | None = None, epochs: float = 0.1) -> None:
        held = replace(held_out(400, clusters=clusters), epochs=epochs)
        super().__init__(held=held, ranks=(WIDE,) * len(losses), truncation=lambda rank: 2.0, noise=noise)
        self.losses = losses

    def direct(self) -> list[Trial]:
        raise AssertionError("values of the moment put the smaller rate first")

    def averaged(self) -> list[Trial]:
        made, n_N = [], self.held.tokens_N
        for k, loss in enumerate(self.losses):
            z_N = np.random.default_rng(k).normal(size=len(n_N))
            z_N -= (z_N * n_N).sum() / n_N.sum()
            made.append(Trial(rank=WIDE, loss_N=(loss + self.noise * z_N) * n_N, source="direct"))
        return made


ERROR = 0.01 * math.sqrt(2 / 400)
"""Of a paired difference of `Rates`, about."""


def kept(*losses: float, scales: tuple[float, ...] = SCALES, twin: bool = False, **options: Any) -> Look:
    return opening(scales=scales, twin=twin).look(10, [], Rates(*losses, **options))


# --- what starts, and when


def test_rates_differ_in_nothing_else_and_a_twin_in_its_draw():
    assert opening().start() == tuple(Start(rank=WIDE, lr_scale=scale) for scale in SCALES)
    assert opening(twin=True).start()[-1] == Start(rank=WIDE, lr_scale=1.0, draw=1)
    assert opening(scales=(1.0,), twin=True).start() == (Start(rank=WIDE), Start(rank=WIDE, draw=1))
    assert opening().averages
    assert (opening().name, opening(race()).name) == ("shrink", "race")


def test_the_strategy_then_looks_as_it_would_have():
    begun = opening(at=10)
    assert begun.next_look([]) == 10
    look = begun.look(10, [], Rates(2.1, 2.0, 2.2))
    assert not look.final
    assert begun.next_look([look]) == 10, "its own first look, at the same step"
    assert opening(at=7).next_look([]) == 7
    assert opening(at=7).next_look([replace(look, step=7)]) == 10
    with pytest.raises(AssertionError):
        opening(at=12)


@pytest.mark.parametrize("inner", [shrink(), race()])
def test_the_rate_and_the_chance_stay_on_later_looks(inner: Strategy):
    begun = opening(inner, twin=True)
    rates = Rates(2.2, 2.1, 2.0, 2.13)
    looks = [begun.look(10, [], rates)]
    measured = Curves(
        held=held_out(400), ranks=(WIDE,), truncation=lambda rank: 2.0 + 0.1 / rank, noise=0.001,
        own={r: 2.0 + 0.1 / r for r in range(1, WIDE + 1)},
    )  # fmt: skip
    alone: list[Look] = []
    while (step := begun.next_look(looks)) is not None:
        assert step == inner.next_look(alone)
        looks.append(begun.look(step, looks, measured))
        alone.append(inner.look(step, alone, measured))
        measured.ranks = looks[-1].action.ranks if looks[-1].action.kind == "cut" else measured.ranks
    assert {look.lr_scale for look in looks} == {2.0}
    assert {look.chance for look in looks} == {looks[0].chance}
    assert [look.rates != () for look in looks] == [True] + [False] * (len(looks) - 1)
    assert [replace(look, lr_scale=1.0, chance=None) for look in looks[1:]] == alone


def built(total: int, **options: Any) -> Strategy:
    config = RunConfig(model="m", data="d", ranks=(2, 4, 8), **options)
    return make_strategy(config, total, Bank(tiny("llama")), (0.10, 0.15, 0.20, 0.25, 0.30), log2_penalty(0.0))


@pytest.mark.parametrize("strategy", ["shrink", "race", "grid"])
def test_what_is_preferred_is_the_share_and_the_rule(
    strategy: Literal["shrink", "race", "grid"],
) -> None:
    bank, fractions = Bank(tiny("llama")), (0.10, 0.20, 0.30)
    found = {}
    for prefer in ("quality", "balanced", "small"):
        config = RunConfig(model="m", data="d", strategy=strategy, prefer=prefer, ranks=(2, 4, 8))
        made = make_strategy(config, 100, bank, fractions, log2_penalty(0.0))
        assert isinstance(made, Shrink | Race | Grid)
        found[prefer] = made.objective.share, made.objective.rule
        told = make_strategy(config.model_copy(update={"rule": "argmin"}), 100, bank, fractions, log2_penalty(0.0))
        assert isinstance(told, Shrink | Race | Grid)
        assert told.objective.rule == "argmin", "what is said counts"
    assert found == {"quality": (0.01, "one_se"), "balanced": (0.04, "two_se"), "small": (0.08, "two_se")}


def test_what_begins_with_one_candidate_is_opened_where_that_is_asked_for():
    assert isinstance(built(100), Shrink)
    assert isinstance(built(100, strategy="race"), Race)
    assert isinstance(built(100, lr_scales=(1.0,)), Shrink)
    for options in (
        {"lr_scales": (2.0, 0.5, 2.0)},
        {"twin": True},
        {"strategy": "race", "lr_scales": (0.5, 1.0, 2.0)},
    ):
        found = built(100, **options)
        assert isinstance(found, Opening)
        assert found.scales == ((1.0,) if "twin" in options else SCALES), "with the given one, each once"
        assert found.twin == ("twin" in options)
        assert found.look_step == 10, "a twentieth is too early to tell"
        assert found.inner.next_look([]) == 10
    for total in range(1, 30):
        for strategy in ("shrink", "race"):
            found = built(total, strategy=strategy, twin=True)
            assert isinstance(found, Opening)
            first, inner = found.next_look([]), found.inner.next_look([])
            assert first is not None
            assert inner is not None
            assert 1 <= first <= inner <= total


# --- which rate


@pytest.mark.parametrize("best", range(3))
def test_the_rate_of_lowest_loss_is_kept(best: int):
    losses = [2.1] * 3
    losses[best] = 2.0
    look = kept(*losses)
    assert look.action == Keep(indices=(best,))
    assert look.lr_scale == SCALES[best]
    assert [rated.lr_scale for rated in look.rates] == list(SCALES)
    assert [rated.loss for rated in look.rates] == pytest.approx(losses)
    assert [rated.se for rated in look.rates] == pytest.approx(
        [0.0 if i == best else ERROR for i in range(3)], rel=0.2
    )
    assert look.verdict.points[0].loss == pytest.approx(2.0)


@pytest.mark.parametrize("best", [0, 2])
def test_the_given_rate_is_kept_unless_another_is_clearly_better(best: int):
    losses = [2.1] * 3
    losses[best] = 2.0
    assert kept(*losses[:1], 2.0 + 1.4 * ERROR, *losses[2:]).lr_scale == 1.0
    assert kept(*losses[:1], 2.0 + 2.8 * ERROR, *losses[2:]).lr_scale == SCALES[best]
    assert kept(*losses[:1], 2.1, *losses[2:], clusters=1).lr_scale == 1.0, "an error that is unknown"


@pytest.mark.parametrize(
    ("losses", "passes", "taken"),
    [
        ((2.2, 2.03, 2.0), 1.9, 2.0),
        ((2.2, 2.03, 2.0), 2.1, 1.0),
        ((2.2, 2.03, math.nan), 2.1, 1.0),
        ((2.2, 2.03, 2.0), 2.0, 2.0),
        ((2.4, 2.12, 2.0), 2.1, 2.0),
        ((0.4, 0.35, 0.05), 2.1, 2.0),
        ((2.2, math.nan, 2.0), 2.1, 2.0),
        ((2.0, 2.03, 2.2), 2.1, 0.5),
    ],
)
def test_where_rows_come_back_a_raised_rate_has_to_be_much_better(
    losses: tuple[float, ...], passes: float, taken: float
) -> None:
    """By 5% of the loss; in the first passes over the rows little can be remembered yet."""
    look = kept(*losses, epochs=passes / 10)
    assert look.lr_scale == taken
    assert ("2 times --lr" in look.note) == (losses[1] == 2.03 and losses[2] == 2.0 and taken == 1.0)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_rates_that_diverged_are_passed_over(lost: float):
    assert kept(2.1, 2.0, lost).lr_scale == 1.0
    assert kept(2.1, lost, lost).lr_scale == 0.5
    look = kept(lost, 2.1, 2.0, lost, twin=True)
    assert look.lr_scale == 2.0
    assert math.isnan(look.rates[0].se)
    state = SearchState(looks=[look])
    adapter = TypeAdapter(SearchState)
    back = adapter.validate_python(json.loads(json.dumps(adapter.dump_python(state, mode="json"))))
    assert repr(back.looks[0]) == repr(look)


def test_when_all_diverged_that_is_an_error():
    with pytest.raises(RankraceError, match="every learning rate that was tried diverged") as caught:
        kept(math.nan, math.inf, math.nan)
    assert "--lr-scales" in str(caught.value)


# --- a twin


def test_a_twin_says_what_chance_makes_and_is_never_kept():
    look = kept(2.2, 2.1, 2.15, 2.0, twin=True)
    assert look.lr_scale == 1.0
    assert look.action == Keep(indices=(1,))
    assert look.chance == pytest.approx(0.1)
    assert len(look.rates) == 3
    alone = kept(2.0, 2.03, scales=(1.0,), twin=True)
    assert (alone.chance, alone.lr_scale, len(alone.rates)) == (pytest.approx(0.03), 1.0, 1)


def test_nothing_is_sure_that_chance_could_have_made():
    """Rank 4 is .1 behind rank 8."""
    measured = Curves(held=held_out(400), ranks=(WIDE,), truncation=lambda rank: 2.0, noise=0.001)
    measured.own = {r: {4: 2.1, 8: 2.0}.get(r, 2.2) for r in range(1, WIDE + 1)}
    measured.ranks = (4, 8, WIDE)
    look = Look(step=20, verdict=OBJECTIVE.judge(measured.direct(), measured.held), action=Keep(indices=(1,)))
    assert is_confident(look)
    assert is_confident(replace(look, chance=0.049))
    assert not is_confident(replace(look, chance=0.051))
    assert not is_confident(replace(look, chance=math.nan)), "the twin diverged"


# --- what is said of it


def decision(**changed: Any) -> Decision:
    plain: dict[str, Any] = {"step": 20, "fraction": 0.2, "edge": None, "capped": False, "confident": True}
    return Decision(**{**plain, **changed})


def test_the_edge_of_the_rates_is_said():
    assert doubts(8, decision(lr_scale=2.0), 64) == []
    (high,) = doubts(8, decision(lr_scale=2.0, lr_edge="high"), 64)
    assert high.startswith("Learning rate: the largest that was tried was the best, 2 times --lr. A larger one")
    (low,) = doubts(8, decision(lr_scale=0.5, lr_edge="low"), 64)
    assert low.startswith("Learning rate: the smallest that was tried was the best, 0.5 times --lr. A smaller one")
    assert "--lr-scales" in low


def test_what_chance_makes_is_said_where_nothing_is_sure():
    measured = Curves(held=held_out(400), ranks=(WIDE,), truncation=lambda rank: 2.0, noise=0.001)
    measured.own = {r: {4: 2.1, 8: 2.0}.get(r, 2.2) for r in range(1, WIDE + 1)}
    measured.ranks = (4, 8, WIDE)
    verdict = OBJECTIVE.judge(measured.direct(), measured.held)
    why = doubt(Look(step=20, verdict=verdict, action=Keep(indices=(1,)), chance=0.0623))
    assert why is not None
    assert why.startswith("rank 4 is 0.1000 ± ")
    assert why.endswith(" nats behind it, and two equal trainings differ by 0.0623")
    (unsure,) = doubts(8, decision(confident=False, doubt=why), 64)
    assert unsure == f"Not confident: {why}. Another seed may choose another rank."
    (old,) = doubts(8, decision(confident=False), 64)
    assert old.startswith("Not confident: the paired errors do not bear this rank out."), (
        "records that do not say why"
    )


# --- the initial factors


def test_the_first_draw_is_what_it_always_was_and_the_second_another():
    """Bit for bit, alone and in company; draws of one kind are nested."""
    bank = Bank(tiny("llama"), seed=5)
    bank.start((8, 4, 8, 3), (1.0,) * 4, (0, 0, 1, 1))
    found = bank.candidates
    for name, layer in bank.layers.items():
        A_KRD = found.factors[name][0]
        generator = torch.Generator().manual_seed(counter_seed(5, layer.index))
        first_RD = torch.rand(8, layer.d_in, generator=generator).mul_(2).sub_(1) / layer.d_in**0.5
        assert torch.equal(A_KRD[0, :8], first_RD.to(A_KRD.dtype))
        assert torch.equal(A_KRD[1, :4], A_KRD[0, :4])
        assert torch.equal(A_KRD[3, :3], A_KRD[2, :3])
        assert not torch.isclose(A_KRD[0, :8], A_KRD[2, :8]).any()
        assert float(A_KRD[2, :8].abs().max()) <= layer.d_in**-0.5
        assert not A_KRD[1, 4:].any()
        assert not A_KRD[3, 3:].any()
    for draws in (None, (0, 0)):
        bank.start((8, 4), (1.0, 1.0), draws)
        for name, (A_KRD, _) in bank.candidates.factors.items():
            assert torch.equal(A_KRD, found.factors[name][0][:2]), name


def test_a_small_rank_takes_less_of_a_raised_rate_over() -> None:
    """SciTLDR: twice the rate, best at rank 64, cost rank 4 0.14 nats (docs/selection.md)."""
    assert scale_at(1, 2.0, tried_at=64) == pytest.approx(1.0)
    assert scale_at(4, 2.0, tried_at=64) == pytest.approx(2 / 16 ** (1 / 6))
    assert scale_at(64, 2.0, tried_at=64) == 2.0
    assert scale_at(1, 1.5, tried_at=64) == 1.0, "never below the rate that was given"
    assert scale_at(4, 0.5, tried_at=64) == 0.5, "a lowered one is taken over whole"
    assert scale_at(4, 1.0, tried_at=64) == 1.0


# --- through a whole run


@pytest.fixture(scope="module")
def given(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("opening")
    model, data = tiny_llama(folder / "model", smollm2), write_rows(folder / "sums.jsonl", SUMS)
    return ["--model", model, "--data", data, "--ranks", "2,4", "--max-steps", 24, "--epochs", 9, "--batch-size", 8,
            "--dropout", "0.1", "--dtype", "float64", "--validation-fraction", "0.3"]  # fmt: skip


def trained(given: Sequence[object], out: Path, *options: object) -> tuple[Ran, Result]:
    ran = rankrace("train", *given, "--out", out, *options)
    assert ran.code == 0, ran.err
    return ran, Result.read(out / "result.json")


def same_adapter(one: Path, other: Path) -> None:
    ours, theirs = (peft.load_peft_weights(str(out / "adapter"), device="cpu") for out in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("strategy", ["shrink", "race"])
def test_a_rate_far_too_small_is_found_said_and_left(strategy: str, given: list[object], tmp_path: Path) -> None:
    """The run that goes on is that of the larger rate alone, through the cuts too, in float64; but small ranks take
    less of it over."""
    options = ["--strategy", strategy, "--no-refine"]
    ran, found = trained(given, tmp_path / "tried", *options, "--lr", "1e-4", "--lr-scales", "0.5,128", "--twin")
    assert found.decision.lr_scale == 128
    lower = {r: 1e-4 * scale_at(r, 128, tried_at=8) for r in (1, 2, 4)}
    assert found.learning_rate == pytest.approx(lower[found.rank])
    assert found.decision.lr_edge == "high"
    assert "but         Learning rate: the largest that was tried was the best, 128 times --lr." in ran.out
    assert [rated.scale for rated in found.learning_rates] == [0.5, 1, 128]
    losses = [rated.loss for rated in found.learning_rates if rated.loss is not None]
    assert losses == sorted(losses, reverse=True)
    assert found.decision.chance is not None
    assert found.decision.chance > 0
    assert "Learning rate: the largest" in (tmp_path / "tried" / "report.html").read_text()
    # A race that opens probes for longer; with a twin alone it does too.
    twin = ["--twin"] if strategy == "race" else []
    rates = tmp_path / "rates.yaml"
    rates.write_text(json.dumps({"rank_lr": lower}))
    plain, alone = trained(given, tmp_path / "alone", *options, "--lr", "1.28e-2", "--config", rates, *twin)
    assert "Learning rate:" not in plain.out
    assert (alone.rank, alone.decision.step) == (found.rank, found.decision.step)
    assert [(p.rank, p.loss) for p in alone.curve] == [(p.rank, pytest.approx(p.loss)) for p in found.curve]
    same_adapter(tmp_path / "tried", tmp_path / "alone")
    # Four began; the three that were dropped cost time, the winner's own is none of it.
    wide = [c for c in found.candidates if c.rank == 8]
    assert len(wide) == 4
    spent = json.loads((tmp_path / "tried" / "checkpoints" / "step-000024" / "state.json").read_text())["session"]
    entries, seconds = spent["search"]["entries"], spent["search"]["loser_seconds"]
    lost = [e for i, e in enumerate(entries) if e["status"] != "running" and i != 2]
    assert seconds == pytest.approx(sum(e["seconds"] for e in lost))
    assert 0 < seconds < spent["seconds"]


def test_a_raised_rate_that_was_not_taken_is_said(given: list[object], tmp_path: Path) -> None:
    ran, found = trained(given, tmp_path / "out", "--lr", "1e-3", "--lr-scales", "1.02")
    assert found.decision.lr_scale == 1.0
    assert found.learning_rates[1].loss is not None
    assert found.decision.lr_edge is None, "the one that was kept is the smallest, but not the best"
    (note,) = (note for note in found.notes if "was not taken" in note)
    assert note.startswith("1.02 times --lr is better by 0.")
    assert note in " ".join(ran.err.split())
    assert "was not taken" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("strategy", ["shrink", "race"])
def test_rates_are_told_apart_after_a_single_step(strategy: str, given: list[object], tmp_path: Path) -> None:
    """Then all have the same training loss so far, that of the base model."""
    options = ["--strategy", strategy, "--max-steps", 8, "--lr-scales", "0.5,2", "--twin", "--dropout", 0]
    _, found = trained(given, tmp_path / "out", *options)
    opened = [c for c in found.candidates if c.rank == 8]
    assert sorted(c.steps for c in opened) == [1, 1, 1, found.looks[0].step]
    assert len({series.losses[0] for series in found.history if series.rank == 8}) == 1
    (winner,) = (c for c in found.candidates if c.status == "winner")
    assert winner.steps == 8 - found.looks[0].step


def test_a_rate_that_diverges_is_passed_over_and_said(given: list[object], tmp_path: Path) -> None:
    ran, found = trained(given, tmp_path / "out", "--lr", "1e-2", "--lr-scales", "1,1e30")
    assert found.decision.lr_scale == 1
    assert found.learning_rates[1].loss is None
    assert "Diverged" in ran.out
