"""Encoded examples → packed rows without padding, and the order in which they are trained on.

Legend: T packed tokens, N examples of a packed row, S targets (supervised positions).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import IntTensor, LongTensor

from rankrace.data.encoded import Encoded, Task


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

    def to(self, device: torch.device | str) -> "Packed":
        """The same row with its tensors on the device."""
        return replace(
            self,
            input_ids_T=self.input_ids_T.to(device),
            position_ids_T=self.position_ids_T.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            target_positions_S=self.target_positions_S.to(device),
            targets_S=self.targets_S.to(device),
            example_S=self.example_S.to(device),
            token_types_T=None if self.token_types_T is None else self.token_types_T.to(device),
        )


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
    # The longest first: what does not fit into memory shows at once.
    rows: list[list[int]] = []
    room = 0
    for i in sorted(indices, key=lambda i: (-int(lengths[i]), i)):
        length = int(lengths[i])
        if not rows or length > room:
            rows.append([])
            room = micro_tokens
        rows[-1].append(i)
        room -= length
    return tuple(tuple(row) for row in rows)
