"""Runs a strategy over a trainer: steps, looks, cuts.

Shapes: K candidates, N held-out examples.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rankrace.bank import Bank, Candidates, Spectrum, allocate
from rankrace.data.encoded import Encoded
from rankrace.device import wait_for
from rankrace.errors import RankraceError
from rankrace.select.learning_rate import scale_at
from rankrace.select.objective import Held, Source, Trial
from rankrace.select.strategy import Cut, Keep, Look, Strategy
from rankrace.training.loop import Trainer
from rankrace.training.memory import free_caches, out_of_memory


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a rank implies: its multiplier s and its peak learning rate."""

    multiplier: float
    lr: float


@dataclass(kw_only=True)
class Entry:
    """One candidate's life, for the record."""

    rank: int
    began: int
    steps: int = 0
    status: Literal["running", "dropped", "diverged"] = "running"
    seconds: float = 0.0
    """Of its steps, up to the last look: an equal part of the time of those that ran beside it."""
    losses: list[float] = field(default_factory=list)
    """Training loss of each step, nats per supervised token."""
    lr_scale: float = 1.0
    """Of the rank's own learning rate."""
    twin: bool = False
    """It began with a second draw of the factors."""

    @property
    def name(self) -> str:
        """What tells it from the others: its rank, and why there is more than one of it."""
        scale = f"×{self.lr_scale:.3g}" if self.lr_scale != 1 else ""
        return f"{self.rank}{scale}" + (" twin" if self.twin else "")


@dataclass(kw_only=True)
class SearchState:
    """All that a resumed search needs beside the trainer's state."""

    looks: list[Look] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    look_seconds: float = 0.0
    """Measuring, SVDs."""
    loser_seconds: float = 0.0
    """Of the steps' time what went to candidates which were dropped."""


