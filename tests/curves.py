"""Held-out losses with a known mean at every rank, for tests of the choice.

Shapes: N held-out examples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rankrace.select.objective import Held, Source, Trial

# LoRA paper (Hu et al. 2021), table 18: GPT-2 Medium on E2E, validation loss by rank.
GPT2_MEDIUM = {
    1: 1.23, 2: 1.21, 4: 1.18, 8: 1.17, 16: 1.16, 32: 1.16, 64: 1.16, 128: 1.16, 256: 1.16, 512: 1.16, 1024: 1.17,
}  # fmt: skip

# SmolLM2-135M-Instruct on GSM8K, 240 steps, by share of the training: every rank trained by itself …
GSM8K_DIRECT = {
    0.025: {1: 1.0542, 2: 1.0560, 4: 1.0694, 8: 1.0753, 16: 1.0743, 32: 1.0758, 64: 1.0765},
    0.10: {1: 0.8085, 2: 0.8120, 4: 0.8153, 8: 0.8153, 16: 0.8147, 32: 0.8144, 64: 0.8150},
    0.15: {1: 0.7735, 2: 0.7699, 4: 0.7696, 8: 0.7684, 16: 0.7679, 32: 0.7676, 64: 0.7678},
    1.00: {1: 0.6644, 2: 0.6529, 4: 0.6480, 8: 0.6449, 16: 0.6425, 32: 0.6413, 64: 0.6403},
}
# … and truncated from the candidate of rank 64.
GSM8K_TRUNCATED = {
    0.10: {1: 0.8938, 2: 0.8462, 4: 0.8256, 8: 0.8199, 16: 0.8181, 32: 0.8159, 64: 0.8144},
    1.00: {1: 0.7899, 2: 0.7154, 4: 0.6707, 8: 0.6525, 16: 0.6450, 32: 0.6417, 64: 0.6401},
}
GSM8K_BASE = 1.45
"""Without adapter; measured on 24 test rows."""


def held_out(examples: int = 64, *, base: float = 3.0, seed: int = 0, clusters: int | None = None) -> Held:
    """Examples of 1 to 40 supervised tokens, `clusters` documents (each its own by default)."""
    tokens_N = np.random.default_rng(seed).integers(1, 41, examples)
    cluster_N = np.arange(examples) % (clusters or examples)
    return Held(tokens_N=tokens_N, cluster_N=cluster_N, base_N=base * tokens_N)


def trial(rank: int, loss: float, held: Held, *, noise: float = 0.0, source: Source = "direct") -> Trial:
    """Exactly this mean loss; examples scatter around it by `noise`, independently from rank to rank.

    So the standard error of a paired difference is about noise·√(2/N).
    """
    z_N = np.random.default_rng(rank).normal(size=len(held.tokens_N))
    z_N -= (z_N * held.tokens_N).sum() / held.tokens_N.sum()
    return Trial(rank=rank, loss_N=(loss + noise * z_N) * held.tokens_N, source=source)


def trials(curve: dict[int, float], held: Held, *, noise: float = 0.0) -> list[Trial]:
    return [trial(rank, loss, held, noise=noise) for rank, loss in curve.items()]


@dataclass(kw_only=True)
class Curves:
    """A bench whose losses are known functions of the rank, at every look the same unless told otherwise."""

    held: Held
    ranks: tuple[int, ...]
    truncation: Callable[[int], float]
    """rank → loss of the truncation."""
    own: dict[int, float] = field(default_factory=dict)
    """rank → loss of the candidate itself."""
    noise: float = 0.0
    mean: dict[int, float] = field(default_factory=dict)
    """rank → loss of the candidate's average, where it is not the candidate's own."""
    pooling: Callable[[int], float] | None = None
    """rank → loss of the truncation with that many parameters spread over the layers, where it is another."""
    asked: list[tuple[int, int]] = field(default_factory=list)
    """Truncations measured: (candidate, rank)."""

    def direct(self) -> list[Trial]:
        return [trial(r, self.own[r], self.held, noise=self.noise) for r in self.ranks]

    def averaged(self) -> list[Trial]:
        means = {**self.own, **self.mean}
        return [trial(r, means[r], self.held, noise=self.noise) for r in self.ranks]

    def pooled(self, index: int, rank: int) -> tuple[Trial, dict[str, int]]:
        loss = (self.pooling or self.truncation)(rank)
        found = trial(rank, loss, self.held, noise=self.noise, source="truncated")
        return found, {"q_proj": rank + 1, "v_proj": rank - 1}

    def truncated(self, index: int, ranks: Sequence[int]) -> list[Trial]:
        assert all(r <= self.ranks[index] for r in ranks)
        self.asked += [(index, r) for r in ranks]
        return [trial(r, self.truncation(r), self.held, noise=self.noise, source="truncated") for r in ranks]
