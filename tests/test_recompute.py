"""Blocks that are run again for their gradient: the same numbers, to the last digits, and less memory."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from commandline import rankrace
from examples import examples
from models import CAUSAL, CLASSIFYING, tiny
from onepass import prepared
from rankrace.bank import Bank
from rankrace.choose import lent
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import EncodedSet
from rankrace.plan import probed
from rankrace.training.compiled import blocks, compile_blocks
from rankrace.training.memory import Meter, probe
from rankrace.training.model import PackedModel
from rankrace.training.recompute import recompute_blocks, recomputing
from tinyfolder import SHORT, SUMS, tiny_llama, write_rows

# torch's own, as it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

CASES = [(range(4), slice(0, 3)), (range(4, 9), slice(1, 3)), (range(12), slice(0, 1)), (range(3), slice(2, 3))]


def same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
def test_losses_and_gradients_are_the_same(family: str, dropout: float) -> None:
    model, run = prepared(family, dropout)
    expected = [run(*case) for case in CASES]
    with recomputing(model.bank):
        for case, wanted in zip(CASES, expected, strict=True):
            same(run(*case), wanted)
    assert not any("forward" in vars(block) for block in blocks(model.bank))
    same(run(*CASES[0]), expected[0])


def test_compiled_blocks_are_run_again_too() -> None:
    for dropout in (0.0, 0.3):
        model, run = prepared("llama", dropout)
        expected = [run(*case) for case in CASES]
        compile_blocks(model.bank, "eager")
        torch._dynamo.reset()
        recompute_blocks(model.bank)
        for case, wanted in zip(CASES, expected, strict=True):
            same(run(*case), wanted)


def test_blocks_are_compiled_once_for_all_sizes() -> None:
    model, run = prepared("llama")
    compile_blocks(model.bank, "eager")
    torch._dynamo.reset()
    recompute_blocks(model.bank)
    run(*CASES[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for case in CASES:
            run(*case)


def test_siblings_that_stand_alone() -> None:
    model, run = prepared("llama")
    expected = run(*CASES[0])
    model.bank.find_siblings(lambda: None)
    with recomputing(model.bank):
        same(run(*CASES[0]), expected)


class Own(torch.nn.Linear):
    """Stands for a quantised layer, which brings its own way back."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def test_bases_with_a_graph_of_their_own() -> None:
    model, run = prepared("llama")
    for layer in model.bank.layers.values():
        layer.base.__class__ = Own
    with Meter() as plain:
        expected = run(*CASES[0])
    with recomputing(model.bank), Meter() as again:
        same(run(*CASES[0]), expected)
    assert again.peak < 0.75 * plain.peak


def test_measuring_and_the_plain_base_are_untouched() -> None:
    model, _ = prepared("llama")
    row = model.pack(examples(12), range(5))

    def measured() -> list[Tensor]:
        with torch.no_grad():
            ours = model.losses(row).loss_KS
            with model.bank.off():
                return [ours, model.losses(row).loss_KS]

    expected = measured()
    with recomputing(model.bank):
        same(measured(), expected)


def test_a_lent_model_comes_back() -> None:
    hf = tiny("llama")
    with lent(hf):
        bank = Bank(hf)
        PackedModel(hf, bank, "causal")
        compile_blocks(bank, "eager")
        recompute_blocks(bank)
    assert not any("forward" in vars(module) for module in hf.modules())


def test_only_the_blocks_inputs_are_kept() -> None:
    """And the probe, on which the planner relies, sees so."""
    model, run = prepared("llama")
    with Meter() as plain:
        run(*CASES[2])
    cost = probe(model, examples(12))
    with recomputing(model.bank):
        with Meter() as again:
            run(*CASES[2])
        less = probe(model, examples(12))
    assert again.peak < 0.75 * plain.peak, "two blocks: one is there in full, of the other its input"
    assert less.kept.each(1.0) < 0.3 * cost.kept.each(1.0)
    assert less.backward.each(1.0) < 0.85 * cost.backward.each(1.0)
    assert less.measuring.token == pytest.approx(cost.measuring.token, rel=0.1)


def test_a_run_by_the_command_line_is_the_same(smollm2: Path, tmp_path: Path) -> None:
    """To the digits of float64; and it may be resumed the other way."""
    model, data = tiny_llama(tmp_path / "model", smollm2), write_rows(tmp_path / "sums.jsonl", SUMS)
    found = {}
    for recompute in ("off", "on", "auto"):
        out = tmp_path / recompute
        ran = rankrace("train", "--model", model, "--data", data, "--out", out, "--device", "cpu", "--dropout", 0.1,
                       "--dtype", "float64", "--recompute", recompute, *SHORT)  # fmt: skip
        assert ran.code == 0, ran.err
        found[recompute] = json.loads((out / "result.json").read_text())
        config = (out / "config.yaml").read_text()
        assert f"recompute: '{'on' if recompute == 'on' else 'off'}'" in config
    for recompute in ("on", "auto"):
        assert found[recompute]["loss"]["final"] == pytest.approx(found["off"]["loss"]["final"], abs=1e-9)
        assert found[recompute]["rank"] == found["off"]["rank"]
    ran = rankrace("plan", "--model", model, "--data", data, "--device", "cpu", "--recompute", "on", *SHORT)
    assert "recompute on" in ran.out


def test_auto_recomputes_where_the_longest_example_does_not_fit() -> None:
    model, _ = prepared("llama")
    rows = examples(12)
    side = EncodedSet(examples=rows, truncated=0, dropped=0, supervised_tokens=1)
    data = Data(train=side, validation=side, labels=None, format="", how_split="", sha256="", notes=[])
    longest = max(map(len, rows))

    def config(recompute: str) -> RunConfig:
        return RunConfig(model="m", data="d", recompute=recompute)  # type: ignore[arg-type]

    _, cost = probed(config("off"), data, model, 0.0)
    ample = (
        2.0 * cost.slack * (cost.kept.at(model.pack(rows, [0]).size) + longest * cost.kept.token + cost.target * 9)
    )
    recomputed, _ = probed(config("auto"), data, model, ample)
    assert not recomputed
    recomputed, less = probed(config("auto"), data, model, 0.0)
    assert recomputed
    assert less.kept.token < 0.3 * cost.kept.token
    assert not any("forward" in vars(block) for block in blocks(model.bank))
    assert probed(config("on"), data, model, ample)[0]
    assert not probed(config("off"), data, model, 0.0)[0]


def test_auto_recomputes_where_not_even_the_probe_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = prepared("llama")
    rows = examples(12)
    side = EncodedSet(examples=rows, truncated=0, dropped=0, supervised_tokens=1)
    data = Data(train=side, validation=side, labels=None, format="", how_split="", sha256="", notes=[])
    run = PackedModel.run

    def tight(model: PackedModel, *args: object) -> Tensor:
        if torch.is_grad_enabled() and "forward" not in vars(blocks(model.bank)[0]):
            raise torch.OutOfMemoryError("planted")
        return run(model, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PackedModel, "run", tight)
    assert probed(RunConfig(model="m", data="d"), data, model, 1e12)[0]
    with pytest.raises(torch.OutOfMemoryError):
        probed(RunConfig(model="m", data="d", recompute="off"), data, model, 1e12)
