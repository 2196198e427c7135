"""A rank of its own for each layer: cut, trained, carried, saved, allocated.

Shapes: K candidates, R padded rank, D a layer's width.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import examples
from models import CAUSAL, CLASSIFYING, tiny
from rankrace.bank import Bank, Candidates, Spectrum, adapter_of, allocate, carried, lora_config, save_adapter
from rankrace.choose import Selection
from rankrace.config import RunConfig
from rankrace.loading import open_session
from rankrace.merge import merge
from rankrace.progress import Progress
from rankrace.session import Session
from rankrace.training.checkpoint import load_checkpoint, save_checkpoint
from rankrace.training.compiled import compile_blocks
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel
from test_bank import STEPS, in_bank, plain_steps, same_factors
from tinyfolder import SUMS, tiny_llama, write_rows

WIDE = 12
UNEVEN = (4, 0, 1, 12, 3)
"""Ranks of the first layers, and of the next ones again."""


def uneven(bank: Bank) -> dict[str, int]:
    return dict(zip(bank.layers, itertools.cycle(UNEVEN), strict=False))


def filled(bank: Bank) -> Candidates:
    """A candidate of rank 2 and a wide one, with something in B."""
    bank.start((2, WIDE), (4.0, 2.0))
    torch.manual_seed(4)
    for layer in bank.layers.values():
        layer.B_KDR.data[1, :, :WIDE].normal_(std=0.1)
    return bank.candidates.with_tensors({n: t.clone() for n, t in bank.candidates.tensors().items()})


# --- cutting


def test_each_layer_is_cut_to_its_own_rank() -> None:
    """Eckart-Young with each layer's rank; beside it, the same rank everywhere."""
    bank = Bank(tiny("llama"))
    wide, mine = filled(bank), uneven(bank)
    cut = wide.truncations(1, (4, 3), (5.0, 3.0), allocations=(None, mine))
    plain = wide.truncations(1, (4,), (5.0,))
    assert cut.ranks == (4, 3)
    assert cut.ranks_of(0) == dict.fromkeys(bank.layers, 4)
    assert cut.ranks_of(1) == mine
    assert set(mine.values()) == set(UNEVEN)
    whole = wide.spectra(1)
    for name, (A, B) in cut.factors.items():
        r = mine[name]
        assert A.shape[1] == B.shape[2] == (16 if r == 12 else 8), "no layer is padded for another"
        assert not A[1, r:].any()
        assert not B[1, :, r:].any()
        update = 2.0 * wide.factors[name][1][1] @ wide.factors[name][0][1]
        S = torch.linalg.svdvals(update)
        torch.testing.assert_close(torch.linalg.norm(update - 3.0 * B[1] @ A[1]), S[r:].norm(), rtol=0, atol=1e-12)
        A_RD, B_DR = whole[name].truncated(max(4, r), 1.0)
        assert torch.equal(A[0, :4], A_RD[:4] * 5.0**-0.5), "the beginning of the widest cut, bit for bit"
        assert torch.equal(B[0, :, :4], B_DR[:, :4] * 5.0**-0.5)
        # That is a product of another width, whose last bits differ on some processors.
        torch.testing.assert_close(A[0, :8], plain.factors[name][0][0], rtol=0, atol=1e-14)
        torch.testing.assert_close(B[0, :, :8], plain.factors[name][1][0], rtol=0, atol=1e-14)
    for name, found in cut.spectra(1).items():
        torch.testing.assert_close(found.S_R, wide.spectra(1)[name].S_R[: mine[name]], rtol=0, atol=1e-12)


def test_who_stays_keeps_its_ranks() -> None:
    bank = Bank(tiny("llama"))
    wide, mine = filled(bank), uneven(bank)
    cut = wide.truncations(1, (4, 3, 4), (5.0, 3.0, 5.0), allocations=(None, mine, None))
    other = cut.keep([1, 2])
    assert (other.ranks_of(0), other.ranks_of(1)) == (mine, dict.fromkeys(bank.layers, 4))
    for name, (A, B) in other.factors.items():
        assert torch.equal(A[0], cut.factors[name][0][1])
        assert torch.equal(B[0], cut.factors[name][1][1])
    same = cut.keep([2, 0])
    assert not same.layer_ranks
    assert all(A.shape[1] == 8 for A, _ in same.factors.values())


