"""However a batch is cut into passes, it gives the same losses and the same gradients."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples import examples
from models import CAUSAL, CLASSIFYING, leaky, tiny
from rankrace.bank import Bank
from rankrace.data.encoded import Encoded
from rankrace.data.pack import Batch, Packed, Size, epoch_batches, made_up, size_buckets
from rankrace.errors import RankraceError
from rankrace.training import attention, passes
from rankrace.training.loop import Recipe, Trainer, graph_sizes
from rankrace.training.model import PackedModel
from rankrace.training.passes import Eager, Graphs

RECIPE = Recipe(
    epochs=1, max_steps=None, batch_size=8, micro_tokens=10_000, schedule="constant", warmup=0.0,
    weight_decay=0.0, clip=1.0, seed=0,
)  # fmt: skip


def model_of(family: str) -> tuple[PackedModel, list[Encoded]]:
    """A bank of ranks 4 and 2 with non-zero B, and 8 rows whose lengths go from 1 or 2 to 23."""
    task = "classification" if family in CLASSIFYING else "causal"
    model = tiny(family)
    bank = Bank(model)
    bank.start((4, 2), (4.0, 8.0))
    torch.manual_seed(1)
    for layer in bank.layers.values():
        layer.B_KDR.data[0, :, :4].normal_(std=0.1)
        layer.B_KDR.data[1, :, :2].normal_(std=0.1)
    rows = examples(8, seed=2, classes=3 if task == "classification" else 0)
    return PackedModel(model, bank, task, chunk=5), rows


def gradients(model: PackedModel, rows: list[Encoded], batch: Batch, micro_tokens: int = 10_000) -> list[Tensor]:
    """Of the mean loss over the batch, through the trainer's own passes; the update is left out."""
    trainer = Trainer(model, rows, RECIPE)
    trainer.start(model.bank.candidates, (0.0, 0.0))
    found: list[Tensor] = []

    def keep_gradients(lr_K: Sequence[float]) -> Tensor:
        found.extend(p.grad.clone() for p in model.bank.parameters() if p.grad is not None)
        return torch.zeros(2)

    trainer.recipe = Recipe(**{**RECIPE.__dict__, "micro_tokens": micro_tokens})
    trainer.optimizer.step = keep_gradients
    found.insert(0, trainer.take_step(batch))
    return found


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
@pytest.mark.parametrize("micro_tokens", [10_000, 60, 1])
def test_accumulation_and_candidate_groups_change_nothing(family: str, micro_tokens: int) -> None:
    """8 rows at once = 4×2 = 8×1, the candidates side by side or one after another."""
    model, rows = model_of(family)
    whole = gradients(model, rows, Batch((tuple(range(8)),)))
    pairs = gradients(model, rows, Batch(((5, 0), (1, 7), (2, 3), (6, 4))), micro_tokens)
    single = gradients(model, rows, Batch(tuple((i,) for i in range(8))), micro_tokens)
    assert len(whole) == 1 + len(model.bank.parameters())
    for a, b, c in zip(whole, pairs, single, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
def test_packed_is_padded_is_one_by_one(family: str) -> None:
    """Against the model's own forward, padded on the right with a mask, and on each row alone."""
    model, rows = model_of(family)
    hf = model.model
    with torch.no_grad(), model.bank.off():
        packed = model.pack(rows, range(8))
        ours_S = model.losses(packed).loss_KS[0]
        hf.set_attn_implementation("sdpa")  # eager takes its softmax in float32
        alone_S = torch.cat([model.own_losses(packed, n) for n in range(8)])
        padding = hf.config.pad_token_id or 0
        longest = max(map(len, rows))
        ids_NL = torch.full((8, longest), padding)
        mask_NL = torch.zeros(8, longest, dtype=torch.long)
        for n, e in enumerate(rows):
            ids_NL[n, : len(e)] = torch.tensor(e.input_ids)
            mask_NL[n, : len(e)] = 1
        if model.task == "classification":
            hf.config.pad_token_id = padding
            logits = hf(input_ids=ids_NL, attention_mask=mask_NL).logits
            padded_S = cross_entropy(logits, packed.targets_S, reduction="none")
        else:
            logits = hf(input_ids=ids_NL, attention_mask=mask_NL).logits
            padded_S = torch.cat(
                [
                    cross_entropy(logits[n, at], torch.tensor(e.input_ids).long()[at + 1], reduction="none")
                    for n, e in enumerate(rows)
                    for at in [torch.tensor(e.supervised).nonzero()[:, 0] - 1]
                ]
            )
    torch.testing.assert_close(ours_S, alone_S, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours_S, padded_S, rtol=0, atol=1e-9)


def test_verify_notices_a_model_that_looks_across_examples() -> None:
    from rankrace.errors import RankraceError

    model, rows = model_of("llama")
    model.verify(model.pack(rows, range(3)))
    leaky(model.model)
    with pytest.raises(RankraceError, match="packed rows"):
        model.verify(model.pack(rows, range(3)))


def test_measure_is_the_sum_of_single_rows() -> None:
    model, rows = model_of("llama")
    trainer = Trainer(model, rows, Recipe(**{**RECIPE.__dict__, "micro_tokens": 40}))
    measured = trainer.measure(rows)
    for n in range(8):
        token = model.losses(model.pack(rows, [n]))
        torch.testing.assert_close(torch.tensor(measured.loss_KN[:, n]), token.loss_KS.detach().sum(1))
        assert (measured.correct_KN[:, n] == token.correct_KS.all(1).numpy()).all()
        assert measured.tokens_N[n] == rows[n].supervised.sum()


def test_logits_are_never_larger_than_a_chunk() -> None:
    model, rows = model_of("llama")
    seen = []
    model.model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    model.losses(model.pack(rows, range(8))).loss_KS.sum().backward()
    assert max(seen) == model.chunk
    assert sum(seen) == 2 * sum(int(e.supervised.sum()) for e in rows)


def test_order_of_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    lengths = [len(e) for e in examples(50)]
    first = epoch_batches(lengths, 8, 60, seed=1, epoch=0)
    assert first == epoch_batches(lengths, 8, 60, seed=1, epoch=0)
    assert first != epoch_batches(lengths, 8, 60, seed=1, epoch=1)
    assert sorted(i for b in first for row in b.micros for i in row) == list(range(50))


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
def test_a_row_padded_to_a_larger_size_gives_the_same(family: str) -> None:
    """As CUDA graphs want it: made-up examples behind the row's own, targets that do not count."""
    model, rows = model_of(family)
    model.bank.load(model.bank.candidates)
    row = model.pack(rows, range(8))
    longest, spare = row.size.longest, 2 * row.size.longest + 3
    size = Size(
        tokens=row.size.tokens + spare,
        examples=8 + made_up(spare, longest),
        longest=longest,
        targets=row.size.targets + 7,
    )
    assert size.holds(row.size)
    assert row.padded(size).size == size

    def run(row: Packed) -> list[Tensor]:
        gradients = model.bank.loaded.gradients.all_KP
        gradients.zero_()
        loss_K = Eager(model).run(row, slice(0, 2), torch.tensor(0.1, dtype=torch.float64))
        return [loss_K, gradients.clone()]

    for a, b in zip(run(row), run(row.padded(size)), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    empty = row.emptied().padded(size)
    assert empty.size == size
    assert not any(x.any() for x in run(empty)), "a row that is all made up adds something"


class Replayed:
    """Stands in for a captured pass where there is no GPU: runs what it is given, at the size it was captured for."""

    captured: ClassVar[list[tuple[int, slice]]] = []

    def __init__(self, eager: Eager, row: Packed, active: slice, share: Tensor, pool: object) -> None:
        self.eager, self.size, self.active = eager, row.size, active
        self.captured.append((row.size.tokens, active))

    def replay(self, row: Packed, share: Tensor) -> Tensor:
        assert row.size == self.size
        return self.eager.run(row, self.active, share)


@pytest.mark.parametrize("micro_tokens", [400, 100])
def test_all_passes_are_captured_before_the_first_one(micro_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, or one candidate after the other: to the same result, the largest size first, eagerly never."""

    def trained(graphs: bool) -> tuple[Tensor, Trainer]:
        model, _ = model_of("llama")
        recipe = replace(RECIPE, epochs=2, micro_tokens=micro_tokens, graphs=graphs)
        trainer = Trainer(model, examples(40, seed=5), recipe)
        trainer.start(model.bank.candidates, (1e-2, 1e-2))
        losses = [loss_K.clone() for loss_K in trainer.run(2)]
        if graphs:
            monkeypatch.setattr(Graphs, "prepare", None)
        return torch.stack([*losses, *trainer.run(trainer.total)]), trainer

    expected, _ = trained(False)
    monkeypatch.setattr(Replayed, "captured", [])
    monkeypatch.setattr(passes, "Graph", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    losses, trainer = trained(True)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)
    tokens = [size for size, _ in Replayed.captured]
    assert tokens == sorted(tokens, reverse=True)
    assert isinstance(trainer.passes, Graphs)
    assert len(tokens) == len(trainer.passes.sizes) * (1 if micro_tokens == 400 else 2)


def test_memory_that_runs_out_while_passes_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that is captured is blamed, not the row at hand; the result is the same."""
    MOST = 150

    class Failing(Replayed):
        def __init__(self, eager: Eager, row: Packed, active: slice, share: Tensor, pool: object) -> None:
            if row.size.tokens * (active.stop - active.start) > MOST:
                raise torch.OutOfMemoryError("planted")
            super().__init__(eager, row, active, share, pool)

    def trained(graphs: bool) -> tuple[Tensor, Trainer]:
        model, _ = model_of("llama")
        trainer = Trainer(model, examples(40, seed=5), replace(RECIPE, epochs=1, micro_tokens=400, graphs=graphs))
        trainer.start(model.bank.candidates, (1e-2, 1e-2))
        sizes = [size.tokens for size in trainer.passes.sizes] if isinstance(trainer.passes, Graphs) else []
        losses = torch.stack([loss_K.clone() for loss_K in trainer.run(trainer.total)])
        if graphs:
            assert f"in a pass of {2 * sizes[-1]:,} tokens ({sizes[-1]:,} × 2) at step 1" in trainer.notes[0]
        return losses, trainer

    expected, _ = trained(False)
    monkeypatch.setattr(passes, "Graph", Failing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    losses, trainer = trained(True)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)
    assert trainer.recipe.micro_tokens <= MOST


def test_graphs_go_with_their_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when Python next looks for garbage: they hold a training's memory, and if they were freed while
    those of the next one are captured, CUDA would end that capture."""
    monkeypatch.setattr(passes, "Graph", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    model, _ = model_of("llama")
    trainer = Trainer(model, examples(40, seed=5), replace(RECIPE, epochs=1, micro_tokens=400, graphs=True))
    trainer.start(model.bank.candidates, (1e-2, 1e-2))
    next(trainer.run(trainer.total))
    assert isinstance(trainer.passes, Graphs)
    one = weakref.ref(next(iter(trainer.passes.graphs.values())))
    gc.disable()
    try:
        del trainer
        assert one() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_during_a_capture(collects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[bool] = []

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        during.append(gc.isenabled())
        yield
        raise RuntimeError("the capture failed")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    if not collects:
        gc.disable()
    try:
        with pytest.raises(RuntimeError, match="the capture failed"), passes.captured(cast(Any, None), pool=None):
            during.append(gc.isenabled())
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    assert during == [False, False]


def test_rows_of_later_epochs_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = model_of("llama")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    trainer = Trainer(model, examples(40, seed=5), replace(RECIPE, epochs=6, micro_tokens=400, graphs=True))
    assert isinstance(trainer.passes, Graphs)
    rows = trainer.sizes(trainer.total)
    assert all(any(size.holds(row) for size in trainer.passes.sizes) for row in rows)
    first = size_buckets(trainer.sizes(), len(trainer.passes.sizes))
    assert not all(any(size.holds(row) for size in first) for row in rows), "the first epoch tells all"


def test_every_row_fits_into_a_bucket() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, 200, (300, 16), generator=rng)
    sizes = [Size(tokens=int(n.sum()), examples=16, longest=int(n.max()), targets=int(n[0]) * 3) for n in drawn]
    buckets = size_buckets(sizes, 6)
    assert len(buckets) == 6
    for size in sizes:
        first = next(b for b in buckets if b.holds(size))
        assert first.tokens <= buckets[-1].tokens
    padding = sum(next(b for b in buckets if b.holds(s)).tokens for s in sizes) / sum(s.tokens for s in sizes)
    assert padding < 1.15
    assert size_buckets(sizes[:1], 6)[0].holds(sizes[0])


def test_more_passes_want_more_sizes_of_graphs() -> None:
    """A size is captured for the padding that it saves: 80 steps want two of them, an epoch of SQuAD sixteen."""
    assert [graph_sizes(passes) for passes in (1, 80, 1000, 4000, 30_000)] == [2, 2, 4, 8, 16]


def test_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padded fallback reads lengths on the host: a graph of it would replay those of another row."""

    class Model:
        def __init__(self, device: str, dtype: torch.dtype, **config: Any) -> None:
            self.device, self.dtype = torch.device(device), dtype
            text = SimpleNamespace(**config)
            self.config = SimpleNamespace(get_text_config=lambda: text)

    def why(model: Model, longest: int = 100) -> str | None:
        return attention.cannot_capture(model, longest)  # type: ignore[arg-type]

    assert why(Model("cuda", torch.bfloat16)) is None
    assert why(Model("cpu", torch.bfloat16)) == "they are CUDA's, and the model is on the cpu"
    assert why(Model("cuda", torch.float32)) == "flash attention has no float32"
    windowed = Model("cuda", torch.bfloat16, sliding_window=64)
    monkeypatch.setattr(attention, "HAS_WINDOW", False)
    assert "sliding window (of 64 tokens)" in (why(windowed) or "")
    assert why(windowed, longest=64) is None
    assert why(Model("cuda", torch.bfloat16, sliding_window=None)) is None
    monkeypatch.setattr(attention, "HAS_WINDOW", True)
    assert why(windowed) is None
    with pytest.raises(RankraceError, match="CUDA graphs cannot be used"):
        attention.refuse_capture(tiny("llama"), 10)
