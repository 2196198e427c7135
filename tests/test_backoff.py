"""Out of memory half-way: the step is taken again in smaller passes, to the same result. Float64, on a CPU."""

import json
import os
import signal
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commandline import rankrace
from examples import examples
from models import CAUSAL, CLASSIFYING, tiny
from rankrace import RankraceError, run
from rankrace.bank import Bank
from rankrace.data.pack import Packed
from rankrace.methods.parameters import Parameters
from rankrace.result import Result
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.memory import out_of_memory
from rankrace.training.model import PackedModel, TokenLosses
from rankrace.training.passes import Eager
from tinyfolder import SHORT, SUMS, tiny_llama, write_rows

RANKS = (4, 2, 8)
RECIPE = Recipe(
    epochs=3, max_steps=None, batch_size=8, micro_tokens=10_000, schedule="linear", warmup=0.1, weight_decay=0.1,
    clip=0.5, seed=0,
)  # fmt: skip
ROWS, HELD = examples(24, seed=3), examples(9, seed=4)


def trainer_of(family: str = "llama", micro_tokens: int = 10_000, dropout: float = 0.0) -> Trainer:
    """With non-zero factors, so that everything has a gradient."""
    classes = 3 if family in CLASSIFYING else 0
    hf = tiny(family)
    bank = Bank(hf, dropout=dropout)
    model = PackedModel(hf, bank, "classification" if classes else "causal", chunk=5)
    rows = examples(24, seed=3, classes=classes) if classes else ROWS
    trainer = Trainer(model, rows, replace(RECIPE, micro_tokens=micro_tokens))
    bank.start(RANKS, [8.0 / r for r in RANKS])
    torch.manual_seed(1)
    for layer in bank.layers.values():
        for k, r in enumerate(RANKS):
            layer.B_KDR.data[k, :, :r].normal_(std=0.1)
    trainer.start(bank.candidates, [1e-2, 2e-2, 5e-3])
    return trainer


class Small:
    """A device on which passes of more than so many tokens fail: in the forward, or when the gradients are there."""

    def __init__(self, patch: pytest.MonkeyPatch, tokens: int, *, late: bool = False) -> None:
        self.tokens, self.late = tokens, late
        self.passes: list[tuple[int, int]] = []
        """Tokens and candidates of each that was begun."""
        run, losses = Eager.run, PackedModel.losses

        def too_large(row: Packed, K: int) -> bool:
            return row.size.tokens * K > self.tokens

        def limited_losses(model: PackedModel, row: Packed) -> TokenLosses:
            self.passes.append((row.size.tokens, model.bank.running))
            found = losses(model, row)
            if too_large(row, model.bank.running) and not (self.late and torch.is_grad_enabled()):
                raise torch.OutOfMemoryError("planted")
            return found

        def limited_run(eager: Eager, row: Packed, active: slice, share: Tensor) -> Tensor:
            loss_K = run(eager, row, active, share)
            if too_large(row, active.stop - active.start):
                raise torch.OutOfMemoryError("planted")
            return loss_K

        patch.setattr(PackedModel, "losses", limited_losses)
        patch.setattr(Eager, "run", limited_run)


def trained(trainer: Trainer, until: int | None = None) -> tuple[Tensor, Tensor]:
    """All losses and the values at the end."""
    losses = list(trainer.run(trainer.total if until is None else until))
    return torch.stack(losses), trainer.bank.values.all_KP.clone()