def test_parameters_are_those_of_each_layer() -> None:
    bank = Bank(tiny("bert-classification"))
    bank.load(filled(bank).truncations(1, (3,), (3.0,), allocations=(uneven(bank),)))
    adapter = adapter_of(bank, 0)
    saved = [t for pair in adapter.factors.values() for t in pair]
    saved += [t for head in adapter.heads.values() for t in head.values()]
    assert bank.trainable_parameters(bank.candidates.ranks_of(0)) == sum(t.numel() for t in saved)
    assert bank.trainable_parameters(3) == bank.trainable_parameters(dict.fromkeys(bank.layers, 3))


# --- training


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classification"])
def test_training_is_that_of_a_peft_model_with_patterns(family: str) -> None:
    """Beside a candidate of another kind that is dropped on the way; clipping binds, weights decay."""
    trainer = in_bank(family)
    bank = trainer.bank
    mine, lr, s = uneven(bank), 2e-3, 3.0
    wide = filled(bank)
    trainer.start(wide.truncations(1, (4, 3), (5.0, s), allocations=(None, mine)), (1e-3, lr))
    start = {n: (A.clone(), B.clone()) for n, (A, B) in adapter_of(bank, 1).factors.items()}
    losses = [loss[1].item() for loss in trainer.run(STEPS // 2)]
    trainer.keep([1])
    losses += [loss[0].item() for loss in trainer.run(STEPS)]

    config = LoraConfig(
        r=99,
        rank_pattern={n: r for n, r in mine.items() if r},
        alpha_pattern={n: s * r for n, r in mine.items() if r},
        target_modules=[n for n, r in mine.items() if r],
        fan_in_fan_out=family == "gpt2",
        task_type="SEQ_CLS" if family in CLASSIFYING else "CAUSAL_LM",
    )
    peft_model = get_peft_model(tiny(family), config).double()
    for name, (A, B) in start.items():
        layer: Any = peft_model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    np.testing.assert_allclose(losses, plain_steps(peft_model, trainer, lr), rtol=0, atol=1e-9)
    same_factors(trainer, 0, peft_model)
    assert {n: r for n, r in mine.items() if r} == adapter_of(bank, 0).ranks


# --- moments through a cut


def random_moments(like: Candidates) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(t.shape, generator=generator, dtype=t.dtype) for n, t in like.tensors().items()}


def test_moments_are_carried_to_each_layers_rank() -> None:
    """A layer's moments are those of a cut to its rank everywhere."""
    bank = Bank(tiny("llama-classification"))
    before, mine = filled(bank), uneven(bank)
    whole, mean, square = before.spectra(1), random_moments(before), random_moments(before)
    after = before.truncations(1, (3,), (5.0,), whole, allocations=(mine,))
    ours = carried(before, 1, whole, after, mean, square)
    for r in set(UNEVEN):
        uniform = before.truncations(1, (r,), (5.0,), whole)
        for some, others in zip(ours, carried(before, 1, whole, uniform, mean, square), strict=True):
            for name in bank.layers:
                if mine[name] == r:
                    for factor in (f"{name}.A", f"{name}.B"):  # layers of one shape and rank share a product
                        torch.testing.assert_close(some[factor], others[factor], rtol=1e-9, atol=1e-12)
            assert all(
                torch.equal(some[f"score.{i}"], others[f"score.{i}"]) for i in range(len(after.heads["score"]))
            )


def test_moments_turn_with_the_gradient_from_ranks_that_differ() -> None:
    """Cut to all that it has, a candidate is the same ΔW in another basis: its gradients are the old ones, turned."""
    bank = Bank(tiny("llama"))
    wide, mine = filled(bank), uneven(bank)
    before = wide.truncations(1, (3,), (3.0,), allocations=(mine,))
    # Out of the basis of the singular vectors.
    for name, r in mine.items():
        A, B = before.factors[name]
        T = torch.eye(r).double() + 0.3 * torch.randn(r, r).double()
        A[0, :r], B[0, :, :r] = torch.linalg.solve(T, A[0, :r]), B[0, :, :r] @ T
    whole = before.spectra(0)
    after = before.truncations(0, (3,), (5.0,), whole, allocations=(mine,))
    mean = {n: torch.zeros_like(t) for n, t in before.tensors().items()}
    G = {n: torch.randn(B.shape[1], A.shape[2]).double() for n, (A, B) in before.factors.items()}  # ∂L/∂ΔW
    for name, (A, B) in before.factors.items():
        mean[f"{name}.A"][0], mean[f"{name}.B"][0] = 3.0 * B[0].T @ G[name], 3.0 * G[name] @ A[0].T
    turned, _ = carried(before, 0, whole, after, mean, {n: t.square() for n, t in mean.items()})
    for name, (A, B) in after.factors.items():
        torch.testing.assert_close(turned[f"{name}.A"][0], 5.0 * B[0].T @ G[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(turned[f"{name}.B"][0], 5.0 * G[name] @ A[0].T, rtol=1e-9, atol=1e-9)


# --- saving


def exported(bank: Bank, mine: dict[str, int], folder: Path) -> dict[str, Any]:
    """A candidate with these ranks, saved; PEFT's description of it."""
    bank.load(filled(bank).truncations(1, (3,), (3.0,), allocations=(mine,)))
    for head in bank.candidates.heads.values():
        for p in head:
            p.add_(0.1 * torch.randn_like(p))
    save_adapter(bank, adapter_of(bank, 0), folder)
    return json.loads((folder / "adapter_config.json").read_text())


def assert_same_in_peft(bank: Bank, family: str, folder: Path) -> None:
    """float64 throughout: losses of the exported model are the bank's to 1e-9, and not the base's."""
    classes = 3 if bank.heads else 0
    rows, task = examples(6, classes=classes), "classification" if classes else "causal"
    model = PackedModel(bank.model, bank, task)
    ours_S = model.losses(model.pack(rows, range(6))).loss_KS[0].detach()
    loaded = PeftModel.from_pretrained(tiny(family), str(folder), autocast_adapter_dtype=False).double()
    apart = Bank(tiny(family))  # only to run PEFT's model through the packed loss
    other = PackedModel(loaded.get_base_model(), apart, task)
    with apart.off(), torch.no_grad():
        again_S = other.losses(other.pack(rows, range(6))).loss_KS[0]
    torch.testing.assert_close(again_S, ours_S, rtol=0, atol=1e-9)
    with bank.off(), torch.no_grad():
        assert (model.losses(model.pack(rows, range(6))).loss_KS[0] - ours_S).abs().max() > 1e-4


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
def test_export_loads_in_peft_with_the_same_logits(family: str, tmp_path: Path) -> None:
    bank = Bank(tiny(family))
    mine = uneven(bank)
    said = exported(bank, mine, tmp_path)
    assert 0 in mine.values()
    assert set(said["target_modules"]) == {n for n, r in mine.items() if r}
    assert said["rank_pattern"] == {n: r for n, r in mine.items() if r not in (0, 3)}
    assert said["alpha_pattern"] == {n: 3 * r for n, r in said["rank_pattern"].items()}
    assert (said["r"], said["lora_alpha"]) == (3, 9)
    assert_same_in_peft(bank, family, tmp_path)


def test_layers_of_one_kind_are_left_out_by_its_short_name(tmp_path: Path) -> None:
    bank = Bank(tiny("llama"))
    said = exported(bank, {n: 0 if n.endswith(("k_proj", "up_proj")) else 3 for n in bank.layers}, tmp_path)
    assert sorted(said["target_modules"]) == ["down_proj", "gate_proj", "o_proj", "q_proj", "v_proj"]
    assert not said["rank_pattern"]
    assert_same_in_peft(bank, "llama", tmp_path)


def test_one_layer_alone(tmp_path: Path) -> None:
    bank = Bank(tiny("gpt2"))
    said = exported(bank, dict.fromkeys(bank.layers, 0) | {"transformer.h.1.mlp.c_proj": 5}, tmp_path)
    assert said["target_modules"] == ["transformer.h.1.mlp.c_proj"]
    assert_same_in_peft(bank, "gpt2", tmp_path)


def test_a_choice_names_the_ranks_of_all_layers(tmp_path: Path) -> None:
    """A model made by the configuration that a search hands out has the shapes of the adapter."""
    bank = Bank(tiny("llama"))
    exported(bank, uneven(bank), tmp_path)
    choice = Selection(
        rank=3, reason="", curve=(), confident=True, edge=None, doubts=(), learning_rate=1e-3,
        _config=lora_config(bank, adapter_of(bank, 0)),
    )  # fmt: skip
    made: Any = get_peft_model(tiny("llama"), choice.lora_config())
    layers = {n: m for n, m in made.base_model.model.named_modules() if n in bank.layers}
    ranks = {n: layers[n].lora_A["default"].out_features if isinstance(layers[n], LoraLayer) else 0 for n in layers}
    assert ranks == uneven(bank)
    assert {m.scaling["default"] for m in layers.values() if isinstance(m, LoraLayer)} == {3.0}
    assert "alpha_pattern" in choice.code()


# --- a run: checkpoints, the adapter of it, merged


def opened(folder: Path) -> Session:
    config = RunConfig(
        model=str(folder / "model"), data=str(folder / "rows.jsonl"), out=str(folder / "out"), ranks=(2, 8),
        max_steps=8, batch_size=8, device="cpu", dtype="float32",
    )  # fmt: skip
    with Progress() as progress:
        session, _ = open_session(config, progress)
    return session


def losses(trainer: Trainer, until: int) -> Tensor:
    return torch.stack([loss_K.clone() for loss_K in trainer.run(until)])


def test_a_run_with_ranks_by_layer_is_resumed_saved_and_merged(smollm2: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", smollm2)
    write_rows(tmp_path / "rows.jsonl", SUMS)
    session = opened(tmp_path)
    trainer, bank = session.trainer, session.trainer.bank
    losses(trainer, 3)
    whole = bank.candidates.spectra(0)
    sizes = bank.input_sizes(lambda: trainer.measure(trainer.train))
    mine = allocate(whole, bank.costs, 2 * sum(bank.costs.values()), sizes)
    if all(mine.values()):
        mine[next(iter(mine))] = 0
    assert len(set(mine.values())) > 2
    cuts = bank.candidates.truncations(0, (2,), (4.0,), whole, allocations=(mine,))
    trainer.cut(0, cuts, whole, (3e-3,))
    losses(trainer, 5)
    save_checkpoint(tmp_path / "checkpoints", 5, session.tensors(), session.state())
    rest = losses(trainer, 8)

    again = opened(tmp_path)
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    again.restore(*found)
    assert again.trainer.bank.candidates.ranks_of(0) == mine
    assert torch.equal(losses(again.trainer, 8), rest)

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(bank, adapter_of(bank, 0), adapter)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(adapter)
    merge(adapter, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    for name, r in mine.items():
        update = torch.zeros(())
        if r > 0:
            A, B = adapter_of(bank, 0).factors[name]
            update = 4.0 * B @ A
        expected = base.get_submodule(name).get_parameter("weight") + update
        assert torch.equal(merged.get_submodule(name).get_parameter("weight"), expected.bfloat16().float())


# --- allocating


def spectra_of(values: dict[str, list[float]]) -> dict[str, Spectrum]:
    """Only their singular values matter."""
    return {
        name: Spectrum(
            **dict.fromkeys(("A_RD", "B_DR", "to_U_RR", "to_V_RR"), torch.empty(0)), S_R=torch.tensor(S).double()
        )
        for name, S in values.items()
    }


def kept(spectra: dict[str, Spectrum], ranks: dict[str, int], weights: dict[str, float]) -> float:
    """Σ w·S² of what the ranks keep."""
    return sum(weights[n] * s.S_R[: ranks[n]].square().sum().item() for n, s in spectra.items())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("equal_costs", [True, False])
def test_allocation_against_all_there_are(seed: int, equal_costs: bool) -> None:
    rng = np.random.default_rng(seed)
    names = [f"layer {i}" for i in range(4)]
    found = spectra_of({n: sorted(rng.exponential(size=int(rng.integers(1, 6))), reverse=True) for n in names})
    costs = {n: 10 if equal_costs else int(rng.integers(3, 20)) for n in names}
    weights = {n: float(rng.exponential()) for n in names}
    budget = int(rng.integers(sum(costs.values()) * 3))
    ours = allocate(found, costs, budget, weights)
    assert sum(r * costs[n] for n, r in ours.items()) <= budget
    choices = (dict(zip(names, ranks, strict=True)) for ranks in itertools.product(range(6), repeat=4))
    best = max(
        kept(found, c, weights)
        for c in choices
        if sum(r * costs[n] for n, r in c.items()) <= budget and all(r <= found[n].S_R.numel() for n, r in c.items())
    )
    # The dearest item is worth no more than the largest value there is.
    slack = 0 if equal_costs else max(weights[n] * found[n].S_R[0].item() ** 2 for n in names)
    assert best - slack - 1e-12 <= kept(found, ours, weights) <= best + 1e-12
    for n in names:  # nothing that would still fit is left out
        spent = sum(r * costs[m] for m, r in ours.items()) + costs[n]
        assert spent > budget or ours[n] == found[n].S_R.numel()


def test_equal_layers_get_equal_ranks() -> None:
    found = spectra_of({n: [3.0, 2.0, 1.0, 0.5] for n in "abc"})
    assert allocate(found, dict.fromkeys("abc", 7), 3 * 3 * 7) == dict.fromkeys("abc", 3)
    assert allocate(found, dict.fromkeys("abc", 7), 3 * 3 * 7 + 13) == {"a": 4, "b": 3, "c": 3}


def test_a_layer_without_update_gets_nothing() -> None:
    found = spectra_of({"a": [3.0, 2.0, 1e-3], "b": [0.0, 0.0, 0.0], "c": [1.0, 0.0, 0.0]})
    assert allocate(found, dict.fromkeys("abc", 7), 10_000) == {"a": 3, "b": 0, "c": 1}
    assert allocate(found, dict.fromkeys("abc", 7), 10_000, {"a": 0.0, "b": 1.0, "c": 1.0}) == {
        "a": 0,
        "b": 0,
        "c": 1,
    }


def test_size_of_inputs_and_cost_count() -> None:
    found = spectra_of({"a": [2.0, 2.0], "b": [3.0, 3.0]})
    assert allocate(found, {"a": 10, "b": 10}, 20) == {"a": 0, "b": 2}
    assert allocate(found, {"a": 10, "b": 10}, 20, {"a": 3.0, "b": 1.0}) == {"a": 2, "b": 0}
    assert allocate(found, {"a": 4, "b": 10}, 14) == {"a": 2, "b": 0}
    assert allocate(found, {"a": 4, "b": 10}, 14, largest=1) == {"a": 1, "b": 1}


# --- how large inputs are


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classification"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_sizes_of_inputs_are_those_of_the_model_by_itself(family: str, compiled: bool) -> None:
    """Unpacked, with plain hooks; adapters that do something are of no account."""
    trainer = in_bank(family)
    trainer.model.reads_only = False  # there all tokens count
    trainer.start(filled(trainer.bank), (1e-3, 1e-3))
    if compiled:
        compile_blocks(trainer.bank, backend="eager")
    rows = trainer.train[:9]
    ours = trainer.bank.input_sizes(lambda: trainer.measure(rows))
    again = trainer.bank.input_sizes(lambda: trainer.measure(rows))

    model = tiny(family)
    read: dict[str, list[Tensor]] = {name: [] for name in ours}
    for name, into in read.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].flatten()))
    with torch.no_grad():
        for e in rows:
            model(input_ids=torch.tensor(e.input_ids[None]).long())
    expected = {name: torch.cat(xs).square().mean().item() for name, xs in read.items()}
    assert ours == pytest.approx(expected, rel=1e-9)
    assert again == ours
    assert len({round(size, 6) for size in ours.values()}) > 3
