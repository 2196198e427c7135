"""What a pass takes in memory, measured on four short rows; and how running out of it is told from other errors.

Shapes: K candidates, T tokens of a packed row, M targets, D model width, N examples of a row,
L tokens of the longest.
"""

import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rankrace.data.encoded import Encoded
from rankrace.data.pack import Packed, Size
from rankrace.training.loss import chunked_cross_entropy
from rankrace.training.model import PackedModel

PROBE_LENGTH = 256
"""Tokens of the longest example in a probe, if any is as long; rows of 256 and 512 fit where any training does."""
HOST_SLACK = 1.15
"""Memory of a process over that of its tensors: libraries' buffers, and gaps that malloc leaves (docs/log.md)."""


NO_MEMORY = (
    "you tried to allocate",  # the host's allocator has no error of its own
    "CUDA error: out of memory",  # the driver, of what torch's allocator does not serve: graphs, pinned memory
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""In errors of other kinds that mean it, too."""


def out_of_memory(error: BaseException) -> bool:
    """Whether this error, or one that it came of, says that memory ran out."""
    told: BaseException | None = error
    while told is not None:
        if isinstance(told, torch.OutOfMemoryError | MemoryError) or any(words in str(told) for words in NO_MEMORY):
            return True
        told = told.__context__  # a CUDA graph that is being captured dies of it with another error
    return False


def free_caches() -> None:
    """Gives back what nobody uses any more."""
    gc.collect()  # a pass that failed may have left cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- gauges


class Allocator:
    """Bytes that came into being since it was switched on and still live, and the most since the last `restart`:
    what torch's allocator counts on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> "Allocator":
        self.before = torch.cuda.memory_allocated(self.device)
        self.restart()
        return self

    def __exit__(self, *_: Any) -> None: ...

    @property
    def bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self.before

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class Meter(TorchDispatchMode):
    """The same where no allocator counts: all storages that operations made.

    What was there before (weights, factors, their gradients, optimiser state) does not count; a view or the
    result of an operation in place is no new storage. What an operation uses within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()
        self.bytes = 0
        self.peak = 0
        self.shapes: set[torch.Size] = set()

    def restart(self) -> None:
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            self.shapes.add(tensor.shape)
            storage = tensor.untyped_storage()
            where, size = storage.data_ptr(), storage.nbytes()
            if size and where not in given and where not in self.live:
                self.live.add(where)
                self.bytes += size
                weakref.finalize(storage, self.freed, where, size)
        self.peak = max(self.peak, self.bytes)
        return result

    def freed(self, where: int, size: int) -> None:
        self.live.remove(where)
        self.bytes -= size


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def gauge(device: torch.device) -> Allocator | Meter:
    return Allocator(device) if device.type == "cuda" else Meter()


def held_bytes(device: torch.device) -> int:
    """What is taken now: of the device where it has an allocator that counts, else by the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int:
    """What may still be taken, torch's own cache included."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


# --- probing


@dataclass(frozen=True, kw_only=True)
class Plane:
    """fixed + token·(tokens) + cell·(cells) + target·(targets); cells are N·L: what a row takes when it is padded.

    Only the attention is padded, and only where flash attention cannot run; elsewhere a cell takes nothing. A target
    takes its part of the last block.
    """

    fixed: float
    token: float
    cell: float
    target: float = 0.0

    def at(self, size: Size) -> float:
        return self.fixed + self.token * size.tokens + self.cell * cells(size) + self.target * size.targets

    def plus(self, other: "Plane") -> "Plane":
        return Plane(
            fixed=self.fixed + other.fixed,
            token=self.token + other.token,
            cell=self.cell + other.cell,
            target=self.target + other.target,
        )

    def times(self, longer: float) -> "Plane":
        return Plane(
            fixed=longer * self.fixed,
            token=longer * self.token,
            cell=longer * self.cell,
            target=longer * self.target,
        )

    def each(self, padding: float) -> float:
        """Of a token that is a target too, with so many cells."""
        return self.token + padding * self.cell + self.target

    @staticmethod
    def through(sizes: Sequence[Size], figures: Sequence[float]) -> "Plane":
        """Four points; where they lie in fewer dimensions (texts of one token), the flattest one."""
        places = np.array([[1, s.tokens, cells(s), s.targets] for s in sizes], dtype=np.float64)
        fixed, token, cell, target = np.linalg.lstsq(places, np.array(figures, dtype=np.float64))[0].tolist()
        return Plane(fixed=fixed, token=token, cell=cell, target=target)


def cells(size: Size) -> int:
    return size.examples * size.longest


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Bytes of a pass, beyond what lies there between passes.

    The logits come while all that the backward needs is kept, and are gone when it begins:
    peak = max(kept + logits, backward).
    """

    kept: Plane
    """From the forward for the backward, with one candidate."""
    backward: Plane
    """The most at a moment of the backward, with one candidate."""
    measuring: Plane
    """The most in a forward alone, but for the logits, with one candidate."""
    target: float
    """The logits of one target, with their gradients."""
    chunk: int
    """That many targets' logits exist at once."""
    slack: float
    """What is taken for each byte of a tensor."""

    def training(self, size: Size, K: int) -> float:
        """The peak over forward and backward of a row with K candidates side by side."""
        return self.slack * max(K * self.kept.at(size) + self.logits(size, K), K * self.backward.at(size))

    def looking(self, size: Size, K: int) -> float:
        """The peak of a forward alone."""
        return self.slack * (K * self.measuring.at(size) + self.logits(size, K))

    def logits(self, size: Size, K: int) -> float:
        return self.target * min(K * size.targets, self.chunk)

    def apart(self, longer: float) -> "PassCost":
        """Of a pass whose memory a CUDA graph keeps: one that measures, so much longer, has to fit beside it."""
        look = self.measuring.times(longer).plus(Plane(fixed=self.target * self.chunk, token=0.0, cell=0.0))
        return replace(self, kept=self.kept.plus(look), backward=self.backward.plus(look))

    def tokens_in(self, room: float, padding: float) -> int:
        """Tokens of the largest pass that fits into so many bytes, whatever its targets.

        Args:
            padding: cells for each token.
        """
        left = room / self.slack
        forward = (left - self.target * self.chunk - self.kept.fixed) / self.kept.each(padding)
        backward = (left - self.backward.fixed) / self.backward.each(padding)
        return max(0, int(min(forward, backward)))


def probe(model: PackedModel[Any], examples: Sequence[Encoded]) -> PassCost:
    """Runs the first candidate over four short rows, forward and backward, and the head over a chunk.

    Some seconds on a CPU. The gradients are zero afterwards.
    """
    rows = probe_rows(model, examples)
    one_pass(model, rows[0])  # libraries set themselves up
    figures = [one_pass(model, row) for row in rows]
    model.bank.gradients.all_KP.zero_()
    kept, backward, measuring = (Plane.through([row.size for row in rows], f) for f in zip(*figures, strict=True))
    return PassCost(
        kept=kept,
        backward=backward,
        measuring=measuring,
        target=head_bytes(model, model.chunk) / model.chunk if model.task == "causal" else 0.0,
        chunk=model.chunk,
        slack=1.0 if model.bank.device.type == "cuda" else HOST_SLACK,
    )


def one_pass(model: PackedModel[Any], row: Packed) -> tuple[int, int, int]:
    """What PassCost wants of one row: kept, backward, measuring."""
    device = model.bank.device
    row = row.to(device)
    with model.bank.only(slice(0, 1)):
        with gauge(device) as taken:
            loss = model.losses(row).loss_KS.sum()
            kept = taken.bytes
            taken.restart()
            loss.backward()
            backward = taken.peak
        with torch.no_grad(), gauge(device) as taken:
            model.hidden_read(row, 1)
            measuring = taken.peak
    return kept, backward, measuring


def head_bytes(model: PackedModel[Any], targets: int) -> int:
    """What the loss of so many targets takes, given the hidden states."""
    device = model.bank.device
    width = model.model.config.get_text_config().hidden_size
    h_MD = torch.zeros(targets, width, dtype=model.model.dtype, device=device, requires_grad=True)
    targets_M = torch.zeros(targets, dtype=torch.long, device=device)
    with gauge(device) as taken:
        chunked_cross_entropy(h_MD, targets_M, model.token_logits, model.chunk, model.trained_head())
        return taken.peak


def probe_rows(model: PackedModel[Any], examples: Sequence[Encoded]) -> list[Packed]:
    """Examples of one length, the same twice as long, and the first ones' tokens in lengths of 3 to 1 and with other
    numbers of targets: a classifier has as many as examples."""
    longest = max(examples, key=len)
    part = max(1, min(PROBE_LENGTH, len(longest)) // 4)
    pairs = -(-PROBE_LENGTH // (4 * part))
    share = sum(int(e.supervised.sum()) for e in examples) / sum(len(e) for e in examples)

    def row(*lengths: int, share: float = share) -> Packed:
        return model.pack([cut(longest, length, share) for length in lengths * pairs], range(len(lengths) * pairs))

    even = row(2 * part, 2 * part)
    if model.task == "causal":
        other = row(2 * part, 2 * part, share=share / 2 if share > 0.25 else 0.5)
    else:
        other = row(part, part, part, part)
    return [even, row(4 * part, 4 * part), row(3 * part, part), other]


def cut(example: Encoded, length: int, share: float) -> Encoded:
    """The example's first tokens, again and again if it has fewer, of which the last ones are supervised."""
    types = example.token_types
    return replace(
        example,
        input_ids=np.resize(example.input_ids, length),
        supervised=np.arange(length) >= length - max(1, round(share * length)),
        token_types=None if types is None else np.resize(types, length),
    )
