"""Memory and time of a run, before it: short passes are measured, and the rest follows from the sizes of its rows.

    forecast(RunConfig(model="HuggingFaceTB/SmolLM2-135M", data="squad_v2"), progress)

Shapes: K candidates side by side, T tokens of a packed row.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from transformers import PreTrainedModel

from rankrace.bank import Bank
from rankrace.bank.spectrum import TOGETHER
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Encoded, Task
from rankrace.data.pack import validation_batches
from rankrace.loading import load
from rankrace.plan import (
    FREE_SHARE,
    LEAST_TOKENS,
    LookPlan,
    candidate_bytes,
    flats_of,
    padding_of,
    ranks_looked_at,
    ranks_measured,
)
from rankrace.progress import Progress, peak_bytes
from rankrace.select.build import make_strategy, opens, penalty_of
from rankrace.select.opening import SHARE
from rankrace.select.race import HEATS, MOST
from rankrace.session import ready
from rankrace.training.loop import Trainer
from rankrace.training.memory import PassCost, free_bytes, held_bytes, probe
from rankrace.training.passes import Graphs, abreast

TIMED_TOKENS = 512
"""Of the pass that is timed on a CPU; on a GPU a whole step is."""
MEASURING = {"off": 1 / 2, "on": 1 / 3}
"""A forward alone takes so much of a pass, with blocks recomputed or not: the backward has no gradient of the frozen
weights."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes, by part. On a CPU the base is the whole process with the model loaded."""

    base: int
    workspace: int
    """Of libraries, since the first pass."""
    candidates: int
    """Factors, gradients, moments, and the factors in the compute type."""
    training: int
    """Activations and logits of the largest pass."""
    looking: int
    """Truncated candidates, their singular vectors, and the largest pass that measures them."""
    loading: int
    """The peak until the model stood there."""
    graphs: int
    """The smaller of `training` and `looking`: the memory of CUDA graphs is kept from passes that measure."""
    capacity: int
    """What there is, for all of it."""

    @property
    def peak(self) -> int:
        """As a finished run reports it, but for what the allocator keeps in its cache."""
        passes = max(self.training, self.looking) + self.graphs
        return max(self.loading, self.base + self.workspace + self.candidates + passes)

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """By the clock of one pass, and linear in tokens."""

    step: float
    """With the candidates that begin."""
    steps: float
    """All of them."""
    looks: float
    """Measuring the base, the candidates at each look, and the end; no singular values."""

    @property
    def whole(self) -> float:
        """But for loading and compiling."""
        return self.steps + self.looks


@dataclass(frozen=True, kw_only=True)
class Forecast:
    config: RunConfig
    """Resolved."""
    parameters: int
    """Of the base model."""
    ranks: tuple[int, ...]
    """Of the candidates that begin."""
    steps: int
    step_tokens: float
    """Of one step, for one candidate; the mean."""
    largest: tuple[int, int]
    """(K, T) of the pass that takes the most memory."""
    looks: int
    memory: Memory
    seconds: Seconds | None
    """None: it does not fit, so nothing was timed."""
    remedy: str | None
    """What would fit; None: this does."""


def forecast(config: RunConfig, progress: Progress) -> Forecast:
    """Loads data and model, runs some short passes, trains nothing, writes nothing.

    Raises:
        RankraceError: the run could not start.
    """
    data, hf_model, _, task = load(config, progress)
    progress.phase("measuring short passes")
    return forecast_of(config, data, hf_model, task)


def forecast_of(config: RunConfig, data: Data, hf_model: PreTrainedModel, task: Task) -> Forecast:
    """The same for a loaded model, which is then of no use for anything else."""
    device = hf_model.device
    loading, base = peak_bytes(), held_bytes(device)
    capacity = base + free_bytes(device)
    config, trainer, plan = ready(config, data, hf_model, task)
    bank = trainer.bank
    starts = make_strategy(config, trainer.total, bank, plan.fractions, penalty_of(config, bank)).start()
    ranks = tuple(one.rank for one in starts)
    K, R = len(ranks), max(ranks)
    bank.start(ranks, [1.0] * K)
    trainer.begin([0.0] * K)
    cost = probe(trainer.model, data.train.examples)
    candidates = candidate_bytes(bank, K, R, flats_of(config))
    # malloc gives little of a probe's memory back: on a host nothing can be read off afterwards.
    workspace = max(0, held_bytes(device) - base - candidates) if device.type == "cuda" else 0
    training, largest = largest_pass(trainer, cost, K)
    looking = look_bytes(config, trainer, cost, R, data.validation.examples)
    memory = Memory(
        base=base,
        workspace=workspace,
        candidates=candidates,
        training=training,
        looking=looking,
        loading=loading,
        graphs=min(training, looking) if config.cuda_graphs == "on" else 0,
        capacity=capacity,
    )
    return Forecast(
        config=config,
        parameters=bank.base_parameters,
        ranks=ranks,
        steps=trainer.total,
        step_tokens=step_tokens(trainer),
        largest=largest,
        looks=plan.most,
        memory=memory,
        seconds=seconds(config, data, trainer, plan, K) if memory.fits else None,
        remedy=None if memory.fits else remedy(config, memory, cost, data),
    )


