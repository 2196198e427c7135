"""Bases in 4 and in 8 bits: the same products as plain layers with the weights that they stand for.

NF4 needs bitsandbytes, whose kernels work on a CPU too; torch has 8-bit products for CPUs as well. So both run
here as they are. What only a GPU can show is in test_gpu.py.

Shapes: K candidates, T tokens, R rank, D widths.
"""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import rankrace as rr
from commandline import assert_refused, rankrace
from examples import examples
from models import tiny
from rankrace.bank import Bank, check_quantize, quantize
from rankrace.bank.base import fp8, nf4
from rankrace.bank.base.fp8 import Fp8Linear, rounded
from rankrace.bank.targets import find_targets
from rankrace.config import Quantize
from rankrace.errors import RankraceError
from rankrace.methods.peft_lora import wrapped
from rankrace.training.compiled import compile_blocks
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.memory import Meter
from rankrace.training.model import PackedModel, load_model
from rankrace.training.passes import Eager
from tinyfolder import PARITIES, SHORT, SUMS, tiny_bert, tiny_llama, write_rows

CPU = torch.device("cpu")
TIMES = 4
"""Width of the models: 64 divides all of them, as NF4 on a CPU wants it."""
RANKS = (4, 2, 7)
CLOSE = {"nf4": 1e-5, "fp8": 0.02}
"""How far off, relatively, sums in another order may lead: some numbers get their other neighbour in e4m3."""


@pytest.fixture(params=["nf4", "fp8"])
def kind(request: pytest.FixtureRequest) -> Quantize:
    if request.param == "nf4":
        needs_bitsandbytes()
    return request.param


@pytest.fixture
def bitsandbytes() -> Any:
    return needs_bitsandbytes()


def needs_bitsandbytes() -> Any:
    """An optional package; in CI it may not be missing."""
    if os.environ.get("CI") == "true":
        return nf4.package()
    return pytest.importorskip("bitsandbytes")


# --- one layer


def weight_of(layer: nn.Module) -> Tensor:
    """What the layer's bits stand for [O, D]."""
    return layer.weight.float() * layer.scale_O[:, None] if isinstance(layer, Fp8Linear) else nf4.whole(layer)


def back(hat_TD: Tensor, scale_T1: Tensor) -> Tensor:
    return hat_TD.float() * scale_T1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_e4m3(dtype: torch.dtype) -> None:
    """Within half a unit of 3 bits of mantissa; a row's largest exactly; zeros stay, and NaN stays in its row."""
    x_TD = (torch.randn(7, 48) * torch.logspace(-9, 9, 7)[:, None]).to(dtype)
    x_TD[1] = 0
    hat_TD, scale_T1 = rounded(x_TD)
    again = back(hat_TD, scale_T1)
    subnormal = scale_T1 * 2.0**-10
    assert ((again - x_TD).abs() <= x_TD.abs().float() / 16 + subnormal).all()
    largest = x_TD.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(again.gather(1, largest), x_TD.float().gather(1, largest), rtol=1e-6, atol=0)
    assert not again[1].any()
    for bad in (float("nan"), float("inf")):
        x_TD[3, 5] = bad
        spoilt = back(*rounded(x_TD))
        others = [t for t in range(7) if t != 3]
        assert spoilt[3].isnan().any()
        assert torch.equal(spoilt[others], again[others])
    assert torch.equal(back(*rounded(x_TD[others].T.contiguous().T)), again[others])
    assert rounded(x_TD.T.contiguous().T)[0].is_contiguous(), "the products read rows"
    column_D = torch.rand(48)
    torch.testing.assert_close(back(*rounded(x_TD[others], column_D)), back(*rounded(x_TD[others] * column_D)))


