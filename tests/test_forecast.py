"""What is predicted of a run, against what it then takes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from transformers import LlamaConfig

from commandline import assert_refused, rankrace
from examples import examples
from models import tiny
from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.data.encoded import EncodedSet
from rankrace.data.pack import Size
from rankrace.forecast import Memory, besides, measurements, remedy
from rankrace.plan import (
    AMPLE_SHARE,
    AMPLE_TOKENS,
    FRESH_SHARE,
    FULL_TOKENS,
    GRAPHS,
    LONGER,
    LOOK_ENOUGH,
    LOOK_SHARE,
    MOST_TOKENS,
    LookPlan,
    Switch,
    candidate_bytes,
    compiling,
    graph_tokens,
    graphs_worth,
    measures_longer,
    ranks_measured,
    way_of,
    worthwhile_tokens,
)
from rankrace.session import divide
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.memory import Meter, PassCost, Plane, probe
from rankrace.training.model import PackedModel
from tinyfolder import SHORT, SUMS, tiny_bert, tiny_llama, write_rows


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "llama-classification", "roberta-classification"])
@pytest.mark.parametrize("micro_tokens", [80, 1500])
def test_the_peak_of_a_step_is_predicted(family: str, micro_tokens: int) -> None:
    """From four short rows; one candidate or several, padded unevenly. Within 10%: one of two blocks is last."""
    classes = 3 if family.endswith("classification") else 0
    hf = tiny(family)
    bank = Bank(hf)
    model = PackedModel(hf, bank, "classification" if classes else "causal", chunk=16)
    rows = examples(32, seed=3, longest=50, classes=classes)
    recipe = Recipe(
        epochs=2, max_steps=None, batch_size=16, micro_tokens=micro_tokens, schedule="constant", warmup=0.0,
        weight_decay=0.0, clip=1.0, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, rows, recipe)
    bank.start((4, 2, 8), [1.0] * 3)
    trainer.start(bank.candidates, [1e-3] * 3)
    cost = probe(model, rows)
    assert not bank.gradients.all_KP.any()
    sizes = trainer.sizes()
    predicted = max(cost.training(s, trainer.abreast(s.tokens, 3)) for s in sizes) / cost.slack
    with Meter() as meter:
        for _ in trainer.run(trainer.total // 2):
            pass
    assert abs(predicted / meter.peak - 1) < 0.1


def test_candidates_take_what_is_counted() -> None:
    bank = Bank(tiny("llama", torch.float32))
    before = Meter()
    with before:
        trainer = Trainer(
            PackedModel(bank.model, bank, "causal"),
            examples(4),
            Recipe(epochs=1, max_steps=None, batch_size=4, micro_tokens=100, schedule="constant", warmup=0.0,
                   weight_decay=0.0, clip=1.0, seed=0),
        )  # fmt: skip
        bank.start((2, 8), (1.0, 1.0))
        trainer.start(bank.candidates, (1e-3, 1e-3))
        taken = before.bytes
    assert abs(taken / candidate_bytes(bank, 2, 8) - 1) < 0.01


FLAT = Plane(fixed=0.0, token=10.0, cell=0.0)
COST = PassCost(kept=FLAT, backward=FLAT, measuring=FLAT, target=1.0, chunk=100, slack=1.0)


def test_the_largest_pass_that_fits() -> None:
    tokens = COST.tokens_in(5100.0, 1.5)
    assert tokens == 500
    assert COST.training(Size(tokens=500, examples=5, longest=100, targets=500), 1) == 5100.0
    assert COST.tokens_in(50.0, 1.5) == 0
    assert COST.apart(1.0).tokens_in(10_200.0, 1.5) == 500, "two forwards beside each other, with logits"
    assert COST.apart(3.0).tokens_in(20_200.0, 1.5) == 500, "one of them three times as long"


SHAPES = ((576, 1536), (2048, 8192), (3072, 8192), (4096, 11008), (5120, 13824))
"""Width and inner width: 135M, 1B, 3B, 7B, 13B."""


def test_wide_models_take_short_passes() -> None:
    """A pass of a small model is launching; one of a large model is products, and more tokens are only memory."""

    def tokens(compiled: Switch, graphs: Switch) -> list[int]:
        way = way_of(compiled, graphs)
        return [worthwhile_tokens(LlamaConfig(hidden_size=D, intermediate_size=inner), way) for D, inner in SHAPES]

    eager, compiled, graph = tokens("off", "off"), tokens("on", "off"), tokens("on", "on")
    for all_sizes in (eager, compiled, graph):
        assert all_sizes == sorted(all_sizes, reverse=True)
    for size in zip(graph, eager, compiled, strict=True):
        assert list(size) == sorted(size), "what costs more to launch wants longer passes"
    assert eager[0] == compiled[0] == MOST_TOKENS
    assert 6200 <= compiled[3] <= 8000, "measured at 7B: at 6,200 tokens the chip waits for a fifteenth of the step"
    assert 6375 <= graph[1] <= 8192, "measured at 1B: one pass of 6,375 tokens takes 0.85 of three shorter ones"
    assert graph[3:] == [FULL_TOKENS] * 2, "at 7B a longer one buys a tenth of the time for twice the memory"


def test_graphs_are_longer_where_memory_is_plenty() -> None:
    """7B keeps some 5 MB a token in plain blocks, beside 17 GB for itself and a wide candidate."""
    token = replace(FLAT, token=5e6)
    cost = PassCost(kept=token, backward=token, measuring=FLAT, target=1e6, chunk=2048, slack=1.0)
    for gigabytes, least, most in (
        (80, FULL_TOKENS, FULL_TOKENS),
        (141, 6656, AMPLE_TOKENS),
        (24, FULL_TOKENS, 3200),
    ):
        ample = AMPLE_SHARE * gigabytes * 1e9 - 17e9
        shape = LlamaConfig(hidden_size=4096, intermediate_size=11008)
        assert least <= graph_tokens(shape, cost, ample, 1.0) <= most
    small = LlamaConfig(hidden_size=576, intermediate_size=1536)
    assert graph_tokens(small, cost, 0.0, 1.0) == worthwhile_tokens(small, GRAPHS), (
        "longer ones are worth while anyway"
    )


def test_small_models_measure_in_longer_passes_than_they_train_in() -> None:
    """Python launches them, graphs or not; a wide model's are products already, and would only take memory."""

    def longer(shape: int, micro_tokens: int, device: str = "cuda") -> float:
        D, inner = SHAPES[shape]
        config = LlamaConfig(hidden_size=D, intermediate_size=inner)
        return measures_longer(SimpleNamespace(device=torch.device(device), config=config), micro_tokens)

    assert longer(0, 16384) == LONGER, "no more for a user who wants little memory to be taken"
    assert 3 < longer(0, 32768) < LONGER
    assert [longer(1, 7680), longer(3, 3200), longer(4, 3200)] == [1.0] * 3
    assert longer(0, 4096, "cpu") == 1.0


