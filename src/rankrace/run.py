"""A run from configuration to adapter: data → model → search and training → adapter, result, report.

rankrace.train(RunConfig(model="HuggingFaceTB/SmolLM2-135M", data="squad_v2", out="runs/squad"))
"""

import os
import platform
import shlex
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankrace._version import __version__
from rankrace.bank import adapter_of, check_quantize, lora_config, save_adapter
from rankrace.config import RunConfig
from rankrace.data import Data, encode_splits, make_encoder, read_splits
from rankrace.data.checks import checked_data
from rankrace.data.encoded import Task
from rankrace.data.hub import reach_hub
from rankrace.errors import RankraceError
from rankrace.interrupt import Interrupted, Interrupts
from rankrace.output import MAY_DIFFER, OutputFolder, writing
from rankrace.progress import Progress, peak_bytes
from rankrace.report.card import write_card
from rankrace.report.page import write_report
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
from rankrace.select.reason import is_confident, reason
from rankrace.select.statistics import mean_and_se
from rankrace.session import Session, chosen_device, chosen_dtype, prepare
from rankrace.track import Curves, check_tracker, tracked
from rankrace.training.checkpoint import load_checkpoint, save_checkpoint, written_whole
from rankrace.training.loop import Measured
from rankrace.training.model import is_encoder, load_model, load_tokenizer, vocabulary_size

SOURCES: tuple[Source, ...] = ("direct", "truncated")
SAVES = 20
"""Checkpoints of a run, unless save_every says otherwise."""


@dataclass(kw_only=True)
class Clock:
    """Wall time of a run, over all its resumptions."""

    before: float = 0.0
    evaluation: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def total(self) -> float:
        return self.before + time.perf_counter() - self.began


def train(config: RunConfig) -> Result:
    """Runs, or resumes, to the end.

    Raises:
        RankraceError: something the user can put right; nothing half-written is left.
        Interrupted: Ctrl-C; the run was saved first.
    """
    check_tracker(config.track)
    folder = OutputFolder(config.out)
    finished = folder.check(config)
    started = folder.started()
    if started is not None:
        config = continued(started, config)
    with Progress() as progress:
        if finished is not None:
            progress.say(f"This run is finished: {folder.report}")
            return finished
        session, tokenizer, clock = open_session(config, progress)
        folder.claim(session.config)
        found = load_checkpoint(folder.checkpoints)
        if found is not None:
            tensors, state = found
            session.restore(tensors, state["session"])
            clock.before, clock.evaluation = state["seconds"], state["evaluation_seconds"]
            progress.say(f"Resumed after step {session.trainer.step} of {session.trainer.total}.")
        with (
            Interrupts() as interrupts,
            tracked(session.config, session.search.state, session.trainer.step) as curves,
        ):
            try:
                drive(session, folder, clock, progress, interrupts, curves)
                result = finish(session, tokenizer, folder, clock, progress, interrupts)
                curves.end(result)
                return result
            except KeyboardInterrupt:
                raise Interrupted(resume_command(folder)) from None


def continued(started: RunConfig, now: RunConfig) -> RunConfig:
    """The run that is in the folder; of the options that may change half-way those that are given now."""
    values = dict(now)
    given = {key: values[key] for key in MAY_DIFFER & now.model_fields_set}
    return started.model_copy(update={**given, "out": now.out, "resume": True})


def resume_command(folder: OutputFolder) -> str:
    return shlex.join(["rankrace", "train", "--config", str(folder.config), "--out", str(folder.root), "--resume"])


def open_session(config: RunConfig, progress: Progress) -> tuple[Session, PreTrainedTokenizerBase, Clock]:
    """Everything up to the first step; writes nothing."""
    clock = Clock()
    data, model, tokenizer, task = load(config, progress)
    progress.phase("measuring the base model")
    began = time.perf_counter()
    session = prepare(config, data, model, task)
    progress.note(session.notes)
    clock.evaluation = time.perf_counter() - began
    return session, tokenizer, clock


def load(config: RunConfig, progress: Progress) -> tuple[Data, PreTrainedModel, PreTrainedTokenizerBase, Task]:
    """Data and model, checked; what was found is said."""
    device = chosen_device(config.device)
    dtype = chosen_dtype(config.dtype, device)
    check_quantize(config.quantize, device, dtype)
    reach_hub(config.model)
    progress.phase("reading the data")
    task = task_of(config)
    read = read_splits(config)
    tokenizer = load_tokenizer(config.model)
    data = encode_splits(read, make_encoder(config, tokenizer, task, read))
    progress.phase("loading the model")
    name = anywhere(config.model)
    model = load_model(
        name, task, data.labels, device=device, dtype=dtype, seed=config.seed, quantize_to=config.quantize
    )
    data = checked_data(data, tokenizer, task, vocabulary_size(model))
    progress.note(data.notes)
    return data, model, tokenizer, task


