"""Forward and backward over one packed row: eagerly, or by replaying a CUDA graph.

A pass over short texts is some thousands of small kernels, and launching them from Python takes several times
longer than running them. A CUDA graph launches them all at once. It wants fixed sizes: rows are padded to one of a
few, and each candidate group has graphs of its own.

Memory: torch keeps what a graph uses (its pool) from everything else. So no eager pass is to run beside the graphs:
sizes are made for all rows there will be, first all sizes run once eagerly, then that memory is given back, then all
are captured into one pool. The larger goes first each time, and the smaller finds its place in what the larger has
left.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankrace.bank.flat import Flat
from rankrace.data.pack import STEP, Packed, Size
from rankrace.training.model import PackedModel


@dataclass(frozen=True)
class Running:
    """A pass that has begun."""

    size: Size
    candidates: int
    padded: bool = False
    """To the size of a graph: one example in it is at least two then, one of them made up."""
    measures: bool = False
    """And keeps nothing for a backward."""

    @property
    def smallest(self) -> bool:
        """One example with one candidate: no pass can be smaller."""
        one = self.size.tokens - self.size.longest < STEP if self.padded else self.size.examples == 1
        return self.candidates == 1 and one


def abreast(tokens: int, K: int, budget: int) -> int:
    """How many of K candidates a row of so many tokens runs with side by side."""
    return max(1, min(K, budget // tokens))


def groups(tokens: int, K: int, budget: int) -> list[slice]:
    """Candidates side by side on a row of so many tokens, as far as the budget reaches, the rest in turn."""
    size = abreast(tokens, K, budget)
    return [slice(k, min(k + size, K)) for k in range(0, K, size)]


class Eager:
    """Runs passes as they come."""

    capturing: Running | None = None
    """It captures none."""

    def __init__(self, model: PackedModel) -> None:
        self.model = model

    def tokens(self, row: Packed) -> int:
        """Of the pass that this row makes, for one candidate."""
        return row.size.tokens

    def run(self, row: Packed, active: slice, share: Tensor) -> Tensor:
        """Adds the gradients of `share`·Σ loss to those of the active candidates.

        Returns:
            `share`·Σ loss of each active candidate, in memory that the next pass may use again.
        """
        with self.model.bank.only(active):
            loss_K = self.model.losses(row).loss_KS.sum(1) * share
            loss_K.sum().backward()
        return loss_K.detach()


class Graphs:
    """Args:
    sizes: what rows may be padded to, smallest first; a row that fits into none runs eagerly.
    budget: tokens of a pass, all candidates that run side by side in it together.
    """

    def __init__(self, model: PackedModel, sizes: Sequence[Size], budget: int) -> None:
        self.model, self.sizes, self.budget = model, sizes, budget
        self.eager = Eager(model)
        self.gradients: Flat | None = None
        self.capturing: Running | None = None
        """The pass that is being prepared, so that the right one is blamed if memory runs out."""
        self.graphs: dict[tuple[int, int, int], Graph] = {}

    def size_of(self, row: Packed) -> int | None:
        """Which size the row is padded to."""
        return next((i for i, size in enumerate(self.sizes) if size.holds(row.size)), None)

    def tokens(self, row: Packed) -> int:
        """As `Eager.tokens`, padding included."""
        index = self.size_of(row)
        return row.size.tokens if index is None else self.sizes[index].tokens

    def run(self, row: Packed, active: slice, share: Tensor) -> Tensor:
        """As `Eager.run`."""
        bank = self.model.bank
        if self.gradients is not bank.gradients:  # a graph knows its tensors by their addresses
            self.prepare(row, share)
        index = self.size_of(row)
        if index is None:
            return self.eager.run(row, active, share)
        return self.graphs[index, active.start, active.stop].replay(row.padded(self.sizes[index]), share)

    def prepare(self, row: Packed, share: Tensor) -> None:
        """Captures all passes there will be with these candidates. Nothing may have been added to their gradients."""
        self.graphs.clear()
        self.gradients = None  # the former candidates' would be kept through all of this
        torch.cuda.empty_cache()  # their memory
        gradients = self.model.bank.gradients
        empty = row.emptied()
        passes = [
            (index, empty.padded(size), active)
            for index, size in reversed(list(enumerate(self.sizes)))
            for active in groups(size.tokens, len(gradients.all_KP), self.budget)
        ]
        # Libraries and compilers set themselves up, out of any graph: alike for as many candidates of one size.
        for made_up, active in {(i, active.stop - active.start): (row, active) for i, row, active in passes}.values():
            self.capturing = Running(made_up.size, active.stop - active.start, padded=True)
            self.eager.run(made_up, active, share)
        gradients.all_KP.zero_()  # a candidate that has diverged adds NaN even here
        pool = torch.cuda.graph_pool_handle()
        for index, made_up, active in passes:
            self.capturing = Running(made_up.size, active.stop - active.start, padded=True)
            self.graphs[index, active.start, active.stop] = Graph(self.eager, made_up, active, share, pool)
        self.capturing, self.gradients = None, gradients


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """As `torch.cuda.graph`, but Python collects no garbage meanwhile.

    Among it may be the graphs of an earlier training, and CUDA ends a capture during which one is destroyed with an
    error of whatever comes next (https://github.com/pytorch/pytorch/pull/161037).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        if collects:
            gc.enable()


class Graph:
    """One captured pass, and the tensors through which rows go in and losses come out."""

    def __init__(self, eager: Eager, row: Packed, active: slice, share: Tensor, pool: Any) -> None:
        # The capture begins with giving back all memory that nobody uses, that of the eager passes too.
        self.row = row.to(share.device)
        self.share = share.clone()
        self.graph = torch.cuda.CUDAGraph()
        with captured(self.graph, pool=pool):
            self.loss_K = eager.run(self.row, active, self.share)

    def replay(self, row: Packed, share: Tensor) -> Tensor:
        for mine, new in zip(self.row.tensors(), row.tensors(), strict=True):
            mine.copy_(new.pin_memory(), non_blocking=True)  # as `sent`, into the graph's own
        self.share.copy_(share)
        self.graph.replay()
        return self.loss_K