class Layer:
    d_in = d_out = 5380  # the mean of 2.9e7 weights


class Llama7b:
    """Its layers, on a device that need not be there."""

    def __init__(self, device: str) -> None:
        self.device, self.layers = torch.device(device), dict.fromkeys(range(224), Layer)


def test_what_python_launches_too_slowly_is_a_graph() -> None:
    """Passes of SQuAD's lengths are graphs, of 16,000 tokens not."""

    class Steps:
        class train:
            lengths = torch.tensor([100.0, 300.0]).numpy()

    def graphs(batch_size: int, micro_tokens: int, compiled: Switch, device: str = "cuda") -> Switch:
        return graphs_worth(Steps, batch_size, Llama7b(device), micro_tokens, compiled)  # type: ignore[arg-type]

    assert [graphs(32, 7680, compiled) for compiled in ("off", "on")] == ["on", "on"]
    assert [graphs(80, 16_384, compiled) for compiled in ("off", "on")] == ["off", "off"]
    assert graphs(80, 2048, "on") == "on", "it goes by the passes, not by the step"
    assert graphs(32, 7680, "on", "cpu") == "off"


def test_compiling_has_to_be_repaid() -> None:
    """A run of a thousand steps pays for it, one of twenty does not."""

    class Train(list[int]):
        lengths = torch.full((32_000,), 200.0).numpy()

    class Rows:
        train = Train(range(32_000))

    def wanted(device: str = "cuda", **options: float) -> Switch:
        config = RunConfig(model="m", data="d", batch_size=32, **options)  # type: ignore[arg-type]
        return compiling(config, Rows, Llama7b(device))  # type: ignore[arg-type]

    assert wanted(epochs=1) == "on"
    assert wanted(epochs=0.02) == "off"
    assert wanted(epochs=1, max_steps=20) == "off"
    assert wanted("cpu", epochs=1) == "off"