@pytest.mark.parametrize("bias", [True, False])
def test_an_8_bit_layer_is_the_product_of_rounded_factors(bias: bool) -> None:
    layer = nn.Linear(48, 32, bias=bias)
    base = fp8.quantized(layer, CPU)
    x = torch.randn(2, 5, 48).requires_grad_()
    y = base(x)
    W_OD = weight_of(base)
    x_hat = back(*rounded(x.detach().view(10, 48)))
    expected = x_hat @ W_OD.T + (layer.bias if bias else 0)
    torch.testing.assert_close(y.view(10, 32), expected.detach(), rtol=1e-5, atol=1e-5)
    assert off(y, layer(x)) < 0.05
    g = torch.randn_like(y)
    y.backward(g)
    g_hat = back(*rounded(g.view(10, 32), base.scale_O))
    assert x.grad is not None
    torch.testing.assert_close(x.grad.view(10, 48), g_hat @ base.weight.float(), rtol=1e-5, atol=1e-6)
    assert off(x.grad, g @ layer.weight) < 0.05


def off(ours: Tensor, expected: Tensor) -> float:
    """Distance, relative to what is expected."""
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


# --- whole models


def base(family: str, kind: Quantize, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny(family, dtype, TIMES)
    quantize(model, kind, CPU)
    return model


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """The same with plain layers of the weights that its bits stand for."""
    for name, layer in list(find_targets(model, "all-linear").items()):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data, plain.bias = weight_of(layer), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    return model


def prepared(
    hf: PreTrainedModel, ranks: tuple[int, ...] = RANKS, *, dropout: float = 0.0, target_modules: Any = "all-linear"
) -> tuple[PackedModel, Callable[..., list[Tensor]]]:
    """A model, and a pass of all its candidates: losses [K] and all gradients."""
    classes = 3 if "classification" in type(hf).__name__.lower() else 0
    bank = Bank(hf, dropout=dropout, target_modules=target_modules)
    model = PackedModel(hf, bank, "classification" if classes else "causal", chunk=5)
    bank.start(ranks, [16.0 / r for r in ranks])
    torch.manual_seed(1)
    for layer in bank.layers.values():
        for k, r in enumerate(ranks):
            torch.manual_seed(layer.index)
            layer.B_KDR.data[k, :, :r].normal_(std=0.02)
    rows = examples(12, seed=2, classes=classes)

    def run(active: slice | None = None) -> list[Tensor]:
        gradients = bank.loaded.gradients.all_KP.zero_()
        with bank.training(2, 1):
            loss_K = Eager(model).run(model.pack(rows, range(6)), active or slice(0, len(ranks)), torch.tensor(0.1))
        return [loss_K, gradients.clone()]

    return model, run


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "bert-classification", "llama-classification"])
@pytest.mark.parametrize("ranks", [(4,), RANKS])
def test_4_bits_are_plain_layers_of_their_weights(bitsandbytes: Any, family: str, ranks: tuple[int, ...]) -> None:
    """Siblings, biases, dropout, K candidates; and the way back keeps no more than that of plain layers."""
    model, run = prepared(base(family, "nf4"), ranks, dropout=0.2)
    plain_model, plain_run = prepared(unpacked(base(family, "nf4")), ranks, dropout=0.2)
    assert any(len(names) > 1 for names in model.bank.siblings)
    for ours, expected in zip(run(), plain_run(), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert kept(model) == kept(plain_model)


def kept(model: PackedModel) -> int:
    """Bytes that a forward leaves for the backward."""
    rows = examples(4, seed=5, classes=3 if model.task == "classification" else 0)
    model.bank.refresh()
    with Meter() as meter:
        loss = model.losses(model.pack(rows, range(4))).loss_KS.sum()
        found = meter.bytes
    del loss
    return found


def test_8_bits_keep_nothing_for_the_way_back() -> None:
    assert kept(prepared(base("llama", "fp8"))[0]) == kept(prepared(tiny("llama", torch.float32, TIMES))[0])


@pytest.mark.parametrize("family", ["llama", "bert-classification"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_bits_are_close_to_all_of_them(kind: Quantize, family: str, dtype: torch.dtype) -> None:
    """Random weights of two layers: losses within 0.05 nats; gradients as far off as 4 and 8 bits are."""
    losses, gradients = prepared(base(family, kind, dtype))[1]()
    expected, exact = prepared(tiny(family, dtype, TIMES))[1]()
    assert 0 < (losses / expected - 1).abs().max() < 0.05
    assert 0.001 < off(gradients, exact) < {"nf4": 0.25, "fp8": 0.1}[kind]


def test_each_candidate_is_as_if_alone(kind: Quantize) -> None:
    """To the last bits of float32, and whatever becomes of the others: rows have scales of their own."""
    model, run = prepared(base("llama", kind))
    losses, gradients = run()
    for k in range(len(RANKS)):
        alone, gradient = run(slice(k, k + 1))
        assert off(alone[0], losses[k]) < CLOSE[kind]
        assert off(gradient[k], gradients[k]) < CLOSE[kind]
    for layer in model.bank.layers.values():
        layer.B_KDR.data[1] = float("nan")
    spoilt, gradient = run()
    assert spoilt[1].isnan()
    for k in (0, 2):
        assert spoilt[k] == losses[k]
        assert torch.equal(gradient[k], gradients[k])


def test_siblings_are_single_layers(kind: Quantize) -> None:
    model, run = prepared(base("llama", kind))
    together = run()
    model.bank.find_siblings(lambda: None)
    for ours, expected in zip(run(), together, strict=True):
        assert off(ours, expected) < CLOSE[kind]


def test_layers_without_an_adapter_pass_gradients_on(kind: Quantize) -> None:
    """Also after they were used without one, for which bitsandbytes would pack weights anew on some CPUs."""
    found = []
    for hf in (base("llama", kind), unpacked(base("llama", kind))):
        model, run = prepared(hf, target_modules=("q_proj", "down_proj"))
        with torch.no_grad(), model.bank.off():
            model.losses(model.pack(examples(4), range(4)))
        found.append(run())
    assert off(found[0][1], found[1][1]) < {"nf4": 1e-5, "fp8": 0.15}[kind]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's, tracing
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiled_blocks(kind: Quantize) -> None:
    for targets in ("all-linear", ("q_proj", "down_proj")):
        torch._dynamo.reset()
        model, run = prepared(base("llama", kind), target_modules=targets)
        expected = run()
        compile_blocks(model.bank, "aot_eager")
        for ours, wanted in zip(run(), expected, strict=True):
            assert off(ours, wanted) < CLOSE[kind]


def test_a_training_follows_that_of_16_bits(kind: Quantize) -> None:
    """Losses of 20 steps."""
    recipe = Recipe(
        epochs=1000, max_steps=20, batch_size=8, micro_tokens=200, schedule="constant", warmup=0.0, weight_decay=0.0,
        clip=1.0, seed=0,
    )  # fmt: skip
    curves = []
    for hf in (base("llama", kind, torch.bfloat16), tiny("llama", torch.bfloat16, TIMES)):
        model, _ = prepared(hf, (4, 8))
        trainer = Trainer(model, examples(16), recipe)
        trainer.start(model.bank.candidates, [3e-3, 3e-3])
        curves.append(torch.stack([loss_K.clone() for loss_K in trainer.run(20)]))
    ours, expected = curves
    assert (expected[0] - expected[-1] > 0.2).all()
    assert (ours - expected).abs().max() < 0.15


# --- how a base gets there


def test_one_layer_after_another(kind: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plain layers that were packed already none is left; memory never holds two models."""
    module = {"nf4": nf4, "fp8": fp8}[kind]
    make, gone = module.quantized, []

    def watched(layer: nn.Linear, device: torch.device) -> nn.Module:
        assert all(weight() is None for weight in gone[:-1])
        gone.append(weakref.ref(layer.weight))
        return make(layer, device)

    monkeypatch.setattr(module, "quantized", watched)
    model = base("llama", kind)
    assert len(gone) == 14
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear


@pytest.mark.parametrize("family", ["llama", "bert-classification"])
def test_parameters_are_counted_whole(kind: Quantize, family: str) -> None:
    expected = sum(p.numel() for p in tiny(family, times=TIMES).parameters())
    for targets in ("all-linear", ("q_proj", "query")[family != "llama"]):
        bank = Bank(base(family, kind), target_modules=targets)
        assert bank.base_parameters == expected
        bank.start((2, 4), (1.0, 1.0))
        assert bank.base_parameters == expected


def test_bits_are_fewer(bitsandbytes: Any) -> None:
    layer = nn.Linear(512, 256)
    packed = nf4.quantized(layer, CPU)
    assert off(nf4.whole(packed), layer.weight) < 0.1
    state = packed.weight.quant_state
    bits = 8 * (packed.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes) / layer.weight.numel()
    assert 4.12 < bits < 4.14
    in_8 = fp8.quantized(layer, CPU)
    assert in_8.weight.nbytes + in_8.transposed_DO.nbytes == 2 * layer.weight.numel()


@pytest.mark.parametrize("strategy", ["shrink", "grid"])
def test_a_run(kind: Quantize, strategy: str, smollm2: Path, tmp_path: Path) -> None:
    """From the command line to an adapter for the original base, its record, and a merged 16-bit model."""
    model, data = tiny_llama(tmp_path / "model", smollm2, times=2), write_rows(tmp_path / "rows.jsonl", SUMS)
    common = ("--model", model, "--data", data, "--device", "cpu", *SHORT, "--strategy", strategy)
    ran = rankrace("train", *common, "--out", tmp_path / "run", "--quantize", kind)
    assert ran.code == 0, ran.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["quantize"] == kind
    assert any(kind.upper() in note for note in result["notes"])
    plain = rankrace("train", *common, "--out", tmp_path / "plain")
    assert plain.code == 0, plain.err
    other = json.loads((tmp_path / "plain" / "result.json").read_text())
    assert other["quantize"] == "none"
    assert result["base_parameters"] == other["base_parameters"]
    assert 0 < abs(result["loss"]["base"] - other["loss"]["base"]) < 0.1 * other["loss"]["base"]
    assert result["loss"]["final"] < result["loss"]["base"]
    described = [
        json.loads((tmp_path / run / "adapter" / "adapter_config.json").read_text()) for run in ("run", "plain")
    ]
    assert described[0]["base_model_name_or_path"] == described[1]["base_model_name_or_path"] == str(model)
    assert sorted(described[0]["target_modules"]) == sorted(described[1]["target_modules"])
    assert f"quantize: {kind}" in (tmp_path / "run" / "config.yaml").read_text()
    merged = rankrace("merge", tmp_path / "run" / "adapter", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = rankrace("train", *common, "--out", tmp_path / "run", "--resume", "--quantize", "none")
    assert_refused(again, "quantize")


def test_a_classifier(kind: Quantize, minilm: Path, tmp_path: Path) -> None:
    model, data = tiny_bert(tmp_path / "model", minilm, times=2), write_rows(tmp_path / "rows.jsonl", PARITIES)
    ran = rankrace("train", "--model", model, "--data", data, "--device", "cpu", *SHORT, "--out", tmp_path / "run",
                   "--quantize", kind)  # fmt: skip
    assert ran.code == 0, ran.err


def test_a_plan(kind: Quantize, smollm2: Path, tmp_path: Path) -> None:
    model, data = tiny_llama(tmp_path / "model", smollm2, times=2), write_rows(tmp_path / "rows.jsonl", SUMS)
    ran = rankrace("plan", "--model", model, "--data", data, "--device", "cpu", *SHORT, "--quantize", kind)
    assert ran.code == 0, ran.err
    assert f"layers in {kind.upper()}" in ran.out
    assert "yes" in ran.out


def test_a_real_model_is_taken(kind: Quantize, smollm2: Path, tmp_path: Path) -> None:
    """Thirty blocks add up the roundings of 8 bits: packed rows and single ones then differ by more than tiny models
    do, and that is no fault of packing."""
    data = write_rows(tmp_path / "rows.jsonl", SUMS)
    ran = rankrace("plan", "--model", smollm2, "--data", data, "--device", "cpu", "--dtype", "float32",
                   "--quantize", kind)  # fmt: skip
    assert ran.code == 0, ran.err


def test_a_loaded_4_bit_model_is_searched(bitsandbytes: Any, smollm2: Path, tmp_path: Path) -> None:
    """As Transformers' own users have one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = tiny_llama(tmp_path / "model", smollm2, times=2)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=four_bits, device_map={"": "cpu"}
    )
    layer = model.model.layers[0].mlp.down_proj
    own = load_model(str(folder), "causal", None, device=CPU, dtype=torch.float32, seed=0, quantize_to="nf4")
    assert torch.equal(nf4.whole(layer), nf4.whole(own.model.layers[0].mlp.down_proj))
    options = {"ranks": (2, 4), "max_steps": 6, "batch_size": 8}
    chosen = rr.search(model, AutoTokenizer.from_pretrained(folder), SUMS, **options)
    assert chosen.rank in range(1, 5)
    assert model.model.layers[0].mlp.down_proj is layer
    with pytest.raises(RankraceError, match="no use for the option 'quantize'"):
        rr.search(model, AutoTokenizer.from_pretrained(folder), SUMS, quantize="nf4", **options)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RankraceError, match="layout"):
        rr.search(model, AutoTokenizer.from_pretrained(folder), SUMS, **options)


def test_qlora_gets_pefts_own_4_bit_layers(bitsandbytes: Any) -> None:
    """What QLora.load does where there is a GPU."""
    from peft import LoraConfig
    from peft.tuners.lora import bnb as peft_bnb

    model = base("llama", "nf4")
    model.is_loaded_in_4bit = True
    peft_model = wrapped(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), seed=0)
    layers = [m for m in peft_model.modules() if isinstance(m, peft_bnb.Linear4bit)]
    assert len(layers) == 14
    peft_model(input_ids=torch.arange(5)[None]).logits.sum().backward()
    assert all(m.lora_B["default"].weight.grad.any() for m in layers)


# --- what cannot be


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantize("none", torch.device("meta"), torch.float64)
    for kind in ("nf4", "fp8"):
        with pytest.raises(RankraceError, match="float64"):
            check_quantize(kind, CPU, torch.float64)
    with pytest.raises(RankraceError, match="no 8-bit products on meta"):
        check_quantize("fp8", torch.device("meta"), torch.bfloat16)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old One")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RankraceError, match="Old One has no 8-bit products"):
        check_quantize("fp8", cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_quantize("fp8", cuda, torch.bfloat16)
    with pytest.raises(RankraceError, match="do not come out in float32"):
        check_quantize("fp8", cuda, torch.float32)
    with pytest.raises(RankraceError, match="Conv1D"):
        quantize(tiny("gpt2", torch.float32), "fp8", CPU)
    with pytest.raises(RankraceError, match="multiples of 16"):
        fp8.quantized(nn.Linear(24, 32), CPU)
    with pytest.raises(RankraceError, match="96 inputs"):
        nf4.quantized(nn.Linear(96, 64), CPU)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said before anything is loaded or written."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    ran = rankrace("train", "--model", tmp_path / "none", "--data", tmp_path / "none.jsonl", "--device", "cpu",
                   "--out", tmp_path / "run", "--quantize", "nf4")  # fmt: skip
    assert_refused(ran, "bitsandbytes", "rankrace[quant]", within=tmp_path)


def test_a_device_that_the_package_does_not_know(bitsandbytes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no library was found\nand more")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    with pytest.raises(RankraceError, match="cannot pack weights on cpu: no library was found"):
        check_quantize("nf4", CPU, torch.float32)


SAYS = """
import logging, {module}
from_there = logging.getLogger("bitsandbytes.backends.cpu.ops").warning
from_there("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "none")
from_there("something is wrong")
import peft
"""


@pytest.mark.parametrize("module", ["rankrace", "benchmarks"])
def test_what_the_package_says_of_itself_when_peft_imports_it(module: str) -> None:
    """Nothing of a kernel that is not used here, with or without the command line; all else."""
    ran = subprocess.run([sys.executable, "-c", SAYS.format(module=module)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "something is wrong\n")
