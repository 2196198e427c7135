"""Gradient caching, measured: what a training step keeps in memory, and how large its logits get.

Legend: K candidates, T tokens of a packed row, S targets in it, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples import examples
from rankrace.bank import Bank, Candidates
from rankrace.data.encoded import Encoded
from rankrace.data.pack import Batch
from rankrace.errors import RankraceError
from rankrace.select.objective import Held, Objective, log2_penalty
from rankrace.select.search import Search, Setting
from rankrace.select.shrink import Shrink
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.memory import Meter
from rankrace.training.model import PackedModel

RANKS = (2, 4, 8, 16, 32)
ROWS, LENGTH = 8, 128
T = ROWS * LENGTH
SIDE_BY_SIDE, ONE_BY_ONE = T * len(RANKS), T
"""micro_tokens"""


def test_the_meter_counts_storages_once_and_while_they_live() -> None:
    old = torch.ones(1000)
    with Meter() as meter:
        old.mul_(2)
        assert meter.bytes == 0
        a = old + 1
        view = a.view(10, 100)[3]
        view.add_(1)
        assert meter.bytes == 4000
        b = torch.cat([a, old])
        assert meter.bytes == 12000
        del a
        assert meter.bytes == 12000, "a view keeps its storage"
        del view, b
        assert meter.bytes == 0
        assert meter.peak == 12000


def test_the_meter_sees_what_a_graph_keeps() -> None:
    with Meter() as meter:
        leaf = torch.ones(1000, requires_grad=True)
        y = (leaf * 2).exp().sum()
        assert meter.bytes == 8004, "the leaf, what exp keeps for its backward, and the sum"
        assert meter.peak == 12000, "leaf, 2·leaf and exp, before the sum"
        y.backward()
        assert meter.bytes == 8004, "exp's result has gone, the gradient has come"
        assert meter.peak == 12008, "leaf, exp, its gradient; and the sum and the sum's gradient, 4 bytes each"


def test_the_meter_is_not_confused_by_memory_that_is_used_again() -> None:
    old = torch.ones(1000)
    places = {old.data_ptr()}
    with Meter() as meter:
        del old
        for _ in range(1000):
            new = torch.ones(1000)
            again = new.data_ptr() in places
            places.add(new.data_ptr())
            assert meter.bytes == 4000
            del new
            assert meter.bytes == 0
            if again:
                return
    pytest.fail("no address came twice, so nothing was tested")


@dataclass(frozen=True, kw_only=True)
class Step:
    peak: int
    """Bytes."""
    shapes: set[torch.Size]


def step(
    ranks: tuple[int, ...], micro_tokens: int, *, vocabulary: int = 100, supervised: int = 16, chunk: int = 256,
    layers: int = 4, train: bool = True,
) -> Step:  # fmt: skip
    """One optimiser step (or one measurement) on a packed row of 8 examples of 128 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=160, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    bank = Bank(model)
    rng = np.random.default_rng(0)
    rows = [
        Encoded(
            input_ids=rng.integers(5, vocabulary, LENGTH).astype(np.int32),
            supervised=np.arange(LENGTH) >= LENGTH - supervised,
            label=-1,
            group=row,
            row=row,
        )
        for row in range(ROWS)
    ]
    recipe = Recipe(
        epochs=1, max_steps=None, batch_size=ROWS, micro_tokens=micro_tokens, schedule="constant", warmup=0.0,
        weight_decay=0.0, clip=1.0, seed=0,
    )  # fmt: skip
    trainer = Trainer(PackedModel(model, bank, "causal", chunk=chunk), rows, recipe)
    bank.start(ranks, [1.0] * len(ranks))
    trainer.start(bank.candidates, [1e-3] * len(ranks))
    trainer.take_step(Batch((tuple(range(ROWS)),)))  # what is made once and kept is there now
    with Meter() as meter:
        if train:
            trainer.take_step(Batch((tuple(range(ROWS)),)))
        else:
            trainer.measure(rows)
    return Step(peak=meter.peak, shapes=meter.shapes)


def test_candidates_one_after_another_need_the_memory_of_one() -> None:
    alone = step((32,), ONE_BY_ONE)
    in_turn = step(RANKS, ONE_BY_ONE)
    together = step(RANKS, SIDE_BY_SIDE)
    layers, width, float32 = 4, 64, 4
    assert alone.peak > T * layers * 10 * width * float32, "no layer keeps less: the meter misses something"
    assert in_turn.peak <= 1.05 * alone.peak
    assert together.peak >= 4 * alone.peak


