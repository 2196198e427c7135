"""Every method through the one loop: against PEFT by hand, against formulas, and resumed.

Legend: D model width, M bottleneck, R rank.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from models import leaky
from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.data import Data, load_data
from rankrace.data.encoded import Task
from rankrace.errors import RankraceError
from rankrace.methods import METHODS, Running, adalora, find_method, peft_lora
from rankrace.methods.adalora import Allocating
from rankrace.methods.fixed import Fixed
from rankrace.methods.houlsby import add_bottlenecks
from rankrace.methods.parameters import Parameters
from rankrace.methods.peft_lora import trainable, wrapped
from rankrace.session import recipe_of
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel, load_model, load_tokenizer
from tinyfolder import PARITIES, SUMS, tiny_bert, tiny_llama, write_rows

ON_CPU = [name for name, method in METHODS.items() if not method.gpu_only and name != "base"]
LR = 2e-3


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> tuple[RunConfig, Data]:
    folder = tmp_path_factory.mktemp("llama")
    return opened(tiny_llama(folder / "model", smollm2), write_rows(folder / "sums.jsonl", SUMS), "causal")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> tuple[RunConfig, Data]:
    folder = tmp_path_factory.mktemp("bert")
    return opened(tiny_bert(folder / "model", minilm), write_rows(folder / "odd.jsonl", PARITIES), "classification")


def opened(model: Path, rows: Path, task: Task) -> tuple[RunConfig, Data]:
    config = RunConfig(
        model=str(model), data=str(rows), validation_fraction=0.4, ranks=(2, 4), lr=LR, warmup=0.0, max_steps=6,
        batch_size=8, micro_tokens=64, device="cpu", dtype="float64", weight_decay=0.1,
    )  # fmt: skip
    return config, load_data(config, load_tokenizer(str(model)), task)


def base_of(config: RunConfig, data: Data) -> PreTrainedModel:
    task: Task = "classification" if data.labels else "causal"
    return load_model(config.model, task, data.labels, device=torch.device("cpu"), dtype=torch.float64, seed=0)


def started(name: str, config: RunConfig, data: Data) -> Running:
    task: Task = "classification" if data.labels else "causal"
    return find_method(name).prepare(config, data, base_of(config, data), task)


def test_every_variant_of_lora_is_what_its_name_says(causal: tuple[RunConfig, Data]) -> None:
    """Multipliers, magnitude vectors and learning rates; else one might silently be another."""
    config, data = causal
    expected = {"lora-r8": (8, 8.0), "lora-r16": (16, 16.0), "rslora-r16": (16, 4.0), "dora-r16": (16, 16.0)}
    for name, (r, divisor) in expected.items():
        model = base_of(config, data)
        find_method(name).prepare(config, data, model, "causal")
        layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        assert layers
        assert {layer.r["default"] for layer in layers} == {r}
        assert {layer.scaling["default"] for layer in layers} == {config.alpha / divisor}
        assert any("magnitude" in n for n, _ in model.named_parameters()) == (name == "dora-r16")
    rates = {name: find_method(name).default_lr(2000, config) for name in METHODS}
    lora = rates["lora-r16"]
    assert rates["full"] == pytest.approx(lora / 10)
    assert rates["rslora-r16"] == pytest.approx(lora / 2)
    assert {rates[name] for name in ("lora-r8", "dora-r16", "eva-r16", "qlora-r16", "shrink", "race", "grid")} == {
        lora
    }


def test_a_model_that_packing_does_not_reproduce_is_refused(causal: tuple[RunConfig, Data]) -> None:
    config, data = causal
    for name in ("lora-r8", "full", "shrink", "base"):
        with pytest.raises(RankraceError, match="packed rows"):
            find_method(name).prepare(config, data, leaky(base_of(config, data)), "causal")


def test_peft_lora_in_the_loop_is_the_bank_with_one_candidate(causal: tuple[RunConfig, Data]) -> None:
    """The same initial factors, the same batches: the same losses and the same factors, step by step."""
    config, data = causal
    R = 4
    bank_model = base_of(config, data)
    bank = Bank(bank_model, seed=config.seed)
    own = Trainer(PackedModel(bank_model, bank, "causal"), data.train.examples, recipe_of(config, bank_model, 64))
    bank.start((R,), (config.alpha / R,))
    own.start(bank.candidates, [LR])
    initial = {name: A_KRD[0, :R].clone() for name, (A_KRD, _) in bank.candidates.factors.items()}

    model = base_of(config, data)
    lora = LoraConfig(r=R, lora_alpha=int(config.alpha), target_modules=list(initial), task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, A_RD in initial.items():
        layer: Any = model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(A_RD)
    parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    fixed = Fixed(config, data, Parameters(model, parameters), "causal", rank=R)

    losses = torch.cat([loss_K.clone() for loss_K in own.run(own.total)])
    others = torch.cat([loss_K.clone() for loss_K in fixed.run()])
    torch.testing.assert_close(others, losses, rtol=1e-9, atol=0)
    for name, (A_KRD, B_KDR) in bank.candidates.factors.items():
        key = f"base_model.model.{name}.lora_%s.default.weight"
        torch.testing.assert_close(fixed.trainer.bank.values.views[key % "A"], A_KRD[:, :R], rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(fixed.trainer.bank.values.views[key % "B"], B_KDR[:, :, :R], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_full_fine_tuning_is_torch_by_hand(kind: str, request: pytest.FixtureRequest) -> None:
    """One example at a time by the model's own forward, gradients added up, torch's AdamW."""
    config, data = request.getfixturevalue(kind)
    running = started("full", config, data)
    losses = [loss_K.item() for loss_K in running.run()]

    model = base_of(config, data).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    trainer = running.trainer
    expected = []
    for step in range(trainer.total):
        examples = [data.train.examples[i] for row in trainer.batch(step).micros for i in row]
        count = sum(int(e.supervised.sum()) if kind == "causal" else 1 for e in examples)
        total = 0.0
        for e in examples:
            ids = torch.as_tensor(e.input_ids).long()[None]
            logits = model(input_ids=ids).logits
            if kind == "causal":
                targets = torch.where(torch.as_tensor(e.supervised), ids[0], -100)[1:]
                loss = torch.nn.functional.cross_entropy(logits[0, :-1], targets, reduction="sum") / count
            else:
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor([e.label])) / count
            loss.backward()
            total += loss.item()
        clip_grad_norm_(model.parameters(), config.clip)
        optimizer.param_groups[0]["lr"] = LR * trainer.schedule.at(step)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(total)
    assert losses == pytest.approx(expected, rel=1e-8)
    for name, p in model.named_parameters():
        torch.testing.assert_close(trainer.bank.values.views[name][0], p.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_every_method_learns(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    config, data = request.getfixturevalue(kind)
    if (kind, name) == ("classes", "eva-r16"):
        with pytest.raises(RankraceError, match="64 training examples"):
            started(name, config, data)
        return
    lr = 30 * find_method(name).default_lr(2000, config)
    running = started(name, config.model_copy(update={"lr": lr, "max_steps": 20, "epochs": 50.0}), data)
    losses = [loss_K[-1].item() for loss_K in running.run()]
    assert len(losses) == running.trainer.total == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("left", [3, 0])
def test_a_resumed_method_ends_where_an_undisturbed_one_does(
    left: int, name: str, causal: tuple[RunConfig, Data]
) -> None:
    """With none left: as the run for the table goes on from the end of its tuning."""
    config, data = causal
    whole, half, rest = (started(name, config, data) for _ in range(3))
    expected = [loss_K[-1].item() for loss_K in whole.run()]
    seen = [loss_K[-1].item() for loss_K in islice(half.run(), half.trainer.total - left if left else None)]
    tensors = {n: t.clone() for n, t in half.tensors().items()}
    rest.restore(tensors, half.state())
    seen += [loss_K[-1].item() for loss_K in rest.run()]
    assert seen == expected
    held_out = data.validation.examples
    np.testing.assert_array_equal(rest.trainer.measure(held_out).loss_KN, whole.trainer.measure(held_out).loss_KN)
    assert (rest.described().parameters, rest.described().rank) == (
        whole.described().parameters,
        whole.described().rank,
    )


@pytest.mark.parametrize("name", ["lora-r16", "shrink"])
def test_an_average_is_what_is_delivered_where_it_is_better(name: str, causal: tuple[RunConfig, Data]) -> None:
    """At a constant and high rate, where values wander; up to the end both train alike."""
    config, data = causal
    config = config.model_copy(
        update={"schedule": "constant", "lr": 0.04, "max_steps": 30, "batch_size": 2, "epochs": 9.0}
    )
    losses, validation = [], []
    for method in (name, f"{name}-average"):
        running = started(method, config, data)
        losses.append([float(loss_K[0]) for loss_K in running.run()])
        validation.append(float(running.trainer.measure(data.validation.examples).mean_K[0]))
    assert losses[0] == losses[1]
    assert validation[1] < validation[0]


def test_houlsby_has_the_papers_number_of_parameters(causal: tuple[RunConfig, Data], minilm: Path) -> None:
    """2·M·D + D + M an adapter, two adapters a block."""
    config, data = causal
    D, M, blocks = 32, 64, 2
    assert started("houlsby", config, data).described().parameters == 2 * blocks * (2 * M * D + D + M)

    D, M, blocks = 384, 16, 6
    bert = load_model(
        str(minilm), "classification", ("a", "b"), device=torch.device("cpu"), dtype=torch.float32, seed=0
    )
    added = add_bottlenecks(bert, M)
    assert len(added) == 2 * blocks
    count = sum(p.numel() for b in added.values() for n, p in b.named_parameters() if not n.startswith("base."))
    assert count == 2 * blocks * (2 * M * D + D + M)


def test_houlsby_does_not_guess_where_blocks_end() -> None:
    class Unknown(torch.nn.Module): ...

    with pytest.raises(RankraceError, match=r"self_attn\.o_proj"):
        add_bottlenecks(Unknown(), 8)  # type: ignore[arg-type]


def test_lora_parameters_follow_the_rank(causal: tuple[RunConfig, Data]) -> None:
    config, data = causal
    eight, sixteen = (started(name, config, data).described().parameters for name in ("lora-r8", "lora-r16"))
    assert sixteen == 2 * eight


def test_adalora_ends_on_its_budget(causal: tuple[RunConfig, Data]) -> None:
    """8 singular values a layer on average, of 12 at the start; the triplet of each counts d_in + d_out + 1."""
    config, data = causal
    running = started("adalora-r8", config.model_copy(update={"max_steps": 20, "epochs": 50.0}), data)
    for _ in running.run():
        pass
    values = running.trainer.bank.values.views
    kept = {n: int((t != 0).sum()) for n, t in values.items() if ".lora_E" in n}
    assert sum(kept.values()) == 8 * len(kept)
    assert len(set(kept.values())) > 1
    widths = {n: values[n.replace("_E", "_A")].shape[2] + values[n.replace("_E", "_B")].shape[1] + 1 for n in kept}
    assert running.described().parameters == sum(kept[n] * widths[n] for n in kept)


@pytest.mark.parametrize(("changes", "deltaT"), [(100, 1), (5, 4)])
def test_adalora_is_pefts_step_by_step(
    changes: int, deltaT: int, causal: tuple[RunConfig, Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalty, importance, uncertainty, masks, values: PEFT's own on a second model, on the same gradients."""
    config, data = causal
    monkeypatch.setattr(adalora, "EVERY", changes)
    running = started("adalora-r8", config.model_copy(update={"max_steps": 20, "epochs": 50.0}), data)
    ours = running.trainer.optimizer
    assert isinstance(ours, Allocating)
    assert (ours.last, ours.settings.tinit, ours.settings.deltaT) == (14, 2, deltaT)
    ours.settings.beta2 = 0.5  # PEFT's two defaults are equal
    peft_model = wrapped(base_of(config, data), ours.settings, config.seed)
    tuner: Any = peft_model.base_model
    named = trainable(peft_model)
    values, gradients = running.trainer.bank.values, running.trainer.bank.gradients
    for n, p in named.items():
        torch.testing.assert_close(p.detach(), values.views[n][0], rtol=0, atol=0)
    stepped: dict[str, torch.Tensor] = {}
    update = ours.own.step

    def recorded(lr_K: Sequence[float]) -> torch.Tensor:
        norm_K = update(lr_K)
        stepped.update({n: view[0].clone() for n, view in values.views.items()})
        return norm_K

    monkeypatch.setattr(ours.own, "step", recorded)
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(4)[None]
    masked = []
    for step in range(1, 21):
        tuner.zero_grad()
        # What PEFT's forward adds to the model's own loss.
        (tuner(input_ids=ids, labels=ids).loss - tuner.model(input_ids=ids, labels=ids).loss).backward()
        for n, p in named.items():
            assert p.grad is not None
            drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 1e-2
            gradients.views[n][0].copy_(drawn)
            p.grad += drawn
        ours.step([LR])
        for n, p in named.items():
            torch.testing.assert_close(ours.kept.views[n][0], p.grad, rtol=1e-10, atol=1e-13)
            p.data.copy_(stepped[n])
        tuner.update_and_allocate(step)
        for n, p in named.items():
            torch.testing.assert_close(p.detach(), values.views[n][0], rtol=0, atol=0)
        allocator = tuner.rankallocator
        assert bool(allocator.exp_avg_ipt) == (step < ours.last)  # PEFT forgets them at the last change
        for theirs, flat in ((allocator.exp_avg_ipt, ours.importance), (allocator.exp_avg_unc, ours.uncertainty)):
            for n, mean in theirs.items():
                if ".ranknum." not in n:
                    mine = flat.views[f"base_model.model.{n}"][0]
                    torch.testing.assert_close(mine, mean.detach(), rtol=1e-9, atol=1e-18)
        pattern = tuner.peft_config["default"].rank_pattern or {}
        for n, kept in pattern.items():
            mask_R = ours.masked_LR[ours.E.index(f"base_model.model.{n}")]
            assert mask_R.tolist() == [not k for k in kept]
        masked.append(int(ours.masked_LR.sum()))
        assert bool(pattern) == (masked[-1] > 0)
    assert len(set(masked)) > 3
    assert masked[-1] == 4 * len(ours.E)


