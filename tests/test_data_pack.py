"""Packing against a naive example-by-example reference, and the order of training."""

from collections import Counter

import numpy as np
import pytest
import torch

from rankrace.data.encoded import NO_LABEL, Encoded, Task
from rankrace.data.pack import Batch, epoch_batches, pack, validation_batches


def make_examples(count: int, task: Task, seed: int = 0) -> list[Encoded]:
    """Random tokens, and random targets that include first tokens."""
    generator = np.random.default_rng(seed)
    examples: list[Encoded] = []
    for row in range(count):
        length = int(generator.integers(1, 20))
        causal = task == "causal"
        examples.append(
            Encoded(
                input_ids=generator.integers(0, 1000, length, dtype=np.int32),
                supervised=generator.random(length) < 0.5 if causal else np.zeros(length, dtype=bool),
                label=NO_LABEL if causal else int(generator.integers(0, 3)),
                group=row,
                row=row,
                token_types=None if causal else generator.integers(0, 2, length, dtype=np.int32),
            )
        )
    return examples


def test_causal_targets_as_example_by_example() -> None:
    examples = make_examples(12, "causal")
    indices = [7, 0, 11, 3, 3, 5]
    ids, positions, at, targets, of, borders = [], [], [], [], [], [0]
    for n, i in enumerate(indices):
        for position, token in enumerate(examples[i].input_ids.tolist()):
            if position > 0 and examples[i].supervised[position]:
                at.append(len(ids) - 1)
                targets.append(token)
                of.append(n)
            ids.append(token)
            positions.append(position)
        borders.append(len(ids))

    packed = pack(examples, indices, "causal")
    assert packed.input_ids_T.tolist() == ids
    assert packed.position_ids_T.tolist() == positions
    assert packed.cu_seqlens.tolist() == borders
    assert packed.target_positions_S.tolist() == at
    assert packed.targets_S.tolist() == targets
    assert packed.example_S.tolist() == of
    assert packed.lengths_N == [len(examples[i]) for i in indices]
    assert packed.max_seqlen == max(packed.lengths_N)
    assert packed.rows_N == indices
    assert packed.token_types_T is None
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.input_ids_T.dtype == packed.targets_S.dtype == packed.example_S.dtype == torch.int64


def test_packing_leaves_the_examples_untouched() -> None:
    examples = make_examples(3, "causal")
    before = [example.supervised.copy() for example in examples]
    pack(examples, [0, 1], "causal")
    assert all((a == e.supervised).all() for a, e in zip(before, examples, strict=True))


@pytest.mark.parametrize("pooled", ["first", "last"])
def test_classification_has_one_target_an_example(pooled: str) -> None:
    examples = make_examples(6, "classification")
    packed = pack(examples, [4, 1, 2], "classification", "first" if pooled == "first" else "last")
    start = 0
    for n, i in enumerate([4, 1, 2]):
        end = start + len(examples[i])
        assert packed.target_positions_S[n] == (start if pooled == "first" else end - 1)
        assert packed.targets_S[n] == examples[i].label
        types = examples[i].token_types
        assert types is not None
        assert packed.token_types_T is not None
        assert packed.token_types_T[start:end].tolist() == types.tolist()
        start = end
    assert packed.example_S.tolist() == [0, 1, 2]


def test_to_moves_every_tensor() -> None:
    for task in ("causal", "classification"):
        moved = pack(make_examples(3, task), [0, 2], task).to("meta")
        tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == (6 if task == "causal" else 7)
        assert all(tensor.is_meta for tensor in tensors)


LENGTHS = np.random.default_rng(0).integers(1, 300, 103)


def assert_rows_fit(rows: list[tuple[int, ...]] | tuple[tuple[int, ...], ...], budget: int) -> None:
    for row in rows:
        assert len(row) == 1 or LENGTHS[list(row)].sum() <= budget


def test_an_epoch_covers_each_example_once() -> None:
    batches = epoch_batches(LENGTHS, batch_size=16, micro_tokens=256, seed=5, epoch=2)
    sizes = [sum(len(micro) for micro in batch.micros) for batch in batches]
    assert sizes == [16] * 6 + [7], "the last batch is smaller, not dropped"
    assert Counter(i for batch in batches for micro in batch.micros for i in micro) == Counter(range(103))
    for batch in batches:
        assert_rows_fit(batch.micros, 256)
        flat = [LENGTHS[i] for micro in batch.micros for i in micro]
        assert flat == sorted(flat, reverse=True)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[Batch]:
        return epoch_batches(LENGTHS.tolist(), 16, 256, seed, epoch)

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(2**70, 0) != order(2**71, 0)


def test_the_examples_of_a_step_do_not_depend_on_the_token_budget() -> None:
    def examples_of(budget: int) -> list[set[int]]:
        batches = epoch_batches(LENGTHS, 16, budget, seed=0, epoch=0)
        return [{i for micro in batch.micros for i in micro} for batch in batches]

    assert examples_of(64) == examples_of(10_000)
    assert all(len(batch.micros) == 1 for batch in epoch_batches(LENGTHS, 16, 16 * 300, 0, 0))


@pytest.mark.parametrize("budget", [64, 256, 700, 1500, 5000])
def test_rows_are_as_few_and_as_even_as_can_be(budget: int) -> None:
    def filled(limit: int) -> list[int]:
        """Tokens of rows that are filled one after the other."""
        rows: list[int] = []
        for length in sorted(LENGTHS.tolist(), reverse=True):
            if rows and rows[-1] + length <= limit:
                rows[-1] += length
            else:
                rows.append(length)
        return rows

    rows = validation_batches(LENGTHS, budget)
    assert_rows_fit(rows, budget)
    assert len(rows) == len(filled(budget)), "no more rows than without evening out"
    longest = max(LENGTHS[list(row)].sum() for row in rows)
    assert longest == LENGTHS.max() or len(filled(longest - 1)) > len(rows), "a shorter longest row needs one more"
    if budget >= 1500:
        assert longest <= LENGTHS.sum() / len(rows) + LENGTHS.max()


def test_a_step_is_split_in_the_middle() -> None:
    (batch,) = epoch_batches([100] * 60, batch_size=60, micro_tokens=4000, seed=0, epoch=0)
    assert [len(row) for row in batch.micros] == [30, 30], "not 40 and 20"
    assert validation_batches([], 10) == []


def test_validation_covers_each_example_once() -> None:
    rows = validation_batches(LENGTHS, 512)
    assert_rows_fit(rows, 512)
    assert sorted(i for row in rows for i in row) == list(range(103))
    assert validation_batches([3, 3], 1) == [(0,), (1,)]
