"""Encoded examples → packed rows without padding, and the order in which they are trained on.

Legend: T packed tokens, N examples of a packed row, S targets (supervised positions).
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import IntTensor, LongTensor, Tensor

from rankrace.data.encoded import Encoded, Task
from rankrace.device import sent

IGNORED = -100
"""The target that torch's cross-entropy leaves out."""


STEP = 32
"""Tokens: the sizes of rows that others are padded to are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a packed row."""

    tokens: int
    examples: int
    longest: int
    """Tokens of the longest example."""
    targets: int

    def holds(self, other: "Size") -> bool:
        """Whether a row of the other size can be padded to this one."""
        return (
            self.tokens >= other.tokens
            and self.examples >= other.examples + made_up(self.tokens - other.tokens, self.longest)
            and self.longest >= other.longest
            and self.targets >= other.targets
        )


def made_up(spare: int, longest: int) -> int:
    """How many made-up examples fill that many tokens (the last one may be empty)."""
    return spare // longest + 1


def size_buckets(sizes: Sequence[Size], count: int) -> list[Size]:
    """At most `count` sizes, the smaller first, such that each of these rows fits into one of them."""
    by_tokens = sorted(sizes, key=lambda s: s.tokens)
    edges = np.linspace(0, len(by_tokens), min(count, len(by_tokens)) + 1).round().astype(int)
    buckets = []
    for low, high in itertools.pairwise(edges):
        group = by_tokens[low:high]
        tokens, longest = -(-group[-1].tokens // STEP) * STEP, max(s.longest for s in group)
        buckets.append(
            Size(
                tokens=tokens,
                examples=max(s.examples + made_up(tokens - s.tokens, longest) for s in group),
                longest=longest,
                targets=max(s.targets for s in group),
            )
        )
    return buckets


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """N examples in one row of T tokens. No example may attend to another: see cu_seqlens."""

    input_ids_T: LongTensor
    position_ids_T: LongTensor
    """0, 1, 2, ... from the start of each example."""
    cu_seqlens: IntTensor
    """[N+1]: example n is at tokens cu_seqlens[n] to cu_seqlens[n+1]."""
    max_seqlen: int
    """Tokens of the longest example."""
    target_positions_S: LongTensor
    """Where in T the hidden state stands that predicts each target: the token before it (causal), or the
    example's first or last token (classification)."""
    targets_S: LongTensor
    """Token ids (causal) or class indices."""
    example_S: LongTensor
    """To which of the N examples each target belongs, ascending."""
    lengths_N: list[int]
    rows_N: list[int]
    """Indices of the examples in their set."""
    token_types_T: LongTensor | None = None
    """For models such as BERT: which text of a pair each token belongs to."""

    @property
    def size(self) -> "Size":
        return Size(
            tokens=self.input_ids_T.shape[0],
            examples=len(self.lengths_N),
            longest=self.max_seqlen,
            targets=self.targets_S.shape[0],
        )

    def padded(self, size: "Size") -> "Packed":
        """The same row in a fixed size: tokens of made-up examples behind its own, and targets that do not count.

        Every real token sees what it saw before; a target of IGNORED has loss and gradient 0.
        """
        spare = size.tokens - self.size.tokens
        fill = [size.longest] * (spare // size.longest) + [spare % size.longest]
        ends = self.size.tokens + np.cumsum(fill)
        empty = size.examples - len(self.lengths_N) - len(fill)
        cu_seqlens = np.concatenate([self.cu_seqlens.numpy(), ends, np.full(empty, size.tokens, dtype=np.int32)])

        def longer(values: LongTensor, length: int, filler: int = 0) -> LongTensor:
            return _long(np.pad(values.numpy(), (0, length - len(values)), constant_values=filler))

        return replace(
            self,
            input_ids_T=longer(self.input_ids_T, size.tokens),
            position_ids_T=longer(self.position_ids_T, size.tokens),
            cu_seqlens=IntTensor(cu_seqlens.astype(np.int32)),
            max_seqlen=size.longest,
            target_positions_S=longer(self.target_positions_S, size.targets),
            targets_S=longer(self.targets_S, size.targets, IGNORED),
            example_S=longer(self.example_S, size.targets),
            lengths_N=np.diff(cu_seqlens).tolist(),
            token_types_T=None if self.token_types_T is None else longer(self.token_types_T, size.tokens),
        )

    @property
    def examples_of_targets(self) -> np.ndarray:
        """[S]: which example of the set each target belongs to."""
        return np.asarray(self.rows_N, dtype=np.int64)[self.example_S.cpu().numpy()]

    def emptied(self) -> "Packed":
        """No example at all. What it can be padded to shares nothing with the row but its kind."""
        none = {name: tensor[:0] for name, tensor in self._tensors().items()}
        none["cu_seqlens"] = self.cu_seqlens[:1]
        return replace(self, **none, max_seqlen=0, lengths_N=[], rows_N=[])

    def to(self, device: torch.device | str) -> "Packed":
        """The same row with its tensors on the device."""
        moved = {name: sent(tensor, device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return list(self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}


def pack(
    examples: Sequence[Encoded],
    indices: Sequence[int],
    task: Task,
    pooled: Literal["first", "last"] = "first",
) -> Packed:
    """Join examples into one row.

    Args:
        examples: the set; `indices` says which of it, in which order.
        pooled: classification only: the token whose hidden state the class is read from (the first in models
            such as BERT, the last in causal ones).
    """
    chosen = [examples[i] for i in indices]
    lengths_N = np.array([len(example) for example in chosen], dtype=np.int64)
    ends_N = np.cumsum(lengths_N)
    starts_N = ends_N - lengths_N
    input_ids_T = np.concatenate([example.input_ids for example in chosen]).astype(np.int64)
    types_N = [example.token_types for example in chosen if example.token_types is not None]
    if task == "causal":
        supervised_T = np.concatenate([example.supervised for example in chosen])
        supervised_T[starts_N] = False  # nothing before an example's first token may predict it
        targets_at_S = np.flatnonzero(supervised_T)
        positions_S, targets_S = targets_at_S - 1, input_ids_T[targets_at_S]
        example_S = np.searchsorted(ends_N, targets_at_S, side="right")
    else:
        positions_S = starts_N if pooled == "first" else ends_N - 1
        targets_S = np.array([example.label for example in chosen], dtype=np.int64)
        example_S = np.arange(len(chosen))
    return Packed(
        input_ids_T=_long(input_ids_T),
        position_ids_T=_long(np.arange(len(input_ids_T)) - np.repeat(starts_N, lengths_N)),
        cu_seqlens=IntTensor(np.concatenate([[0], ends_N]).astype(np.int32)),
        max_seqlen=int(lengths_N.max()),
        target_positions_S=_long(positions_S),
        targets_S=_long(targets_S),
        example_S=_long(example_S),
        lengths_N=lengths_N.tolist(),
        rows_N=[int(i) for i in indices],
        token_types_T=_long(np.concatenate(types_N)) if len(types_N) == len(chosen) else None,
    )


def _long(values: np.ndarray) -> LongTensor:
    return LongTensor(values.astype(np.int64))


@dataclass(frozen=True)
class Batch:
    """One optimiser step: micro rows, each the indices of the examples packed together."""

    micros: tuple[tuple[int, ...], ...]

    def repacked(self, lengths: Sequence[int] | np.ndarray, micro_tokens: int) -> "Batch":
        """The same examples as `epoch_batches` would pack them for another token budget."""
        return Batch(_micro_rows([i for row in self.micros for i in row], lengths, micro_tokens))


def epoch_batches(
    lengths: Sequence[int] | np.ndarray, batch_size: int, micro_tokens: int, seed: int, epoch: int
) -> list[Batch]:
    """All optimiser steps of one epoch. The last one may be smaller.

    The order depends on (seed, epoch) alone, so that any step can be worked out again without a state.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a step.
        micro_tokens: at most this many tokens in a micro row; one longer example is a row of its own.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    order = generator.permutation(len(lengths)).tolist()
    return [
        Batch(_micro_rows(order[start : start + batch_size], lengths, micro_tokens))
        for start in range(0, len(order), batch_size)
    ]


def validation_batches(lengths: Sequence[int] | np.ndarray, micro_tokens: int) -> list[tuple[int, ...]]:
    """Micro rows that cover each example once, the longest examples first."""
    return list(_micro_rows(range(len(lengths)), lengths, micro_tokens))


def _micro_rows(
    indices: Sequence[int], lengths: Sequence[int] | np.ndarray, micro_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """As few rows as filling them one after the other takes, and as even: 6,000 tokens in rows of at most 4,000 are
    two of 3,000. (Another order might do with fewer, and less even ones.)

    The longest row is what takes memory, and the shortest what leaves a chip idle.
    """
    # The longest first: what does not fit into memory shows at once.
    order = sorted(indices, key=lambda i: (-int(lengths[i]), i))
    length_N = [int(lengths[i]) for i in order]
    fewest = len(_row_starts(length_N, micro_tokens))
    evenly = bisect_left(range(micro_tokens), True, key=lambda budget: len(_row_starts(length_N, budget)) <= fewest)
    starts = _row_starts(length_N, evenly)
    return tuple(tuple(order[a:b]) for a, b in itertools.pairwise([*starts, len(order)]))


def _row_starts(length_N: Sequence[int], budget: int) -> list[int]:
    """Where rows begin that are filled one after the other; one longer example is a row of its own."""
    starts, room = [], 0
    for n, length in enumerate(length_N):
        if n == 0 or length > room:
            starts.append(n)
            room = budget
        room -= length
    return starts