@pytest.mark.parametrize("strategy", ["shrink", "race", "grid"])
@pytest.mark.parametrize("steps", [150, 600, 4000])
def test_looks_take_a_tenth_of_the_work(steps: int, strategy: Literal["shrink", "race", "grid"]) -> None:
    """Whatever the lengths of training and held-out examples; and no fewer examples than can be told apart."""
    for held_length in (20, 100, 400):

        class Rows:
            class train:
                lengths = torch.full((steps * 32,), 100.0).numpy()

            class validation:
                lengths = torch.full((1000,), float(held_length)).numpy()
                documents = 1000

        class Steps:
            total = per_epoch = steps

        config = RunConfig(model="m", data="d", strategy=strategy)
        plan = LookPlan.of(config, Rows, Steps)  # type: ignore[arg-type]
        work = 2 * 100 * 32 * steps  # in forwards of a token
        looks = ranks_measured(config, plan.most) * plan.looked * held_length
        assert plan.looked >= LOOK_ENOUGH
        assert looks <= LOOK_SHARE * work or plan.looked == LOOK_ENOUGH
        assert plan.fresh * 2 * held_length <= FRESH_SHARE * work or plan.fresh == LOOK_ENOUGH


@pytest.mark.parametrize(("documents", "looked"), [(2, 2 * LOOK_ENOUGH), (4, 200), (400, LOOK_ENOUGH)])
def test_few_large_documents_are_measured_well_each(documents: int, looked: int) -> None:
    """Their means are what an error is estimated from. Half of all there are at most."""
    rows = [replace(e, group=e.row % documents) for e in examples(400)]
    held = EncodedSet(examples=rows, truncated=0, dropped=0, supervised_tokens=1)
    data = SimpleNamespace(train=held, validation=held)
    plan = LookPlan.of(RunConfig(model="m", data="d"), data, SimpleNamespace(total=10, per_epoch=10))  # type: ignore[arg-type]
    assert (plan.looked, plan.fresh) == (looked, looked)
    chosen, fresh, _ = divide(rows, plan, seed=0)
    assert (len(chosen), len(fresh)) == (looked, looked), "as planned"


def test_plan_of_a_causal_run(smollm2: Path, tmp_path: Path) -> None:
    model, data = tiny_llama(tmp_path / "model", smollm2), write_rows(tmp_path / "sums.jsonl", SUMS)
    for strategy in ("shrink", "grid"):
        ran = rankrace("plan", "--model", model, "--data", data, "--out", tmp_path / "out", "--device", "cpu",
                       "--strategy", strategy, *SHORT)  # fmt: skip
        assert ran.code == 0, ran.err
        names = [line.split(" ")[0] for line in ran.out.splitlines() if not line.startswith(" ")]
        assert names == ["model", "candidates", "steps", "passes", "memory", "peak", "fits", "step", "time"]
        assert "8 of " in ran.out
        assert ("1 of rank 8" if strategy == "shrink" else "2 of rank 2, 4") in ran.out
    assert not (tmp_path / "out").exists(), "a plan writes nothing"


def test_plan_of_a_race_and_of_learning_rates(smollm2: Path, tmp_path: Path) -> None:
    model, data = tiny_llama(tmp_path / "model", smollm2), write_rows(tmp_path / "sums.jsonl", SUMS)
    for options, candidates, looks in (
        (["--strategy", "race"], "1 of rank 8", "at most 5 looks"),
        (["--strategy", "race", "--lr-scales", "0.5,1,2", "--twin"], "4 of rank 8, 8, 8, 8", "at most 6 looks"),
        (["--lr-scales", "0.5,2"], "3 of rank 8, 8, 8", "at most 3 looks"),
    ):
        ran = rankrace("plan", "--model", model, "--data", data, "--device", "cpu", *SHORT, *options)
        assert ran.code == 0, ran.err
        assert candidates in ran.out
        assert looks in ran.out


