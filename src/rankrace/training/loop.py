"""The training loop: one for every method and every strategy.

It runs optimiser steps over whatever K candidates the bank (or any other `Trained`) holds and measures them on
held-out examples. It knows nothing of ranks, of looks or of choices.

Out of memory: the work is taken again from its beginning in passes of half as many tokens. Candidates side by side
become fewer first, since rows get shorter only when the budget falls below theirs; no example is ever cut. Gradients
and losses are sums over passes, so the result is the same, but for dropout: its masks go by the packed rows.

Shapes: K candidates, S targets of a packed row, N examples of a set.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from rankrace.bank import Bank, Candidates, Spectrum, carried
from rankrace.data.encoded import Encoded
from rankrace.data.pack import Batch, Packed, Size, epoch_batches, size_buckets, validation_batches
from rankrace.device import OneAhead, sent, wait_for
from rankrace.errors import RankraceError
from rankrace.training.average import Average
from rankrace.training.memory import free_caches, out_of_memory
from rankrace.training.model import PackedModel
from rankrace.training.optimizer import BankAdamW, Optimizer
from rankrace.training.passes import Eager, Graphs, Running, abreast, groups
from rankrace.training.schedule import Schedule, steps_of
from rankrace.training.trained import B

R = TypeVar("R")

MOST_SIZES = 16
"""Of CUDA graphs."""
SIZED_EPOCHS = 8
"""So many are looked through for the sizes of rows; beyond them a row larger than all is rare."""
OPTIMIZER = "optimizer."
"""Before the names of its tensors in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the steps are taken."""

    epochs: float
    max_steps: int | None
    batch_size: int
    micro_tokens: int
    """Tokens of one pass that trains, over all candidates in it; a single longer example still makes a pass of its
    own."""
    schedule: Literal["linear", "cosine", "constant"]
    warmup: float
    weight_decay: float
    clip: float
    seed: int
    graphs: bool = False
    """Replay training passes as CUDA graphs."""
    longer: float = 1.0
    """So many times the tokens of a pass that trains may one have that measures: it keeps nothing for a backward."""

    @property
    def measuring_tokens(self) -> int:
        """Of a pass that measures, over all candidates in it."""
        return round(self.longer * self.micro_tokens)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """K candidates on N held-out examples."""

    loss_KN: np.ndarray
    """Nats, summed over the example's supervised tokens. float64."""
    tokens_N: np.ndarray
    """Supervised tokens of each example."""
    correct_KN: np.ndarray
    """bool: every supervised token was the most likely one, so greedy decoding gives the whole answer."""

    @property
    def mean_K(self) -> np.ndarray:
        """Nats per supervised token."""
        return self.loss_KN.sum(1) / self.tokens_N.sum()

    @property
    def accuracy_K(self) -> np.ndarray:
        return self.correct_KN.mean(1)


@dataclass(frozen=True, kw_only=True)
class PackedSet:
    """N examples as packed rows on the device, with M targets in all."""

    examples: Sequence[Encoded]
    budget: int
    """Tokens of a row, at most."""
    rows: tuple[Packed, ...]
    example_M: np.ndarray
    """The example of each target, row after row."""

    @property
    def tokens_N(self) -> np.ndarray:
        """Targets of each example."""
        return np.bincount(self.example_M, minlength=len(self.examples))

    def summed(self, x_KM: np.ndarray) -> np.ndarray:
        """[K, M] → [K, N], float64."""
        return np.stack([np.bincount(self.example_M, weights=x_M, minlength=len(self.examples)) for x_M in x_KM])


def graph_sizes(passes: float) -> int:
    """How many sizes of graphs so many passes want.

    k sizes pad a row by about 1/(4k) of its length (SQuAD, GSM8K, SST-2: docs/performance.md), and each costs as long
    as about 16 passes until it is captured: passes/(4k) + 16k is least at k = √(passes/64).
    """
    return max(2, min(MOST_SIZES, round((passes / 64) ** 0.5)))