@pytest.mark.parametrize("reached", [1, 4, 7, 14, 17], ids=["warm-up", "budget", "unmasked", "last", "tail"])
def test_adalora_goes_on_exactly_from_every_phase(
    reached: int, causal: tuple[RunConfig, Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a file: masks, averages and moments too."""
    config, data = causal
    monkeypatch.setattr(adalora, "EVERY", 5)
    whole, half, rest = (
        started("adalora-r8", config.model_copy(update={"max_steps": 20, "epochs": 50.0}), data) for _ in range(3)
    )
    losses = [loss_K.item() for loss_K in whole.run()]
    for _ in islice(half.run(), reached):
        pass
    save_file(half.tensors(), tmp_path / "half.safetensors")
    rest.restore(load_file(tmp_path / "half.safetensors"), half.state())
    assert [loss_K.item() for loss_K in rest.run()] == losses[reached:]
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(rest.tensors()[name], tensor, rtol=0, atol=0)


def test_eva_starts_from_the_data(causal: tuple[RunConfig, Data]) -> None:
    """Rows of A are orthonormal directions of the inputs, ranks differ, the budget is that of r=16."""
    config, data = causal
    values = started("eva-r16", config, data).trainer.bank.values.views
    factors = [A_KRD[0] for name, A_KRD in values.items() if ".lora_A" in name]
    for A_RD in factors:
        torch.testing.assert_close(A_RD @ A_RD.T, torch.eye(len(A_RD), dtype=A_RD.dtype), rtol=0, atol=1e-4)
    assert sum(len(A_RD) for A_RD in factors) == 16 * 14
    assert len({len(A_RD) for A_RD in factors}) > 1


def test_eva_compares_few_inputs_and_finds_the_same(
    causal: tuple[RunConfig, Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT hashes every number that it compares: a few rows tell layers apart as all do."""
    config, data = causal
    few = started("eva-r16", config, data).trainer.bank.values
    monkeypatch.setattr(peft_lora, "COMPARED", peft_lora.EVA_INPUTS)
    every = started("eva-r16", config, data).trainer.bank.values
    assert few.views.keys() == every.views.keys()
    torch.testing.assert_close(few.all_KP, every.all_KP, rtol=0, atol=0)


def test_qlora_says_that_it_needs_a_gpu() -> None:
    with pytest.raises(RankraceError, match="needs a GPU"):
        find_method("qlora-r16").check(torch.device("cpu"), "causal")


def test_unequal_terms_are_refused(causal: tuple[RunConfig, Data]) -> None:
    config, data = causal
    with pytest.raises(RankraceError, match="unequal terms"):
        started("lora-r8", config.model_copy(update={"dropout": 0.1}), data)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(RankraceError, match="'lora-r8'"):
        find_method("lora8")