def largest_pass(trainer: Trainer[Bank], cost: PassCost, K: int) -> tuple[int, tuple[int, int]]:
    """Bytes of the training pass that takes the most, and its (K, T)."""
    sizes = trainer.passes.sizes if isinstance(trainer.passes, Graphs) else trainer.sizes()
    taken = [(cost.training(size, trainer.abreast(size.tokens, K)), size.tokens) for size in sizes]
    most, tokens = max(taken)
    return round(most), (trainer.abreast(tokens, K), tokens)


def look_bytes(config: RunConfig, trainer: Trainer[Bank], cost: PassCost, R: int, examples: Sequence[Encoded]) -> int:
    """What a look takes beside the candidates that train."""
    model, bank = trainer.model, trainer.bank
    cuts = int(config.refine) if config.strategy == "grid" else ranks_looked_at(config)
    cuts = trainer.abreast_on(examples, cuts) if cuts else 0
    # Made in full precision; what measures them is a copy in the compute type, and the others go.
    made, lent = (candidate_bytes(bank, cuts, max(config.ranks), flats=n) if cuts else 0 for n in (1, 0))
    spectra = 8 * 2 * bank.trainable_parameters(R) * min(1.0, TOGETHER / len(bank.layers)) if cuts else 0
    budget = trainer.recipe.measuring_tokens
    rows = validation_batches([len(e) for e in examples], budget)
    sizes = [model.pack(examples, row).size for row in rows]
    side_by_side = max(cuts, len(config.ranks) if config.strategy == "grid" else 1)
    passes = [cost.looking(size, abreast(size.tokens, side_by_side, budget)) for size in sizes]
    return round(max(made, lent + max(passes), spectra))


def step_tokens(trainer: Trainer[Bank]) -> float:
    return sum(trainer.lengths) / trainer.per_epoch


def seconds(config: RunConfig, data: Data, trainer: Trainer[Bank], plan: LookPlan, K: int) -> Seconds:
    """From one pass, or one step, by the clock."""
    per_token = seconds_per_token(trainer, K)
    one = per_token * step_tokens(trainer)
    half = len(data.validation) // 2
    measured = measurements(config, plan, K, half, repeats=trainer.repeats)
    return Seconds(
        step=K * one,
        steps=trainer.total * one * (1 + besides(config, plan, K)),
        looks=MEASURING[config.recompute] * per_token * measured * float(data.validation.lengths.mean()),
    )


def measurements(config: RunConfig, plan: LookPlan, K: int, half: int, *, repeats: bool) -> int:
    """How many times an example goes through the model with a candidate, or the base, outside the training.

    Args:
        half: of the validation examples; as many choose at most, and as many report.
        repeats: the rows are seen more than once, so what was chosen is measured soon after.
    """
    looked, fresh = min(plan.looked, half), min(plan.fresh, half)
    opening = opens(config)  # a look at the candidates that begin, and at no other rank
    looks = ranks_measured(config, plan.most - opening) + opening * K
    ends = 2 if config.average == "on" else 1  # the last step and the average
    return (1 + looks + repeats * (1 + ends)) * looked + 2 * fresh


def besides(config: RunConfig, plan: LookPlan, K: int) -> float:
    """Steps of candidates beside the one that ends as the winner, as a share of the training."""
    together = plan.fractions[0] if config.strategy == "grid" else SHARE
    racing = (min(MOST, len(config.ranks)) - 1) * HEATS[-1] if config.strategy == "race" else 0.0
    return (K - 1) * together + racing


def seconds_per_token(trainer: Trainer[Bank], K: int) -> float:
    """Of one candidate, forward and backward."""
    device = trainer.bank.device
    examples = [i for row in trainer.batch(0).micros for i in row]
    if device.type == "cuda":
        micros, times = trainer.batch(0).micros, 3  # libraries set themselves up, graphs are captured
    else:
        # From the middle of the order by length: the step's first examples are its longest.
        examples = examples[len(examples) // 3 :] + examples[: len(examples) // 3]
        ends = list(accumulate(trainer.lengths[i] for i in examples))
        micros, times = (tuple(examples[: 1 + int(np.searchsorted(ends, TIMED_TOKENS))]),), 1
    took = 0.0
    for _ in range(times):
        began = time.perf_counter()
        trainer.accumulate(micros).tolist()  # waits for the device
        took = time.perf_counter() - began
    return took / (K * sum(trainer.lengths[i] for row in micros for i in row))


def remedy(config: RunConfig, memory: Memory, cost: PassCost, data: Data) -> str:
    """What would fit."""
    rest = memory.base + memory.workspace + memory.candidates
    tokens = cost.tokens_in(FREE_SHARE * (memory.capacity - rest), padding_of(data))
    longest = int(data.train.lengths.max())
    if memory.looking + rest > memory.capacity or memory.loading > memory.capacity or rest > memory.capacity:
        lighter = "--quantize nf4, " if config.quantize != "nf4" else ""
        return f"{lighter}a smaller model, smaller --ranks, or a device with more memory"
    if memory.graphs and memory.peak - memory.graphs <= memory.capacity:
        return "--cuda-graphs off"
    if config.recompute == "off" and tokens < longest:
        return "--recompute on"
    if tokens >= max(longest, 1):
        return f"--micro-tokens {tokens // LEAST_TOKENS * LEAST_TOKENS or tokens}" + (
            " --cuda-graphs off" if memory.graphs else ""
        )
    return f"--max-length {tokens}" if tokens > 0 else "a smaller model, or a device with more memory"
