"""A finished run as its record: session, final measurement and clock → Result."""

import math
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch

from rankrace._version import __version__
from rankrace.bank import adapter_of, lora_config
from rankrace.loading import anywhere
from rankrace.progress import peak_bytes
from rankrace.result import (
    Accuracy,
    Candidate,
    CurvePoint,
    DataFacts,
    Decision,
    LearningRate,
    Look,
    Loss,
    Memory,
    Result,
    Series,
    Source,
    Time,
)
from rankrace.result import Ending as EndingRecord
from rankrace.select.ending import Difference, Ending
from rankrace.select.reason import doubt, is_confident, reason
from rankrace.select.statistics import mean_and_se, paired_difference
from rankrace.session import Session
from rankrace.training.loop import Measured

SOURCES: tuple[Source, ...] = ("direct", "truncated")


@dataclass(kw_only=True)
class Clock:
    """Wall time of a run, over all its resumptions."""

    before: float = 0.0
    evaluation: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def total(self) -> float:
        return self.before + time.perf_counter() - self.began


def describe(session: Session, final: Measured, ending: Ending, clock: Clock) -> Result:
    """The record of a finished run.

    Args:
        final: the adapter on fresh examples.
        ending: `session.end()`.
    """
    trainer, search, config, data = session.trainer, session.search, session.config, session.data
    bank, look = trainer.bank, search.state.looks[-1]
    rank = bank.candidates.ranks[0]
    setting = search.setting(rank)
    group_N, ones_N = np.array([e.group for e in session.fresh]), np.ones(len(session.fresh))
    _, final_se = mean_and_se(final.loss_KN[0], final.tokens_N, group_N)
    _, gain_se = paired_difference(session.base_fresh.loss_KN[0], final.loss_KN[0], final.tokens_N, group_N)
    _, accuracy_se = mean_and_se(final.correct_KN[0].astype(float), ones_N, group_N)
    peft_config = lora_config(bank, adapter_of(bank, 0))
    assert isinstance(peft_config.target_modules, set | list)
    entries = search.state.entries
    return Result(
        model=anywhere(config.model),
        task="classification" if trainer.model.task == "classification" else "causal",
        strategy=search.strategy.name,
        rank=rank,
        reason=reason_of(session),
        target_modules=sorted(peft_config.target_modules),
        rank_pattern=peft_config.rank_pattern or {},
        scaling=setting.multiplier,
        learning_rate=setting.lr,
        trainable_parameters=bank.trainable_parameters(bank.candidates.ranks_of(0)),
        base_parameters=bank.base_parameters,
        quantize=config.quantize,
        labels=list(data.labels or ()),
        loss=Loss(
            base=float(session.base_fresh.mean_K[0]),
            final=float(final.mean_K[0]),
            final_se=final_se,
            gain_se=gain_se,
            examples=len(session.fresh),
        ),
        accuracy=Accuracy(
            base=float(session.base_fresh.accuracy_K[0]), final=float(final.accuracy_K[0]), final_se=accuracy_se
        ),
        curve=[
            CurvePoint(
                rank=p.rank,
                loss=p.loss,
                se=p.se,
                penalty=p.penalty,
                objective=p.objective,
                source=p.source,
                step=look.step,
                bootstrap=p.bootstrap,
            )
            for p in look.verdict.points
        ],
        decision=decision_of(session, ending.rise),
        ending=EndingRecord(
            averaged=ending.averaged,
            gain=None if ending.gain is None else ending.gain.nats,
            gain_se=None if ending.gain is None else ending.gain.se,
        ),
        candidates=[
            Candidate(
                rank=e.rank,
                status="winner" if e.status == "running" else e.status,
                steps=e.steps,
                lr_scale=e.lr_scale,
                twin=e.twin,
            )
            for e in entries
        ],
        looks=[
            Look(
                step=seen.step,
                ranks=[p.rank for p in seen.verdict.points if p.source == source],
                losses=[p.loss for p in seen.verdict.points if p.source == source],
                ses=[p.se for p in seen.verdict.points if p.source == source],
                source=source,
            )
            for seen in search.state.looks
            for source in SOURCES
            if not seen.rates and any(p.source == source for p in seen.verdict.points)
        ],
        learning_rates=[
            LearningRate(scale=rated.lr_scale, loss=rated.loss, se=rated.se)
            for seen in search.state.looks
            for rated in seen.rates
        ],
        history=[
            Series(
                rank=e.rank,
                steps=list(range(e.began + 1, e.began + 1 + e.steps)),
                losses=e.losses,
                lr_scale=e.lr_scale,
                twin=e.twin,
            )
            for e in entries
        ],
        time=Time(
            total_s=clock.total,
            search_s=search.state.look_seconds + search.state.loser_seconds,
            evaluation_s=clock.evaluation,
        ),
        tokens_per_second=trainer.tokens / trainer.seconds,
        memory=Memory(peak_bytes=peak_bytes()),
        data=DataFacts(
            train_examples=len(data.train),
            validation_examples=len(data.validation),
            supervised_tokens=data.train.supervised_tokens,
            truncated=data.train.truncated + data.validation.truncated,
            dropped=data.train.dropped + data.validation.dropped,
            sha256=data.sha256,
        ),
        notes=[*data.notes, *session.notes, *trainer.notes],
        versions=versions(bank.device),
        seed=config.seed,
    )


def reason_of(session: Session) -> str:
    look = session.search.state.looks[-1]
    share = look.step / session.trainer.total
    return reason(look, share=share, examples=len(session.search.examples))


def decision_of(session: Session, rise: Difference | None = None) -> Decision:
    """The last look, for the record; with what became of the loss since, if that is known."""
    look = session.search.state.looks[-1]
    return Decision(
        step=look.step,
        fraction=look.step / session.trainer.total,
        edge=look.edge,
        capped=look.capped,
        confident=is_confident(look),
        doubt=doubt(look),
        interval=look.verdict.interval,
        clusters=look.verdict.clusters,
        lr_scale=look.lr_scale,
        lr_edge=lr_edge(session),
        chance=look.chance,
        gain=look.verdict.gain,
        rise=None if rise is None else rise.nats,
        rise_se=None if rise is None else rise.se,
    )


def lr_edge(session: Session) -> Literal["low", "high"] | None:
    """Whether the learning rate that was chosen is the smallest or the largest of those tried, and the best."""
    look = session.search.state.looks[0]
    scales = [rated.lr_scale for rated in look.rates]
    if len(scales) < 2 or min(scales) < look.lr_scale < max(scales):
        return None
    losses = {rated.lr_scale: rated.loss for rated in look.rates if math.isfinite(rated.loss)}
    if look.lr_scale != min(losses, key=lambda scale: losses[scale]):
        return None
    return "low" if look.lr_scale == min(scales) else "high"


def versions(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"rankrace": __version__, **packages, "python": platform.python_version(), "device": name}
