"""Predictions against a reader's own: one prompt at a time by the model's plain forward.

Legend: L tokens of a prompt.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from examples import examples
from models import CAUSAL, CLASSIFYING, VOCABULARY, tiny
from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.data.encode import Encoder
from rankrace.data.encoded import Encoded
from rankrace.errors import RankraceError
from rankrace.evaluate.generate import (
    LOOK_EVERY,
    Writing,
    answer,
    batches,
    fitting,
    generate,
    remembering,
    room_for_prompts,
)
from rankrace.evaluate.predict import classified, predict, training_rows
from rankrace.methods.parameters import Parameters
from rankrace.session import recipe_of
from rankrace.tasks import find_task
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel, load_model, load_tokenizer

EOS = 2
"""Of the tiny models."""
ROWS = [
    {"prompt": f"The capital of {country} is", "completion": f" {city}", "answers": [city],
     "options": [" Paris", " Rome", " Oslo"]}
    for country, city in (("France", "Paris"), ("Italy", "Rome"), ("the kingdom of Norway", "Oslo"))
]  # fmt: skip


@pytest.fixture(scope="module")
def trainer(smollm2: Path) -> Trainer[Bank]:
    """SmolLM2 under a bank whose single adapter does something."""
    model = load_model(str(smollm2), "causal", None, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    bank = Bank(model, target_modules=["q_proj", "down_proj"])
    trainer = Trainer(PackedModel(model, bank, "causal"), [], recipe_of(RunConfig(model="m", data="d"), model, 4096))
    bank.start((4,), (2.0,))
    generator = torch.Generator().manual_seed(0)
    for _, B_KDR in bank.candidates.factors.values():
        B_KDR[:, :, :4] = 0.2 * torch.randn(B_KDR[:, :, :4].shape, generator=generator)
    trainer.start(bank.candidates, [0.0])
    return trainer


@torch.no_grad()
def by_hand(trainer: Trainer[Bank], ids: list[int], eos: int, most: int) -> list[int]:
    """Greedy decoding of one prompt on packed rows, the whole text again for each token."""
    out: list[int] = []
    while len(out) < most:
        example = torch.tensor(ids + out)
        supervised = torch.ones(len(example), dtype=torch.bool).numpy()
        e = Encoded(input_ids=example.int().numpy(), supervised=supervised, label=-1, group=0, row=0)
        trainer.bank.refresh()
        h_KLD = trainer.model.hidden(trainer.model.pack([e], [0]), 1)
        token = int(trainer.model.token_logits(h_KLD[0, -1:]).argmax())
        if token == eos:
            break
        out.append(token)
    return out


def test_generation_with_the_adapter_on_is_greedy_decoding(trainer: Trainer[Bank], smollm2: Path) -> None:
    """Prompts of unequal lengths in one batch, packed rows of one or more of them: nothing changes."""
    tokenizer = load_tokenizer(str(smollm2))
    prompts = [torch.tensor(tokenizer(row["prompt"])["input_ids"]).numpy() for row in ROWS]
    assert len({len(p) for p in prompts}) > 1
    expected = [tokenizer.decode(by_hand(trainer, p.tolist(), tokenizer.eos_token_id, 6)) for p in prompts]
    for micro_tokens in (4096, 10):
        assert generate(trainer.model, tokenizer, prompts, 6, micro_tokens) == expected
    with trainer.bank.off():
        assert generate(trainer.model, tokenizer, prompts, 6, 4096) != expected
    assert trainer.model.model.config._attn_implementation == "rankrace_packed"


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_is_transformers_own(family: str) -> None:
    """Every family (grouped heads, sliding windows, learnt positions) against `generate` on one prompt at a time."""
    model = tiny(family).eval()
    prompts = [torch.randint(5, VOCABULARY, (length,)).numpy() for length in (3, 17, 1, 9)]
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
    model.generation_config = GenerationConfig()
    expected = []
    for prompt in prompts:
        ids = torch.tensor(prompt)[None]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        expected.append([*out[0, len(prompt) :].tolist(), EOS])
    packed = PackedModel(model, Parameters(model, {}), "causal")
    with remembering(model), torch.no_grad():
        found = [[*row, EOS] for row in answer(prompts, packed, EOS, 12, 16).tolist()]
    assert [row[: row.index(EOS)] for row in found] == [row[: row.index(EOS)] for row in expected]
    assert len({tuple(row) for row in expected}) > 1


def test_a_prompt_beyond_the_positions_is_cut_from_its_start() -> None:
    """GPT-2's positions are learnt and end at 64: an answer of 12 leaves 52 for the prompt."""
    assert room_for_prompts(tiny("gpt2"), 12) == 52
    prompt = np.arange(60)
    assert fitting(prompt, 60, 0).tolist() == list(range(60))
    assert fitting(prompt, 52, 0).tolist() == [0, *range(9, 60)], "BOS stays"
    assert fitting(prompt, 52, 5).tolist() == list(range(8, 60))
    with pytest.raises(RankraceError, match="leaves no room for a prompt"):
        room_for_prompts(tiny("gpt2"), 63)