def close(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert (ours[0] - expected[0]).abs().max() < 1e-9
    assert (ours[1] - expected[1]).abs().max() < 1e-9


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
def test_the_result_is_that_of_an_undisturbed_run(family: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = trainer_of(family)
    expected = trained(undisturbed)
    small = Small(monkeypatch, 45, late=late)
    disturbed = trainer_of(family)
    close(trained(disturbed), expected)
    assert disturbed.recipe.micro_tokens <= 45
    assert disturbed.tokens == undisturbed.tokens
    assert max(tokens * K for tokens, K in small.passes[-20:]) <= 45
    assert len(disturbed.notes) >= 2


def test_candidates_side_by_side_become_fewer_first(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Small(monkeypatch, 120)
    trainer = trainer_of()
    tokens = sum(trainer.lengths[i] for i in trainer.batch(0).micros[0])
    assert 60 < tokens <= 120
    trained(trainer, until=1)
    assert small.passes == [(tokens, 3), (tokens, 1), (tokens, 1), (tokens, 1)]
    assert trainer.notes == [
        f"Out of memory in a pass of {3 * tokens} tokens ({tokens} × 3) at step 1: taken again, from now on with "
        f"at most {3 * tokens // 2} tokens a pass."
    ]
    assert len(trainer.batch(1).micros) == 1


def test_memory_that_runs_out_in_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a later step and a later epoch: moments, schedule and the order of examples go on."""
    expected = trained(trainer_of())
    trainer = trainer_of()
    first = trained(trainer, until=4)
    Small(monkeypatch, 45, late=True)
    rest = trained(trainer)
    close((torch.cat([first[0], rest[0]]), rest[1]), expected)
    assert trainer.step == trainer.total


def test_a_pass_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the passes before it are taken back."""
    expected = trained(trainer_of(micro_tokens=40), until=1)
    run, calls = Eager.run, []

    def third_fails(eager: Eager, row: Packed, active: slice, share: Tensor) -> Tensor:
        calls.append(row.size.tokens)
        loss_K = run(eager, row, active, share)
        if len(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return loss_K

    monkeypatch.setattr(Eager, "run", third_fails)
    trainer = trainer_of(micro_tokens=40)
    close(trained(trainer, until=1), expected)
    assert len(trainer.notes) == 1


def test_measuring_backs_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, base = trainer_of().measure(HELD), trainer_of()
    with base.bank.off():
        expected_base = base.measure(HELD)
    Small(monkeypatch, 45)
    trainer = trainer_of()
    measured = trainer.measure(HELD)
    with trainer.bank.off():
        measured_base = trainer.measure(HELD)
    for ours, plain in ((measured, expected), (measured_base, expected_base)):
        assert np.abs(ours.loss_KN - plain.loss_KN).max() < 1e-9
        assert (ours.tokens_N == plain.tokens_N).all()
        assert (ours.correct_KN == plain.correct_KN).all()
    assert trainer.recipe.micro_tokens <= 45


def test_longer_passes_that_measure_are_the_first_to_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were never needed; what trained by then fits still."""
    expected = trainer_of().measure(HELD)
    trainer = trainer_of(micro_tokens=60)
    trainer.recipe = replace(trainer.recipe, longer=4.0)
    small = Small(monkeypatch, 100)
    measured = trainer.measure(HELD)
    first, *others = (tokens * K for tokens, K in small.passes)
    assert 100 < first <= 240
    assert max(others) <= 60
    assert np.abs(measured.loss_KN - expected.loss_KN).max() < 1e-9
    assert (trainer.recipe.micro_tokens, trainer.recipe.measuring_tokens) == (60, 60)
    assert trainer.notes[0].endswith("taken again, from now on with at most 60 tokens a pass.")
    resumed = trainer_of(micro_tokens=60)
    resumed.recipe = replace(resumed.recipe, longer=4.0)
    resumed.restore(trainer.tensors(), trainer.state())
    assert resumed.recipe.measuring_tokens == 60, "they would fail again"


def test_a_pass_that_trains_takes_longer_ones_that_measure_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of()
    trainer.recipe = replace(trainer.recipe, longer=4.0)
    Small(monkeypatch, 45)
    trained(trainer, until=1)
    assert trainer.recipe.measuring_tokens == trainer.recipe.micro_tokens < 60


def test_other_methods_back_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Trainer:
        hf = tiny("llama")
        trainer = Trainer(PackedModel(hf, Parameters(hf, dict(hf.named_parameters())), "causal"), ROWS, RECIPE)
        trainer.begin([1e-3])
        return trainer

    expected = trained(full(), until=3)
    Small(monkeypatch, 45, late=True)
    close(trained(full(), until=3), expected)


def test_an_example_that_does_not_fit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Small(monkeypatch, 15)
    trainer = trainer_of()
    longest = max(trainer.lengths[i] for row in trainer.batch(0).micros for i in row)
    assert longest > 15
    before = trainer.bank.values.all_KP.clone()
    with pytest.raises(RankraceError, match=f"an example of {longest} tokens does not fit") as caught:
        trained(trainer)
    assert "--max-length" in caught.value.fix
    assert torch.equal(trainer.bank.values.all_KP, before)


@pytest.mark.parametrize("method", ["take_step", "measure"])
def test_other_errors_are_not_taken_for_it(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: PackedModel, row: Packed) -> TokenLosses:
        raise RuntimeError("something else")

    trainer = trainer_of()
    monkeypatch.setattr(PackedModel, "losses", broken)
    work: dict[str, Callable[[], object]] = {
        "take_step": lambda: trainer.take_step(trainer.batch(0)),
        "measure": lambda: trainer.measure(HELD),
    }
    with pytest.raises(RuntimeError, match="something else"):
        work[method]()
    assert trainer.notes == []


def test_out_of_memory_is_told_by_type_words_and_cause() -> None:
    def with_context(inner: Exception) -> Exception:
        try:
            try:
                raise inner
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as error:
            return error

    yes: Sequence[Exception] = (
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
        with_context(torch.OutOfMemoryError("CUDA out of memory.")),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    )
    assert all(map(out_of_memory, yes))
    assert not out_of_memory(RuntimeError("size mismatch"))
    assert not out_of_memory(with_context(ValueError("no")))


def test_what_the_failed_pass_made_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's own frames would hold it."""
    alive: list[int] = []
    losses, refs = PackedModel.losses, []

    def watched(model: PackedModel, row: Packed) -> TokenLosses:
        alive.append(sum(ref() is not None for ref in refs))
        found = losses(model, row)
        refs.append(weakref.ref(found.loss_KS))
        if len(refs) == 1:
            raise torch.OutOfMemoryError("planted")
        return found

    monkeypatch.setattr(PackedModel, "losses", watched)
    trained(trainer_of(), until=1)
    assert alive[1] == 0


def test_what_happened_before_a_stop_stands_in_the_record(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny_llama(tmp_path / "model", smollm2), write_rows(tmp_path / "sums.jsonl", SUMS)
    out = tmp_path / "out"
    given = ("train", "--model", model, "--data", data, *SHORT, "--save-every", 3, "--out", out)
    save = run.save_checkpoint

    def saved_and_interrupted(*arguments: Any) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return save(*arguments)

    with monkeypatch.context() as patch:
        Small(patch, 30)
        patch.setattr(run, "save_checkpoint", saved_and_interrupted)
        stopped = rankrace(*given)
    assert stopped.code == 130, stopped.err
    assert "Out of memory in a pass of" in stopped.err
    ended = rankrace(*given, "--resume")
    assert ended.code == 0, ended.err
    notes = Result.read(out / "result.json").notes
    assert sum(note.startswith("Out of memory in a pass of") for note in notes) >= 1
    assert len(notes) == len(set(notes))
    assert "Out of memory" not in ended.err, "it was said when it happened"


def test_a_checkpoint_brings_the_notes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this life come after, and none twice; checkpoints of earlier versions have none."""
    with monkeypatch.context() as patch:
        Small(patch, 45)
        trainer = trainer_of()
        trained(trainer, until=2)
    assert trainer.notes
    state = json.loads(json.dumps(trainer.state()))
    again = trainer_of()
    again.notes = [trainer.notes[0], "of this life"]
    again.restore(trainer.tensors(), state)
    assert again.notes == [*trainer.notes, "of this life"]
    assert again.step == 2
    older = trainer_of()
    older.restore(trainer.tensors(), {name: state[name] for name in ("step", "tokens", "seconds")})
    assert (older.step, older.notes) == (2, [])


def test_a_resumed_training_keeps_to_the_passes_it_was_left_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that ran out once runs out again; and with dropout, which is drawn for each pass, passes that are cut
    otherwise would end elsewhere."""
    with monkeypatch.context() as patch:
        Small(patch, 45)
        trainer = trainer_of(dropout=0.3)
        trained(trainer, until=2)
    assert trainer.backed_off == trainer.recipe.micro_tokens < trainer_of().recipe.micro_tokens
    candidates = trainer.bank.candidates.keep(range(len(trainer.bank.candidates.ranks)))
    tensors = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    state = json.loads(json.dumps(trainer.state()))
    _, ended = trained(trainer)
    again = trainer_of(dropout=0.3)
    again.start(candidates, trainer.lr_K)
    again.restore(tensors, state)
    assert again.recipe.micro_tokens == again.backed_off == trainer.backed_off
    assert (trained(again)[1] - ended).abs().max() < 1e-9
    assert again.state()["backed_off"] == state["backed_off"], "and so will the next"
