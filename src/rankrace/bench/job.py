"""One run of an experiment: data → method → training → test rows → a record."""

import math
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankrace.bench.experiment import Experiment, Job, config_of, training_of
from rankrace.bench.record import Record, begun, failed, hardware, write_record
from rankrace.bench.rows import commonest, read, sha256, test_rows
from rankrace.data.hub import reach_hub
from rankrace.device import wait_for
from rankrace.errors import RankraceError
from rankrace.evaluate.predict import predict, task_examples
from rankrace.interrupt import Interrupts
from rankrace.methods import Running, find_method
from rankrace.progress import peak_bytes
from rankrace.record import versions
from rankrace.session import chosen_device, chosen_dtype
from rankrace.tasks import documents, find_task
from rankrace.training.checkpoint import load_checkpoint, save_checkpoint
from rankrace.training.divergence import alarm_if_diverged
from rankrace.training.memory import free_caches
from rankrace.training.model import is_encoder, load_model

SAVE_S = 60.0
"""Seconds between checkpoints: a run that is killed loses at most these."""


class Stopped(Exception):
    """A signal asked the run to stop; it was saved first."""


def perform(
    experiment: Experiment, job: Job, folder: Path, device: str, save_s: float = SAVE_S, slots: int = 1
) -> Record:
    """Runs one job to its record and writes it; whatever goes wrong is a record, too.

    Args:
        slots: how many runs share the GPU, or without one the machine; 0: other runs were in this process before.

    Raises:
        Stopped: on SIGINT or SIGTERM.
    """
    began = time.perf_counter()
    record = begun(experiment, job, slots)
    try:
        record |= measured(experiment, job, folder, device, save_s, slots)
        bad = [name for name, value in numbers(record) if not math.isfinite(value)]
        if bad:
            raise RankraceError(
                f"{bad[0]} is not a number",
                why="a mean over runs with such a value is none, either",
                fix="look at the run's data and its learning rate",
            )
    except (Stopped, KeyboardInterrupt):
        raise
    except torch.OutOfMemoryError as error:
        record |= failed(f"out of memory: {str(error).splitlines()[0]}")
    except RankraceError as error:
        record |= failed(str(error))
    except Exception as error:  # the rest of the grid must go on; the record says what happened
        traceback.print_exc()
        record |= failed(f"{type(error).__name__}: {error}")
    record["wall_s"] = round(time.perf_counter() - began, 2)
    write_record(folder, record)
    return record


def numbers(record: Record) -> list[tuple[str, float]]:
    return [("the validation loss", record["validation_loss"]), *record["metrics"].items()]