class Trainer(Generic[B]):
    """Optimiser steps over a bank.

    All randomness is a function of (seed, epoch, step): there is no random state to keep, and a step can be
    taken again after a crash.
    """

    def __init__(self, model: PackedModel[B], train: Sequence[Encoded], recipe: Recipe) -> None:
        self.model, self.train, self.recipe = model, train, recipe
        self.bank: B = model.bank
        self.lengths = [len(e.input_ids) for e in train]
        self.per_epoch, self.total = steps_of(len(train), recipe.batch_size, recipe.epochs, recipe.max_steps)
        warmup = round(recipe.warmup * self.total)
        self.schedule = Schedule(total=self.total, warmup=warmup, kind=recipe.schedule)
        self.step = 0
        self.lr_K: tuple[float, ...] = ()
        self.tokens = 0
        self.seconds = 0.0
        self.average: Average | None = None
        """Of the values, since `follow`."""
        self._running: Running | None = None
        self._packed: PackedSet | None = None
        self._ahead = OneAhead(self.bank.device)
        self.notes: list[str] = []
        """What a person should know of how the steps went."""
        self.backed_off: int | None = None
        """The token budget of passes since memory ran out."""
        self.begin_passes()

    def begin_passes(self) -> None:
        """Fresh passes for the recipe's token budget; graphs and batches that were made for another are let go."""
        self._epoch: tuple[int, list[Batch]] = (-1, [])
        model = self.model
        self.passes = Eager(model)
        if self.recipe.graphs:
            # Rows of later epochs are put together otherwise, and one that fits no graph would run beside them.
            steps = min(self.total, SIZED_EPOCHS * self.per_epoch)
            seen = self.sizes(steps)
            sizes = size_buckets(seen, graph_sizes(len(seen) * self.total / steps))
            self.passes = Graphs(model, sizes, self.recipe.micro_tokens)

    @property
    def repeats(self) -> bool:
        """Whether rows are seen more than once."""
        return self.total > self.per_epoch

    # --- which candidates train

    def begin(self, lr_K: Sequence[float]) -> None:
        """What the bank holds now, with fresh optimiser state."""
        self.lr_K = tuple(lr_K)
        self.optimizer: Optimizer = BankAdamW(
            self.bank.values, self.bank.gradients, weight_decay=self.recipe.weight_decay, clip=self.recipe.clip
        )
        self.average = None

    def follow(self) -> None:
        """From now on the average of the values is kept too; new candidates have none."""
        self.average = Average(self.bank.values)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Measures the average for a while, then puts the values back as they were."""
        assert self.average is not None, "nobody wanted averages"
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def take_average(self) -> None:
        """The values become their average; no step can follow."""
        assert self.average is not None
        self.bank.values.all_KP.copy_(self.average.mean.all_KP)
        self.average = None

    def start(self: "Trainer[Bank]", candidates: Candidates, lr_K: Sequence[float]) -> None:
        """These candidates, with fresh optimiser state."""
        self.bank.load(candidates)
        self.begin(lr_K)

    def keep(self: "Trainer[Bank]", indices: Sequence[int]) -> None:
        """Only these candidates go on; what they have learnt, their moments and their steps are untouched."""
        self.bank.load(self.bank.candidates.keep(indices))
        self.lr_K = tuple(self.lr_K[i] for i in indices)
        assert isinstance(self.optimizer, BankAdamW)
        self.optimizer = self.optimizer.keep(self.bank.values, self.bank.gradients, indices)
        self.average = None if self.average is None else self.average.keep(self.bank.values, indices)

    def cut(
        self: "Trainer[Bank]", index: int, cuts: Candidates, whole: Mapping[str, Spectrum], lr_K: Sequence[float]
    ) -> None:
        """Truncations of one candidate, in place of all; its moments go with them, and its count of updates.

        Args:
            cuts: `candidates.truncations(index, …)`.
            whole: `candidates.spectra(index)`.
        """
        before = self.optimizer
        assert isinstance(before, BankAdamW)
        moments = carried(self.bank.candidates, index, whole, cuts, before.mean.views, before.square.views)
        self.start(cuts, lr_K)
        assert isinstance(self.optimizer, BankAdamW)
        self.optimizer.resume(*moments, updates=before.updates)

    # --- training

    def run(self, until: int) -> Iterator[Tensor]:
        """Steps until `until` are done; after each, yields the losses [K] in nats per supervised token."""
        while self.step < until:
            began = time.perf_counter()
            loss_K = self.take_step(self.batch(self.step))
            if self.step < until:
                self._ahead.queued()
            else:
                wait_for(self.bank.device)  # what comes next has a clock of its own
            self.seconds += time.perf_counter() - began
            yield loss_K

    def take_step(self, batch: Batch) -> Tensor:
        """Forward and backward over every packed row of the batch, then one update. Returns losses [K]."""
        while (loss_K := self.attempt(lambda rows=batch.micros: self.accumulate(rows))) is None:
            self.bank.gradients.all_KP.zero_()
            batch = batch.repacked(self.lengths, self.recipe.micro_tokens)
        factor = self.schedule.at(self.step)
        self.optimizer.step([lr * factor for lr in self.lr_K])
        if self.average is not None:
            self.average.add()
        self.step += 1
        self.tokens += sum(self.lengths[i] for row in batch.micros for i in row)
        return loss_K

    def accumulate(self, micros: Sequence[Sequence[int]]) -> Tensor:
        """Adds the gradients of the mean loss over these examples to the bank's. Returns losses [K]."""
        K = len(self.lr_K)
        rows = [self.model.pack(self.train, row) for row in micros]
        # One global count, so that any split into packed rows gives the same gradient.
        supervised = sum(row.targets_S.shape[0] for row in rows)
        share = sent(torch.tensor(1 / supervised, dtype=self.bank.dtype), self.bank.device)
        loss_K = torch.zeros(K, device=self.bank.device, dtype=self.bank.dtype)
        for micro, row in enumerate(rows):
            for active in groups(self.passes.tokens(row), K, self.recipe.micro_tokens):
                self._running = Running(row.size, active.stop - active.start)
                with self.bank.training(self.step, micro):
                    loss_K[active] += self.passes.run(row, active, share)
        return loss_K

    def abreast(self, tokens: int, K: int) -> int:
        """As `passes.abreast`, of a pass that trains."""
        return abreast(tokens, K, self.recipe.micro_tokens)

    def abreast_on(self, examples: Sequence[Encoded], K: int) -> int:
        """How many of K candidates are measured side by side on these examples."""
        lengths, budget = [len(e) for e in examples], self.recipe.measuring_tokens
        rows = validation_batches(lengths, budget)
        return abreast(max(sum(lengths[i] for i in row) for row in rows), K, budget)

    def batch(self, step: int) -> Batch:
        epoch, index = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            r = self.recipe
            self._epoch = (
                epoch,
                epoch_batches(self.lengths, r.batch_size, r.micro_tokens, seed=r.seed, epoch=epoch),
            )
        return self._epoch[1][index]

    def sizes(self, steps: int | None = None) -> list[Size]:
        """Of the packed rows of the first steps, or of an epoch."""
        causal = self.model.task == "causal"
        targets = [int(e.supervised[1:].sum()) if causal else 1 for e in self.train]
        rows = [row for i in range(steps or self.per_epoch) for row in self.batch(i).micros]
        return [
            Size(
                tokens=sum(self.lengths[i] for i in row),
                examples=len(row),
                longest=max(self.lengths[i] for i in row),
                targets=sum(targets[i] for i in row),
            )
            for row in rows
        ]

    # --- running out of memory

    def attempt(self, work: Callable[[], R]) -> R | None:
        """What the work gives; None: memory ran out, passes are smaller from now on, and it has to be done again.

        Raises:
            RankraceError: passes cannot be smaller.
        """
        self._running = None
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            failed = self.passes.capturing or self._running
            if failed is None or not out_of_memory(error):
                raise
        # Out here the error is gone, and with it the frames that held on to what the pass had made.
        self.back_off(failed)
        return None

    def back_off(self, failed: Running) -> None:
        """Passes of at most half as many tokens as this one from now on."""
        tokens = failed.size.tokens * failed.candidates
        if failed.smallest:
            raise RankraceError(
                f"out of memory: an example of {tokens:,} tokens does not fit on {self.bank.device}",
                why="one example with one candidate is the smallest pass there is",
                fix="--recompute on, a lower --max-length, a smaller model, or a device with more memory",
            )
        longer = failed.measures and tokens > self.recipe.micro_tokens  # than any that trains, and for speed alone
        budget = self.recipe.micro_tokens if longer else min(tokens // 2, self.recipe.micro_tokens)
        self.limit(budget)
        self.bank.refresh()
        free_caches()
        self.notes.append(
            f"Out of memory in a pass of {tokens:,} tokens ({failed.size.tokens:,} × {failed.candidates}) at step "
            f"{self.step + 1}: taken again, from now on with at most {budget:,} tokens a pass."
        )

    def limit(self, budget: int) -> None:
        """Passes of at most so many tokens from now on, those that measure too, for want of memory."""
        self.backed_off, before = budget, self.recipe.micro_tokens
        self.recipe = replace(self.recipe, micro_tokens=budget, longer=1.0)
        if budget != before:
            self.begin_passes()

    # --- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Of the optimiser and the average; the values are the bank's own matter."""
        optimizer = {OPTIMIZER + name: tensor for name, tensor in self.optimizer.state().items()}
        return optimizer if self.average is None else {**optimizer, "average": self.average.mean.all_KP}

    def state(self) -> dict[str, Any]:
        """What is no tensor."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "averaged": None if self.average is None else self.average.steps,
            "notes": self.notes,
            "backed_off": self.backed_off,
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Goes on from there with the bank's values, once they are those of that moment and `begin` was called.

        Where memory ran out before it will again, and passes that are cut otherwise draw other dropout. Older
        checkpoints hold no notes, and some nothing of an average.
        """
        budget = state.get("backed_off")
        if budget is not None and budget <= self.recipe.micro_tokens:
            self.limit(budget)
        moments = {n.removeprefix(OPTIMIZER): x for n, x in tensors.items() if n.startswith(OPTIMIZER)}
        self.optimizer.load_state(moments)
        if state.get("averaged") is not None:
            self.follow()
            assert self.average is not None
            self.average.steps = state["averaged"]
            self.average.mean.all_KP.copy_(tensors["average"])
        else:
            self.average = None
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        earlier = state.get("notes", [])
        self.notes = [*earlier, *(note for note in self.notes if note not in earlier)]

    # --- measuring

    def measure(self, examples: Sequence[Encoded]) -> Measured:
        """The bank's candidates (or, switched off, the base) on held-out examples; dropout is off.

        Raises:
            RankraceError: out of memory, and passes cannot be smaller.
        """
        while (measured := self.attempt(lambda: self.measure_all(examples))) is None:
            pass
        return measured

    @torch.no_grad()
    def measure_all(self, examples: Sequence[Encoded]) -> Measured:
        K, held_out = self.bank.running, self.packed_once(examples)
        losses, wrongs = [torch.zeros(K, 0)], [torch.zeros(K, 0, dtype=torch.bool)]
        for row in held_out.rows:
            tokens = []
            for active in groups(row.size.tokens, K, self.recipe.measuring_tokens):
                self._running = Running(row.size, active.stop - active.start, measures=True)
                with self.bank.only(active):
                    tokens.append(self.model.losses(row))
            losses.append(torch.cat([t.loss_KS for t in tokens]))
            wrongs.append(torch.cat([~t.correct_KS for t in tokens]))
        # Only now is the device waited for: a wait after each pass would leave it idle in between.
        loss_KM, wrong_KM = (np.concatenate([x.cpu().numpy() for x in each], axis=1) for each in (losses, wrongs))
        return Measured(
            loss_KN=held_out.summed(loss_KM),
            tokens_N=held_out.tokens_N,
            correct_KN=held_out.summed(wrong_KM) == 0,
        )

    def packed_once(self, examples: Sequence[Encoded]) -> "PackedSet":
        """The examples as rows on the device; the last ones asked for are kept, since looks ask for the same."""
        budget, packed = self.recipe.measuring_tokens, self._packed
        if packed is None or packed.examples is not examples or packed.budget != budget:
            rows = [self.model.pack(examples, row) for row in validation_batches([len(e) for e in examples], budget)]
            packed = self._packed = PackedSet(
                examples=examples,
                budget=budget,
                rows=tuple(row.to(self.bank.device) for row in rows),
                example_M=np.concatenate([np.zeros(0, np.int64), *(row.examples_of_targets for row in rows)]),
            )
        return packed