def test_a_prompt_beyond_the_positions_is_answered(smollm2: Path) -> None:
    """As its end is: it had ended in an IndexError."""
    model, tokenizer = tiny("gpt2").eval(), load_tokenizer(str(smollm2))
    packed = PackedModel(model, Parameters(model, {}), "causal")
    prompt = torch.randint(5, VOCABULARY, (60,)).numpy()
    long, cut = (generate(packed, tokenizer, [p], 12, 4096) for p in (prompt, prompt[8:]))
    assert long == cut


@pytest.mark.parametrize("look_every", [1, 7])
def test_answers_that_have_ended_cost_nothing(look_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers as when all are written to the end, over more cells than the first steps see."""
    monkeypatch.setitem(LOOK_EVERY, "cpu", look_every)
    torch.manual_seed(0)
    model = tiny("llama").eval()
    prompts = [torch.randint(5, VOCABULARY, (length,)).numpy() for length in (3, 17, 1, 9, 12, 5, 30, 2)]
    packed = PackedModel(model, Parameters(model, {}), "causal")
    steps: list[int] = []
    packed.trunk.register_forward_pre_hook(
        lambda _, __, inputs: steps.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    reaches: list[int] = []
    see = Writing.see

    def seen(writing: Writing, reach: int) -> None:
        see(writing, reach)
        reaches.append(writing.cache.reach)

    monkeypatch.setattr(Writing, "see", seen)
    with remembering(model), torch.no_grad():
        whole = answer(prompts, packed, -1, 150, 4096).tolist()
        assert steps[1:] == [len(prompts)] * 149
        assert len(reaches) == len(set(reaches)), "a step is captured anew for nothing"
        written = {*whole[0], *whole[1]}
        ends = {token: [[*row, token].index(token) for row in whole] for token in written}
        eos = max(ends, key=lambda token: len(set(ends[token])))
        steps.clear()
        found = answer(prompts, packed, eos, 150, 4096).tolist()
    assert len(set(ends[eos])) >= 3
    assert [row[:n] for row, n in zip(found, ends[eos], strict=True)] == [
        row[:n] for row, n in zip(whole, ends[eos], strict=True)
    ]
    assert steps[1:] == sorted(steps[1:], reverse=True)
    assert min(steps[1:]) <= len(prompts) // 2


def test_options_are_chosen_by_likelihood(trainer: Trainer[Bank], smollm2: Path) -> None:
    """The base model by Transformers alone: log-likelihood of option and EOS after each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    encoder = Encoder(tokenizer, task="causal", max_length=64)
    with trainer.bank.off():
        predictions = predict(trainer, encoder, tokenizer, find_task("medqa"), ROWS)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    expected = []
    for row in ROWS:
        scores = []
        for option in row["options"]:
            prompt, answer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (row["prompt"], option))
            answer = [*answer, tokenizer.eos_token_id]
            with torch.no_grad():
                logs = plain(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores.append(sum(logs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)))
        expected.append(row["options"][scores.index(max(scores))].strip())
    assert predictions == expected


@pytest.mark.parametrize("family", CLASSIFYING)
def test_the_likeliest_of_three_classes(family: str) -> None:
    """Against the argmax of the model's own logits, an example at a time."""
    model = tiny(family).eval()
    model.config.pad_token_id = 0
    encoded = examples(24, classes=3)
    with torch.no_grad():
        expected = [int(model(input_ids=torch.tensor(e.input_ids)[None].long()).logits[0].argmax()) for e in encoded]
    assert set(expected) == {0, 1, 2}
    trainer = Trainer(PackedModel(model, Parameters(model, {}), "classification"), [],
                      recipe_of(RunConfig(model="m", data="d"), model, 64))  # fmt: skip
    assert classified(trainer, encoded, 3) == expected


def test_batches_cover_all_prompts_within_the_budget() -> None:
    lengths = [5, 90, 30, 31, 7, 200]
    found = list(batches(lengths, 10, 100))
    assert sorted(i for batch in found for i in batch) == list(range(6))
    assert all(len(b) == 1 or len(b) * (max(lengths[i] for i in b) + 10) <= 100 for b in found)


def test_an_encoder_cannot_write_text() -> None:
    with pytest.raises(RankraceError, match="encoder"):
        training_rows(find_task("squad2"), [], classification=True)
