"""Forward and backward over one packed row: eagerly, or by replaying a CUDA graph.

A pass over short texts is some thousands of small kernels, and launching them from Python takes several times
longer than running them. A CUDA graph launches them all at once. It wants fixed sizes: rows are padded to one of a
few, and each candidate group has graphs of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankrace.bank.flat import Flat
from rankrace.data.pack import Packed, Size
from rankrace.train.model import PackedModel


class Eager:
    """Runs passes as they come."""

    def __init__(self, model: PackedModel) -> None:
        self.model = model

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
    """

    def __init__(self, model: PackedModel, sizes: Sequence[Size]) -> None:
        self.model, self.sizes = model, sizes
        self.eager = Eager(model)
        self.pool: Any = None
        self.gradients: Flat | None = None
        self.warm: set[tuple[int, int, int]] = set()
        self.graphs: dict[tuple[int, int, int], Graph] = {}

    def run(self, row: Packed, active: slice, share: Tensor) -> Tensor:
        """As `Eager.run`."""
        bank = self.model.bank
        if self.gradients is not bank.gradients:  # a graph knows its tensors by their addresses
            self.graphs.clear()
            self.warm.clear()
            self.pool = torch.cuda.graph_pool_handle()  # the old one ended with its last graph
            self.gradients = bank.gradients
        index = next((i for i, size in enumerate(self.sizes) if size.holds(row.size)), None)
        if index is None:
            return self.eager.run(row, active, share)
        row = row.padded(self.sizes[index])
        key = (index, active.start, active.stop)
        if key not in self.warm:
            # The first row of a size runs eagerly: libraries and compilers set themselves up, out of any graph.
            self.warm.add(key)
            return self.eager.run(row, active, share)
        if key not in self.graphs:
            self.graphs[key] = Graph(self.eager, row, active, share, self.pool)
        return self.graphs[key].replay(row, share)


class Graph:
    """One captured pass, and the tensors through which rows go in and losses come out."""

    def __init__(self, eager: Eager, row: Packed, active: slice, share: Tensor, pool: Any) -> None:
        self.row = row.to(share.device)
        self.share = share.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.loss_K = eager.run(self.row, active, self.share)

    def replay(self, row: Packed, share: Tensor) -> Tensor:
        for mine, new in zip(self.row.tensors(), row.tensors(), strict=True):
            mine.copy_(new)
        self.share.copy_(share)
        self.graph.replay()
        return self.loss_K
