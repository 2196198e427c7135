"""K candidates in one bank are K PEFT models trained alone."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples import examples
from models import CAUSAL, CLASSIFYING, tiny
from rankrace.bank import Bank, Candidates, adapter_of, save_adapter
from rankrace.bank.dropout import DropoutKeys, dropped
from rankrace.errors import RankraceError
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.model import PackedModel

RANKS = (2, 3, 8, 12)
ALPHA = 16.0
STEPS = 20
LRS = (3e-3, 1e-3, 2e-3, 5e-4)
RECIPE = Recipe(
    epochs=100, max_steps=STEPS, batch_size=4, micro_tokens=10_000, schedule="linear", warmup=0.1,
    weight_decay=0.1, clip=0.05, seed=7,
)  # fmt: skip


def in_bank(family: str, ranks: tuple[int, ...] = RANKS, *, dropout: float = 0.0, recipe: Recipe = RECIPE) -> Trainer:
    model = tiny(family)
    task = "classification" if family in CLASSIFYING else "causal"
    bank = Bank(model, seed=3, dropout=dropout)
    train = examples(32, classes=3 if task == "classification" else 0)
    trainer = Trainer(PackedModel(model, bank, task, chunk=7), train, recipe)
    bank.start(ranks, [ALPHA / r for r in ranks])
    trainer.start(bank.candidates, [LRS[RANKS.index(r)] for r in ranks])
    return trainer


class SameDropout(nn.Module):
    """The bank's dropout of a layer, in the place of PEFT's."""

    def __init__(self, index: int, keys: DropoutKeys, p: float) -> None:
        super().__init__()
        self.index, self.keys, self.p = index, keys, p

    def forward(self, x: Tensor) -> Tensor:
        return dropped(x, self.keys.of(self.index), self.p)


def alone(
    family: str, rank: int, lr: float, *, dropout: float = 0.0, recipe: Recipe = RECIPE
) -> tuple[list[float], PeftModel]:
    """One PEFT model, plain padding-free loop over single examples, torch's AdamW and clipping."""
    reference = in_bank(family, (rank,), recipe=recipe)  # only for its initial factors and names
    # Siblings share a mask: that of the first of them.
    index = {n: reference.bank.layers[names[0]].index for names in reference.bank.siblings for n in names}
    layers = {n: (A[0, :rank].clone(), index[n]) for n, (A, _) in reference.bank.candidates.factors.items()}
    classes = family in CLASSIFYING
    peft_model = get_peft_model(
        tiny(family),
        LoraConfig(
            r=rank,
            lora_alpha=ALPHA,
            target_modules=list(layers),
            fan_in_fan_out=family == "gpt2",
            task_type="SEQ_CLS" if classes else "CAUSAL_LM",
        ),
    )
    keys = DropoutKeys(3, len(layers), torch.device("cpu"))
    for name, (A, index) in layers.items():
        layer: Any = peft_model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = A
        layer.lora_A.double(), layer.lora_B.double()
        if dropout:
            layer.lora_dropout["default"] = SameDropout(index, keys, dropout)
    peft_model.double()
    return plain_steps(peft_model, reference, lr, keys=keys), peft_model