def test_candidates_measured_one_after_another_need_the_memory_of_one() -> None:
    alone = step((32,), ONE_BY_ONE, train=False)
    assert step(RANKS, ONE_BY_ONE, train=False).peak <= 1.05 * alone.peak
    assert step(RANKS, SIDE_BY_SIDE, train=False).peak >= 3 * alone.peak


def test_a_look_holds_the_cuts_that_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would only wait: the same losses, in less memory. And fewer at once where there is none for more."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=160, num_hidden_layers=4,
                         num_attention_heads=4, max_position_embeddings=LENGTH)  # fmt: skip
    model = LlamaForCausalLM(config).double()
    bank = Bank(model)
    rows = examples(8, longest=20)
    tokens = sum(map(len, rows))
    ranks = (1, 2, 4, 8, 16, 24, 32)

    def look(micro_tokens: int) -> tuple[np.ndarray, int]:
        recipe = Recipe(epochs=1, max_steps=None, batch_size=8, micro_tokens=micro_tokens, schedule="constant",
                        warmup=0.0, weight_decay=0.0, clip=1.0, seed=0)  # fmt: skip
        trainer = Trainer(PackedModel(model, bank, "causal"), rows, recipe)
        bank.start((32,), (1.0,))
        for layer in bank.layers.values():
            torch.nn.init.normal_(layer.B_KDR, std=0.1, generator=torch.Generator().manual_seed(layer.index))
        trainer.start(bank.candidates, [1e-3])
        objective = Objective(penalty=log2_penalty(0.0), rule="one_se", share=0.04)
        strategy = Shrink(total_steps=100, wide=32, largest=16, refine=True, objective=objective)
        held = Held(tokens_N=np.ones(8), cluster_N=np.arange(8), base_N=np.ones(8))
        search = Search(trainer, strategy, rows, held, lambda rank: Setting(multiplier=2.0, lr=1e-3))
        search.spectra(0)
        with Meter() as meter:
            trials = search.truncated(0, ranks)
        assert [trial.rank for trial in trials] == list(ranks)
        return np.stack([trial.loss_N for trial in trials]), meter.peak

    together, in_turn, by_twos = look(tokens * len(ranks)), look(tokens), look(2 * tokens + 1)
    for other in (in_turn, by_twos):
        assert np.abs(other[0] - together[0]).max() < 1e-9
    assert len(set(together[0].sum(1).round(9))) == len(ranks)
    assert in_turn[1] < 0.3 * together[1]

    most, truncations = 2, Candidates.truncations
    asked: list[int] = []

    def limited(candidates: Candidates, k: int, cuts: Sequence[int], *others: Any) -> Candidates:
        asked.append(len(cuts))
        if len(cuts) > most:
            raise torch.OutOfMemoryError("planted")
        return truncations(candidates, k, cuts, *others)

    monkeypatch.setattr(Candidates, "truncations", limited)
    assert np.abs(look(tokens * len(ranks))[0] - together[0]).max() < 1e-9
    assert asked == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    most = 0
    with pytest.raises(RankraceError, match="cut to rank 1 does not fit on cpu"):
        look(tokens)


@pytest.mark.parametrize("train", [True, False])
def test_no_more_logits_than_one_chunk_exist(train: bool) -> None:
    """V = 5,000 and S = 8 × 100: all logits at once would be 16 MB a candidate, and twice as much with gradients."""
    V, S, chunk = 5000, ROWS * 100, 96  # not a width of the model: its head's weight, transposed, is [64, V]

    def run(chunk: int) -> Step:
        return step((2, 4), 2 * T, vocabulary=V, supervised=100, chunk=chunk, layers=1, train=train)

    def rows_of_logits(run: Step) -> int:
        return max(shape.numel() // V for shape in run.shapes if shape[-1:] == (V,))

    chunked, whole = run(chunk), run(2 * S)
    assert rows_of_logits(chunked) == chunk
    assert rows_of_logits(whole) == 2 * S, "both candidates' targets"
    logits = 2 * S * V * 4
    assert whole.peak > logits
    assert whole.peak < chunked.peak + 2 * logits, "the logits and their softmax, and no third of their size"
    assert chunked.peak < 0.3 * whole.peak