def measured(experiment: Experiment, job: Job, folder: Path, device: str, save_s: float, slots: int) -> Record:
    """Everything of the record that the run itself finds out."""
    where = chosen_device(device)
    task, method = find_task(job.task), find_method(job.method)
    config = config_of(experiment, job, folder, str(where))
    began = time.perf_counter()
    reach_hub(config.model)
    kind = "classification" if is_encoder(config.model) else "causal"
    method.check(where, kind)
    given = read(config, kind)
    data, splits = given.data, given.splits
    dtype = chosen_dtype(config.dtype, where)
    model = load_model(
        config.model, kind, data.labels, device=where, dtype=dtype, seed=job.seed, quantize_to=method.quantize
    )
    loading_s = time.perf_counter() - began

    width = model.config.get_text_config().hidden_size
    lr = job.scale * method.default_lr(width, config)
    free_caches()  # of loading, and of the run before
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    began = time.perf_counter()
    # A method without a learning rate takes no step; the configuration wants a positive one all the same.
    running = method.prepare(config.model_copy(update={"lr": lr or None}), data, model, kind)
    preparing_s = time.perf_counter() - began
    checkpoints = folder / "work" / job.training
    cost = trained(running, Checkpoints(checkpoints, training_of(experiment, job), save_s), slots, keep=job.tuning)

    validation = running.trainer.measure(data.validation.examples)
    found = running.described()
    result: Record = {
        "config": {**config.model_dump(mode="json", exclude={"out", "average"}), "model": experiment.model},
        "validation_loss": float(validation.mean_K[0]),
        "metrics": {},
        "rows": [],
        "learning_rate": found.learning_rate,
        "rank": found.rank,
        "reason": found.reason,
        "parameters": found.parameters,
        "base_parameters": sum(p.numel() for p in model.parameters()) if job.method == "base" else None,
        "time": {
            "train_s": round(preparing_s + cost.seconds, 3),
            "search_s": round(found.search_s, 3),
            "steps_s": round(running.trainer.seconds, 3),
            "loading_s": round(loading_s, 3),
        },
        "steps": running.trainer.step,
        "resumed_at": cost.resumed_at,
        "slots": cost.slots,
        "notes": running.trainer.notes,
        "tokens": running.trainer.tokens,
        # Other runs were in this process before: its memory is not this run's.
        "peak_bytes": None if slots == 0 and where.type == "cpu" else cost.peak,
        "data": {
            "train_examples": len(data.train),
            "validation_examples": len(data.validation),
            "supervised_tokens": data.train.supervised_tokens,
            "truncated": data.train.truncated,
            "sha256": data.sha256,
            "how": splits.how,
        },
        "hardware": hardware(where),
        "versions": versions(where),
    }
    if job.tuning:
        return result
    rows = test_rows(splits, experiment.test_max)
    began = time.perf_counter()
    predictions = predict(running.trainer, given.encoder, given.tokenizer, task, rows)
    result["metrics"] = task.score(predictions, rows)
    if task.kind == "options" and kind == "causal":
        written = predict(running.trainer, given.encoder, given.tokenizer, task, rows, generated=True)
        result["metrics"] |= {f"generated_{n}": value for n, value in task.score(written, rows).items()}
    result["data"]["test_sha256"] = sha256(rows)
    scores = next(iter(task.row_scores(predictions, rows).values()))
    result["rows"], result["documents"] = [round(score / 100, 4) for score in scores], documents(rows)
    result["samples"] = predictions[:5]
    result["time"]["test_s"] = round(time.perf_counter() - began, 3)
    encoded = given.encoder.encode_batch(task_examples(task, rows, kind))  # again, so not within the clock
    result["data"]["test_truncated"] = sum(e.truncated for e in encoded)
    result["baselines"] = {
        "empty": task.score([""] * len(rows), rows),
        "commonest": task.score([commonest(splits.train)] * len(rows), rows),
    }
    for used in (folder / "work").glob(f"{job.task}--{job.method}--seed{job.seed}--lr*"):
        shutil.rmtree(used, ignore_errors=True)  # its tuning's too
    return result


@dataclass(frozen=True)
class Checkpoints:
    """Where a training is kept, and how often."""

    folder: Path
    training: str
    """What it is a training of: one of something else in that folder is no use."""
    save_s: float

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest one; what is left of another training is removed."""
        found = load_checkpoint(self.folder) if self.folder.exists() else None
        if found is not None and found[1]["training"] != self.training:
            shutil.rmtree(self.folder)
            return None
        return found


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a training, over all sittings."""

    resumed_at: int
    """The step from which it went on."""
    seconds: float
    peak: int
    """Bytes."""
    slots: int
    """The most runs at once that it shared its GPU with, itself counted."""


def trained(running: Running, checkpoints: Checkpoints, slots: int, *, keep: bool) -> Cost:
    """Trains to the end, from the newest checkpoint if there is one.

    Args:
        keep: save the end, too: the run for the table goes on from that of the tuning.

    Raises:
        Stopped: on SIGINT or SIGTERM, once saved.
    """
    seconds_before, peak_before = 0.0, 0
    found = checkpoints.load()
    if found is not None:
        running.restore(found[0], found[1]["running"])
        seconds_before, peak_before, slots = found[1]["seconds"], found[1]["peak"], max(slots, found[1]["slots"])
    trainer, began, saving, saved_at = running.trainer, time.perf_counter(), 0.0, time.perf_counter()
    first = trainer.step
    loss_K = None

    def so_far() -> Cost:
        seconds = seconds_before + time.perf_counter() - began - saving
        return Cost(resumed_at=first, seconds=seconds, peak=max(peak_before, peak_bytes()), slots=slots)

    def save() -> None:
        cost = so_far()
        state = {"running": running.state(), "training": checkpoints.training, "seconds": cost.seconds,
                 "peak": cost.peak, "slots": cost.slots}  # fmt: skip
        save_checkpoint(checkpoints.folder, trainer.step, running.tensors(), state)

    with Interrupts() as interrupts:
        for losses in running.run():
            loss_K = losses
            if interrupts.asked or time.perf_counter() - saved_at >= checkpoints.save_s:
                wait_for(trainer.bank.device)  # for the step, which is no part of saving
                now = time.perf_counter()
                save()
                saved_at = time.perf_counter()
                saving += saved_at - now
            if interrupts.asked:
                raise Stopped
    wait_for(trainer.bank.device)
    cost = so_far()
    if loss_K is not None:
        alarm_if_diverged(loss_K.tolist(), trainer.step)
        if keep:
            save()
    return cost