def plain_steps(peft_model: PeftModel, reference: Trainer, lr: float, keys: DropoutKeys | None = None) -> list[float]:
    """Trains it as the trainer would, on the same batches; losses of each step."""
    recipe, classes = reference.recipe, reference.model.task == "classification"
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=recipe.weight_decay)
    losses = []
    for step in range(STEPS):
        batch = [i for row in reference.batch(step).micros for i in row]
        if keys is not None:
            keys.renew(step, 0)
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for i in batch:
            e = reference.train[i]
            logits = peft_model(input_ids=torch.tensor(e.input_ids[None]).long()).logits
            if classes:
                total = total + cross_entropy(logits, torch.tensor([e.label]), reduction="sum")
                targets += 1
            else:
                predicted = torch.tensor(e.supervised[1:])
                answer = torch.tensor(e.input_ids[1:]).long()[predicted]
                total = total + cross_entropy(logits[0, :-1][predicted], answer, reduction="sum")
                targets += int(predicted.sum())
        loss = total / targets
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * reference.schedule.at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_factors(trainer: Trainer, k: int, peft_model: PeftModel) -> None:
    adapter = adapter_of(trainer.bank, k)
    for name, (A, B) in adapter.factors.items():
        layer: Any = peft_model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(A, layer.lora_A["default"].weight, rtol=0, atol=1e-9)
        torch.testing.assert_close(B, layer.lora_B["default"].weight, rtol=0, atol=1e-9)
    for head, parameters in adapter.heads.items():
        module: Any = peft_model.get_submodule(f"base_model.model.{head}.modules_to_save.default")
        for name, value in parameters.items():
            torch.testing.assert_close(value, module.get_parameter(name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
def test_bank_is_k_peft_models(family: str) -> None:
    """Losses and factors over 20 steps, with per-candidate clipping (it binds) and weight decay."""
    trainer = in_bank(family)
    ours = torch.stack(list(trainer.run(STEPS)))
    for k, (rank, lr) in enumerate(zip(RANKS, LRS, strict=True)):
        losses, peft_model = alone(family, rank, lr)
        torch.testing.assert_close(ours[:, k], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-9)
        same_factors(trainer, k, peft_model)


def test_dropout_is_that_of_k_peft_models() -> None:
    """One example a step, so that PEFT sees the same row as the bank."""
    recipe = replace(RECIPE, batch_size=1)
    trainer = in_bank("llama", dropout=0.3, recipe=recipe)
    trainer.model.reads_only = False  # PEFT draws for all tokens in the last block, too
    ours = torch.stack(list(trainer.run(STEPS)))
    plain = torch.stack(list(in_bank("llama", recipe=recipe).run(STEPS)))
    assert (ours - plain).abs().max() > 1e-4, "dropout had no effect"
    losses, peft_model = alone("llama", RANKS[1], LRS[1], dropout=0.3, recipe=recipe)
    torch.testing.assert_close(ours[:, 1], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-9)
    same_factors(trainer, 1, peft_model)


@pytest.mark.parametrize("family", ["llama", "bert-classification"])
def test_dropping_a_candidate_leaves_the_others_on_their_way(family: str) -> None:
    """The winner's trajectory is that of training it alone."""
    trainer = in_bank(family)
    losses = [loss[1].item() for loss in trainer.run(7)]
    trainer.keep([1, 3])
    losses += [loss[0].item() for loss in trainer.run(12)]
    trainer.keep([0])
    losses += [loss[0].item() for loss in trainer.run(STEPS)]
    expected, peft_model = alone(family, RANKS[1], LRS[1])
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-9)
    same_factors(trainer, 0, peft_model)


def test_nan_in_one_candidate_changes_no_bit_of_the_others() -> None:
    for family in ("llama", "bert-classification"):
        clean, sick = in_bank(family), in_bank(family)
        next(iter(sick.bank.layers.values())).A_KRD.data[2, 0, 0] = float("nan")
        ours, theirs = torch.stack(list(clean.run(6))), torch.stack(list(sick.run(6)))
        assert theirs[:, 2].isnan().all()
        well = [0, 1, 3]
        assert torch.equal(ours[:, well], theirs[:, well])
        for (A, B), (a, b) in zip(
            clean.bank.candidates.factors.values(), sick.bank.candidates.factors.values(), strict=True
        ):
            assert torch.equal(A[well], a[well])
            assert torch.equal(B[well], b[well])


def test_padding_stays_zero_and_small_ranks_are_the_first_rows_of_large_ones() -> None:
    trainer = in_bank("llama")
    first = trainer.bank.candidates.factors["model.layers.0.mlp.up_proj"][0].clone()
    for small, large in ((0, 1), (1, 2), (2, 3)):
        r = RANKS[small]
        assert torch.equal(first[small, :r], first[large, :r])
    list(trainer.run(5))
    for A, B in trainer.bank.candidates.factors.values():
        for k, r in enumerate(RANKS):
            assert not A[k, r:].any()
            assert not B[k, :, r:].any()
            assert B[k, :, :r].any()


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_export_loads_in_peft_with_the_same_logits(family: str, rank: int, tmp_path: Path) -> None:
    """float64 throughout: the exported model's losses are the bank's to 1e-9."""
    model = tiny(family)
    task = "classification" if family in CLASSIFYING else "causal"
    bank = Bank(model, seed=1)
    rows = examples(6, classes=3 if task == "classification" else 0)
    packed_model = PackedModel(model, bank, task)
    trainer = Trainer(packed_model, rows, replace(RECIPE, clip=1.0))
    bank.start((rank,), (ALPHA / rank,))
    trainer.start(bank.candidates, (1e-2,))
    list(trainer.run(5))
    save_adapter(bank, adapter_of(bank, 0), tmp_path)
    expected_KS = packed_model.losses(packed_model.pack(rows, range(6))).loss_KS.detach()

    loaded = PeftModel.from_pretrained(tiny(family), str(tmp_path), autocast_adapter_dtype=False).double()
    other_bank = Bank(tiny(family), seed=1)  # only to run PEFT's model through the packed loss
    other = PackedModel(loaded.get_base_model(), other_bank, task)
    with other_bank.off():
        again_KS = other.losses(other.pack(rows, range(6))).loss_KS.detach()
    torch.testing.assert_close(again_KS, expected_KS, rtol=0, atol=1e-9)


def test_errors_name_what_there_is() -> None:
    with pytest.raises(RankraceError, match="q_proj"):
        Bank(tiny("llama"), target_modules=["query"])
    bank = Bank(tiny("llama"))
    with pytest.raises(RankraceError, match=r"outside 1 … 16"):
        bank.check_ranks([17])
    with pytest.raises(RankraceError, match=r"outside 1 … 16"):
        bank.check_ranks([0])


def test_detach_puts_the_model_back() -> None:
    model = tiny("bert-classification")
    before = {n: type(m) for n, m in model.named_modules()}
    bank = Bank(model)
    bank.start((4,), (1.0,))
    bank.detach()
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_what_is_borrowed_is_held_once() -> None:
    """The cuts of a look: once they are where they run, what they were copied from goes."""
    bank = in_bank("llama").bank
    cut: list[weakref.ref[Tensor]] = []

    def cuts() -> Candidates:
        made = bank.candidates.truncations(0, (1, 2), (1.0, 1.0))
        cut.extend(weakref.ref(A) for A, _ in made.factors.values())
        return made

    with bank.borrowed(cuts()):
        assert cut
        assert not any(ref() is not None for ref in cut)