def anywhere(model: str) -> str:
    """A name under which the model is found from every working directory: adapter, record and report keep it."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def task_of(config: RunConfig) -> Task:
    """The task asked for, or the one the model is made for."""
    if config.task != "auto":
        return config.task
    return "classification" if is_encoder(config.model) else "causal"


def drive(
    session: Session,
    folder: OutputFolder,
    clock: Clock,
    progress: Progress,
    interrupts: Interrupts,
    curves: Curves,
) -> None:
    """Trains to the end; saves as it goes, and before it stops."""
    trainer, search = session.trainer, session.search
    every = session.config.save_every or max(1, trainer.total // SAVES)
    progress.start(trainer.total, trainer.step, trainer.tokens)
    decided = search.decided

    def save() -> None:
        state = {
            "session": session.state(),
            "seconds": clock.total,
            "evaluation_seconds": clock.evaluation,
        }
        save_checkpoint(folder.checkpoints, trainer.step, session.tensors(), state)
        curves.follow()

    for loss_K in search.run():
        progress.say_new(trainer.notes)
        if search.decided and not decided:
            decided = True
            progress.say(decision_line(session))
        if progress.due(trainer.step):
            losses = loss_K.tolist()
            alarm_if_diverged(losses, trainer.step)
            progress.update(trainer.step, search.names, losses, trainer.tokens)
        asked = interrupts.asked  # read once: it may change at any moment
        if asked or trainer.step % every == 0 or trainer.step == trainer.total:
            save()
        if asked:
            break
    stop_if_asked(interrupts, folder)


def stop_if_asked(interrupts: Interrupts, folder: OutputFolder) -> None:
    """Raises Interrupted after a Ctrl-C."""
    if interrupts.asked:
        raise Interrupted(resume_command(folder))


def alarm_if_diverged(losses: list[float], step: int) -> None:
    """Raises RankraceError if no candidate has a finite loss any more."""
    if all(loss != loss or abs(loss) == float("inf") for loss in losses):
        raise RankraceError(
            f"the training diverged: at step {step} no loss is a finite number",
            why="nothing that follows could be of use",
            fix="lower --lr (in another --out)",
        )


def decision_line(session: Session) -> str:
    look = session.search.state.looks[-1]
    return f"Rank {look.verdict.pick}: {reason_of(session)}"


def reason_of(session: Session) -> str:
    look = session.search.state.looks[-1]
    share = look.step / session.trainer.total
    return reason(look, share=share, examples=len(session.search.examples))


def decision_of(session: Session) -> Decision:
    """The last look, for the record."""
    look = session.search.state.looks[-1]
    return Decision(
        step=look.step,
        fraction=look.step / session.trainer.total,
        edge=look.edge,
        capped=look.capped,
        confident=is_confident(look),
        lr_scale=look.lr_scale,
        lr_edge=lr_edge(session),
        chance=look.chance,
    )


def lr_edge(session: Session) -> Literal["low", "high"] | None:
    """Whether the learning rate that was chosen is the smallest or the largest of those tried."""
    look = session.search.state.looks[0]
    scales = [rated.lr_scale for rated in look.rates]
    if len(scales) < 2 or min(scales) < look.lr_scale < max(scales):
        return None
    return "low" if look.lr_scale == min(scales) else "high"


def finish(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    folder: OutputFolder,
    clock: Clock,
    progress: Progress,
    interrupts: Interrupts,
) -> Result:
    """Measures the finished adapter on fresh examples and writes everything; result.json comes last.

    Raises:
        Interrupted: Ctrl-C, before the last file; what is written already is written again.
    """
    progress.phase("measuring the adapter")
    began = time.perf_counter()
    final = session.trainer.measure(session.fresh)
    clock.evaluation += time.perf_counter() - began
    alarm_if_diverged(final.mean_K.tolist(), session.trainer.step)
    stop_if_asked(interrupts, folder)
    result = describe(session, final, clock)
    settings = session.config.model_dump(mode="json", exclude={"resume"})
    bank = session.trainer.bank
    with written_whole(folder.adapter) as partial:
        save_adapter(bank, adapter_of(bank, 0), partial)
        tokenizer.save_pretrained(partial)
        write_card(result, settings, partial / "README.md")
    stop_if_asked(interrupts, folder)
    with writing(folder.root):
        write_report(result, settings, folder.report)
        result.write(folder.result)
    return result


def describe(session: Session, final: Measured, clock: Clock) -> Result:
    """The record of a finished run."""
    trainer, search, config, data = session.trainer, session.search, session.config, session.data
    bank, look = trainer.bank, search.state.looks[-1]
    rank = bank.candidates.ranks[0]
    setting = search.setting(rank)
    groups = [e.group for e in session.fresh]
    _, final_se = mean_and_se(final.loss_KN[0], final.tokens_N, torch.tensor(groups).numpy())
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
        loss=Loss(base=float(session.base_fresh.mean_K[0]), final=float(final.mean_K[0]), final_se=final_se),
        accuracy=Accuracy(base=float(session.base_fresh.accuracy_K[0]), final=float(final.accuracy_K[0])),
        curve=[
            CurvePoint(
                rank=p.rank,
                loss=p.loss,
                se=p.se,
                penalty=p.penalty,
                objective=p.objective,
                source=p.source,
                step=look.step,
            )
            for p in look.verdict.points
        ],
        decision=decision_of(session),
        candidates=[
            Candidate(rank=e.rank, status="winner" if e.status == "running" else e.status, steps=e.steps)
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


def versions(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"rankrace": __version__, **packages, "python": platform.python_version(), "device": name}