def test_the_time_of_a_race_is_more_than_that_of_its_winner() -> None:
    """Shares of the training: three of four racers, for a tenth; three of four that open, for as long."""
    plan = LookPlan(fractions=(0.1, 0.12, 0.15, 0.2), most=5, looked=64, fresh=64)
    race = RunConfig(model="m", data="d", strategy="race")
    assert besides(race, plan, 1) == pytest.approx(3 * 0.1)
    assert besides(race, plan, 4) == pytest.approx(3 * 0.1 + 3 * 0.1)
    assert besides(RunConfig(model="m", data="d"), plan, 1) == 0.0


def test_how_many_measurements_a_run_takes() -> None:
    """The base, looks, and where rows come back what was chosen and both ends, on 50 examples; the first and the last
    figures on 60."""
    plan = LookPlan(fractions=(0.15,), most=1, looked=50, fresh=90)
    grid = RunConfig(model="m", data="d", strategy="grid", refine=False)
    plain = grid.model_copy(update={"average": "off"})
    assert measurements(plain, plan, 5, 60, repeats=False) == 50 * (1 + 5) + 60 * 2
    assert measurements(plain, plan, 5, 60, repeats=True) == 50 * (1 + 5 + 1 + 1) + 60 * 2
    assert measurements(grid, plan, 5, 60, repeats=False) == 50 * (1 + 5) + 60 * 2
    assert measurements(grid, plan, 5, 60, repeats=True) == 50 * (1 + 5 + 1 + 2) + 60 * 2
    shrink = RunConfig(model="m", data="d", refine=False)
    rates = shrink.model_copy(update={"lr_scales": (0.5, 1.0, 2.0)})
    twice, thrice = (LookPlan(fractions=(0.2,), most=most, looked=50, fresh=90) for most in (2, 3))
    before = measurements(shrink, twice, 1, 60, repeats=True)
    assert measurements(rates, thrice, 3, 60, repeats=True) == before + 50 * 3


def test_plan_of_a_classifier_and_of_nothing(minilm: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{a} and {b}", "label": "odd" if (a + b) % 2 else "even"} for a in range(6) for b in range(6)]
    model, data = tiny_bert(tmp_path / "model", minilm), write_rows(tmp_path / "rows.jsonl", rows)
    ran = rankrace("plan", "--model", model, "--data", data, "--device", "cpu", *SHORT)
    assert ran.code == 0, ran.err
    assert "yes" in ran.out
    assert_refused(rankrace("plan", "--model", model, "--data", tmp_path / "none.jsonl"), "none.jsonl")


def test_what_would_fit() -> None:
    OFF, ON = (RunConfig(model="m", data="d", recompute=recompute) for recompute in ("off", "on"))
    NF4 = OFF.model_copy(update={"quantize": "nf4"})

    class Lengths:
        class train:
            lengths = torch.tensor([100.0, 300.0]).numpy()

    def memory(capacity: int, graphs: int = 0, base: int = 1000) -> Memory:
        return Memory(base=base, workspace=0, candidates=0, training=20_000, looking=100, loading=0, graphs=graphs,
                      capacity=capacity)  # fmt: skip

    assert memory(21_000).fits
    assert not memory(21_000, graphs=1).fits
    assert remedy(OFF, memory(21_000, graphs=20_000), COST, Lengths) == "--cuda-graphs off"  # type: ignore[arg-type]
    assert remedy(OFF, memory(14_000), COST, Lengths) == "--micro-tokens 1024"  # type: ignore[arg-type]
    assert remedy(OFF, memory(3000), COST, Lengths) == "--recompute on"  # type: ignore[arg-type]
    assert remedy(ON, memory(3000), COST, Lengths) == "--max-length 160"  # type: ignore[arg-type]
    assert "--quantize nf4, a smaller model" in remedy(OFF, memory(900), COST, Lengths)  # type: ignore[arg-type]
    assert "quantize" not in remedy(NF4, memory(900), COST, Lengths)  # type: ignore[arg-type]