class Search:
    """Args:
    examples: the held-out examples on which candidates are compared.
    setting: rank → multiplier and learning rate.
    follow: keep the average of the winner's values, from the choice on, if there are steps after it.
    """

    def __init__(
        self,
        trainer: Trainer[Bank],
        strategy: Strategy,
        examples: Sequence[Encoded],
        held: Held,
        setting: Callable[[int], Setting],
        *,
        follow: bool = False,
    ) -> None:
        self.trainer, self.strategy, self.examples, self._held = trainer, strategy, examples, held
        self.own_setting, self.follow = setting, follow
        self.state = SearchState()
        self._unread: list[Tensor] = []
        self._spectra: tuple[tuple[int, int], dict[str, Spectrum]] = ((-1, -1), {})

    # --- driving

    def start(self) -> None:
        """Fresh candidates, as the strategy wants them."""
        starts = self.strategy.start()
        ranks = [one.rank for one in starts]
        settings = [self.setting(r) for r in ranks]
        self.trainer.bank.start(ranks, [s.multiplier for s in settings], [one.draw for one in starts])
        self.trainer.begin([s.lr * one.lr_scale for s, one in zip(settings, starts, strict=True)])
        self.state.entries = [
            Entry(rank=one.rank, began=0, lr_scale=one.lr_scale, twin=one.draw > 0) for one in starts
        ]
        if self.strategy.averages and len(self.ranks) > 1:
            self.trainer.follow()

    def setting(self, rank: int) -> Setting:
        """With the learning rate's scale as it was chosen, if it was."""
        own = self.own_setting(rank)
        return replace(own, lr=own.lr * self.lr_scale(rank))

    def lr_scale(self, rank: int) -> float:
        """Of the rank's own rate: what was chosen at the rank that began."""
        looks = self.state.looks
        return scale_at(rank, looks[-1].lr_scale, self.state.entries[0].rank) if looks else 1.0

    @property
    def decided(self) -> bool:
        return bool(self.state.looks) and self.state.looks[-1].final

    def run(self, *, only_choice: bool = False) -> Iterator[Tensor]:
        """Trains to the end (or to the decision); yields the losses [K] after each step."""
        while True:
            look_at = self.strategy.next_look(self.state.looks)
            if look_at is None and only_choice:
                return
            until = self.trainer.total if look_at is None else look_at
            assert until <= self.trainer.total, f"{self.strategy.name} would look after step {until}, past the end"
            for loss_K in self.trainer.run(until):
                self._unread.append(loss_K)
                yield loss_K
            if look_at is None:
                self.read_losses()
                return
            self.take_look()

    def take_look(self) -> None:
        self.read_losses()
        wait_for(self.trainer.bank.device)  # the steps that are still queued are no part of the look
        began = time.perf_counter()
        look = self.strategy.look(self.trainer.step, self.state.looks, self)
        self.apply(look)
        self._spectra = ((-1, -1), {})
        self.state.looks.append(look)
        if look.note:
            self.trainer.notes.append(look.note)
        wait_for(self.trainer.bank.device)  # cuts are
        self.state.look_seconds += time.perf_counter() - began

    def apply(self, look: Look) -> None:
        """Carries out what a look decided."""
        running = self.running
        unbilled = self.trainer.seconds - sum(e.seconds for e in self.state.entries)
        for e in running:
            e.seconds += unbilled / len(running)
        match look.action:
            case Keep(indices=indices):
                # By place: after one step candidates of one rank have equal records.
                self.retire([e for i, e in enumerate(running) if i not in indices])
                self.trainer.keep(indices)
            case Cut(index=index, ranks=ranks, allocation=allocation):
                self.retire(running, source=running[index])
                cuts = self.cut(index, ranks, allocation)
                self.trainer.cut(index, cuts, self.spectra(index), [self.setting(r).lr for r in ranks])
                step = self.trainer.step
                self.state.entries += [Entry(rank=r, began=step, lr_scale=self.lr_scale(r)) for r in ranks]
        if len(self.ranks) == 1:
            self.trainer.average = None
        if look.final and self.follow and self.trainer.step < self.trainer.total:
            self.trainer.follow()

    def spectra(self, index: int) -> dict[str, Spectrum]:
        """Of one present candidate; kept for the rest of a look."""
        key = (self.trainer.step, index)
        if self._spectra[0] != key:
            self._spectra = key, self.trainer.bank.candidates.spectra(index)
        return self._spectra[1]

    def cut(self, index: int, ranks: Sequence[int], allocation: dict[str, int] | None = None) -> Candidates:
        """The best approximations of one present candidate's update."""
        multipliers = [self.setting(r).multiplier for r in ranks]
        return self.trainer.bank.candidates.truncations(
            index, ranks, multipliers, self.spectra(index), [allocation] * len(ranks)
        )

    def retire(self, entries: list[Entry], source: Entry | None = None) -> None:
        """Ends candidates. Their steps were spent on the choice, unless the winner was cut from them."""
        self.state.loser_seconds += sum(e.seconds for e in entries if e is not source)
        for e in entries:
            e.status = "dropped" if not e.losses or math.isfinite(e.losses[-1]) else "diverged"

    def read_losses(self) -> None:
        """Moves the losses of finished steps from the device into the record; one wait for many steps."""
        if not self._unread:
            return
        began = time.perf_counter()
        columns = torch.stack(self._unread).T.tolist()
        self.trainer.seconds += time.perf_counter() - began  # the host was ahead: the steps end only now
        for column, entry in zip(columns, self.running, strict=True):
            entry.losses += column
            entry.steps += len(column)
        self._unread = []

    def latest_losses(self) -> list[float]:
        """Of the running candidates; waits for the last step."""
        self.read_losses()
        return [entry.losses[-1] for entry in self.running]

    # --- measuring, for the strategy

    @property
    def held(self) -> Held:
        return replace(self._held, epochs=self.trainer.step / self.trainer.per_epoch)

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.trainer.bank.candidates.ranks

    @property
    def running(self) -> list[Entry]:
        """The candidates that train, in their order."""
        return [entry for entry in self.state.entries if entry.status == "running"]

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.running]

    def direct(self) -> list[Trial]:
        return self.trials(self.ranks, "direct")

    def averaged(self) -> list[Trial]:
        with self.trainer.averaged():
            return self.trials(self.ranks, "direct")

    def truncated(self, index: int, ranks: Sequence[int]) -> list[Trial]:
        if not self.finite(index):
            lost_N = np.full(len(self.examples), np.nan)
            return [Trial(rank=r, loss_N=lost_N, source="truncated") for r in ranks]
        trials, left = [], list(ranks)
        # Cuts that would only wait for others take memory for nothing.
        together = self.trainer.abreast_on(self.examples, len(ranks))
        while left:
            some = left[:together]
            found = self.cut_and_measured(index, some)
            if found is None:
                together = len(some) // 2
                continue
            trials, left = trials + found, left[together:]
        return trials

    def cut_and_measured(
        self, index: int, ranks: Sequence[int], allocation: dict[str, int] | None = None
    ) -> list[Trial] | None:
        """None: there is no memory for so many cuts beside each other.

        Raises:
            RankraceError: not even for one.
        """
        try:
            with self.trainer.bank.borrowed(self.cut(index, ranks, allocation)):
                return self.trials(ranks, "truncated")
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Out here the error is gone, and with it the frames that held what was made.
        free_caches()
        if len(ranks) == 1:
            raise RankraceError(
                f"out of memory: a candidate cut to rank {ranks[0]} does not fit on {self.trainer.bank.device}",
                why="a look holds one cut at least, beside what trains",
                fix="smaller --ranks, --quantize nf4, a smaller model, or a device with more memory",
            )
        return None

    def pooled(self, index: int, rank: int) -> tuple[Trial, dict[str, int]]:
        costs, whole = self.trainer.bank.costs, self.spectra(index)
        allocation = allocate(whole, costs, rank * sum(costs.values()))
        trials = self.cut_and_measured(index, [rank], allocation)
        assert trials is not None, "of one cut there is a result or an error"
        return trials[0], allocation

    def trials(self, ranks: Sequence[int], source: Source) -> list[Trial]:
        """Measures what the bank holds."""
        loss_KN = self.trainer.measure(self.examples).loss_KN
        return [Trial(rank=r, loss_N=x, source=source) for r, x in zip(ranks, loss_KN, strict=True)]

    def finite(self, index: int) -> bool:
        return bool(self.trainer.bank.values.all_KP[index].isfinite().all())
