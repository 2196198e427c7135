"""One unit: a teacher, a student, a strategy. Builds the parts as `rankrace.session.prepare` does, without files.

Shapes: N held-out examples, R a candidate's rank.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from benchmarks.planted.strategies import STRATEGIES, Setup
from benchmarks.planted.teacher import Kind, Planted, Regime, plant
from rankrace.bank import Bank
from rankrace.select.learning_rate import lr_for, multiplier
from rankrace.select.objective import Held
from rankrace.select.search import Search, Setting
from rankrace.select.strategy import Bench, Look, Start, Strategy
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.model import PackedModel

MICRO_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Unit:
    kind: Kind
    rank: int
    """The planted one, r₀."""
    seed: int
    strategy: str

    @property
    def key(self) -> tuple[str, int, int, str]:
        return self.kind, self.rank, self.seed, self.strategy


@dataclass(kw_only=True)
class Recorded:
    """Any strategy, with the wide candidate's singular values written down at each look before it acts."""

    strategy: Strategy
    bank: Bank
    spectra: list[dict[str, list[float]]] = field(default_factory=list)
    """For each look: layer → the singular values of its update; empty while several candidates run."""

    @property
    def name(self) -> str:
        return self.strategy.name

    @property
    def averages(self) -> bool:
        return self.strategy.averages

    def start(self) -> tuple[Start, ...]:
        return self.strategy.start()

    def next_look(self, looks: Sequence[Look]) -> int | None:
        return self.strategy.next_look(looks)

    def look(self, step: int, looks: Sequence[Look], bench: Bench) -> Look:
        alone = len(bench.ranks) == 1
        whole = self.bank.candidates.spectra(0) if alone else {}
        self.spectra.append({name: [round(s, 3) for s in one.S_R.tolist()] for name, one in whole.items()})
        return self.strategy.look(step, looks, bench)


@lru_cache(maxsize=1)
def teacher_of(kind: Kind, rank: int, seed: int, regime: Regime) -> Planted:
    """The last one is kept: strategies of one teacher follow each other."""
    return plant(kind, rank, seed, regime)


def prepared(planted: Planted, unit: Unit, regime: Regime) -> tuple[Search, Recorded]:
    """Bank, trainer, strategy, search, ready to run."""
    bank = Bank(planted.base, seed=unit.seed)
    recipe = Recipe(
        epochs=regime.steps * regime.batch_size / len(planted.train),  # 1, unless fewer examples were sampled
        max_steps=regime.steps,
        batch_size=regime.batch_size,
        micro_tokens=MICRO_TOKENS,
        schedule="linear",
        warmup=0.03,
        weight_decay=0.0,
        clip=1.0,
        seed=unit.seed,
    )
    trainer = Trainer(PackedModel(planted.base, bank, "causal", chunk=MICRO_TOKENS), planted.train, recipe)
    with bank.off():
        base = trainer.measure(planted.looked)
    held = Held(tokens_N=base.tokens_N, cluster_N=np.array([e.group for e in planted.looked]), base_N=base.loss_KN[0])
    setup = Setup(total=trainer.total, bank=bank, planted_rank=unit.rank)
    strategy = Recorded(strategy=STRATEGIES[unit.strategy](setup), bank=bank)

    def setting(rank: int) -> Setting:
        return Setting(
            multiplier=multiplier(rank, regime.alpha, "lora"),
            lr=lr_for(rank, regime.lr, regime.alpha, "lora", {}),
        )

    return Search(trainer, strategy, planted.looked, held, setting), strategy


def described(look: Look, spectra: dict[str, list[float]], total: int, teacher: float) -> dict[str, Any]:
    """A look for the record; losses are in nats per target above the teacher's own."""
    v = look.verdict
    return {
        "step": look.step,
        "share": look.step / total,
        "pick": v.pick,
        "best": v.best,
        "gain": round(v.gain, 5),
        "source": v.points[0].source,
        "ranks": [p.rank for p in v.points],
        "excess": [round(p.loss - teacher, 5) for p in v.points],
        "se": [round(p.se, 5) for p in v.points],
        "action": look.action.kind,
        "reason": look.reason,
        "spectra": spectra,
    }


def ended(search: Search, planted: Planted) -> dict[str, Any]:
    """The candidates that trained to the end, on the examples that chose nothing."""
    measured = search.trainer.measure(planted.fresh)
    return {
        "ranks": list(search.ranks),
        "excess": [round(float(x) - planted.teacher_fresh, 5) for x in measured.mean_K],
        "per_example": [[round(float(x), 3) for x in loss_N] for loss_N in measured.loss_KN],
    }


def run_unit(unit: Unit, regime: Regime, *, only_choice: bool = False) -> dict[str, Any]:
    """The record of one unit; all but its seconds is a function of the arguments (and the versions).

    Args:
        only_choice: the training ends with the decision, so the record has no end.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    planted = teacher_of(unit.kind, unit.rank, unit.seed, regime)
    planted = replace(planted, base=deepcopy(planted.base))  # a bank changes its model
    planted_s = time.perf_counter() - began
    search, strategy = prepared(planted, unit, regime)
    search.start()
    for _ in search.run(only_choice=only_choice):
        pass
    trainer, looks = search.trainer, search.state.looks
    return {
        **asdict(unit),
        "pick": looks[-1].verdict.pick,
        "layer_ranks": planted.layer_ranks,
        "kl": round(planted.kl, 4),
        "entropy": round(planted.entropy, 4),
        "looks": [
            described(look, spectra, trainer.total, planted.teacher_looked)
            for look, spectra in zip(looks, strategy.spectra, strict=True)
        ],
        "end": None if only_choice else ended(search, planted),
        "steps": trainer.total,
        "candidate_steps": sum(e.steps for e in search.state.entries),
        "seconds": round(time.perf_counter() - began, 1),
        "teacher_s": round(planted_s, 1),
        "training_s": round(trainer.seconds, 1),
        "look_s": round(search.state.look_seconds, 1),
        "regime": asdict(regime),
        "command": f"python -m benchmarks.planted --kinds {unit.kind} --ranks {unit.rank} --seeds {unit.seed} "
        f"--strategies {unit.strategy} --steps {regime.steps}" + " --only-choice" * only_choice,
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "numpy")},
    }
