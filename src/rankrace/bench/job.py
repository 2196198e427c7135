"""One run of an experiment: data → method → training → test rows → a record.

    python -m rankrace.bench.job REQUEST.json     # as the runners start it: one process a run

A record holds all that is needed to judge it: settings, versions, commit, hardware, data, times, every prediction's
score. It is written in one piece, so it is there and whole, or not there.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rankrace.bench.experiment import Experiment, Job, config_of, fingerprint, settings_of
from rankrace.config import RunConfig
from rankrace.data import encode_splits, make_encoder, split_rows
from rankrace.data.files import Rows
from rankrace.data.formats import PromptCompletion
from rankrace.data.sources import SourceRows
from rankrace.data.split import draw
from rankrace.errors import RankraceError
from rankrace.evaluate.predict import predict, row_scores, training_rows
from rankrace.interrupt import Interrupts
from rankrace.methods import Running, find_method
from rankrace.progress import peak_bytes
from rankrace.result import replace_text
from rankrace.run import alarm_if_diverged, versions
from rankrace.session import chosen_device, chosen_dtype
from rankrace.tasks import Splits, Task, find_task
from rankrace.train.checkpoint import load_checkpoint, save_checkpoint
from rankrace.train.model import is_encoder, load_tokenizer

SCHEMA = "rankrace/bench/1"
SAVE_S = 60.0
"""Seconds between checkpoints: a run that is killed loses at most these."""


class Stopped(Exception):
    """A signal asked the run to stop; it was saved first."""


def perform(
    experiment: Experiment, job: Job, folder: Path, device: str, save_s: float = SAVE_S, *, shared: bool = False
) -> dict[str, Any]:
    """Runs one job to its record and writes it; whatever goes wrong is a record, too.

    Args:
        shared: other runs were in this process before, so that its memory is not this run's.

    Raises:
        Stopped: on SIGINT or SIGTERM.
    """
    began = time.perf_counter()
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "key": job.key,
        "experiment": experiment.name,
        "method": job.method,
        "task": job.task,
        "seed": job.seed,
        "scale": job.scale,
        "tuning": job.tuning,
        "status": "done",
        "error": None,
        "settings": settings_of(experiment, job),
        **provenance(),
    }
    record["fingerprint"] = fingerprint(record["settings"])
    try:
        record |= measured(experiment, job, folder, device, save_s, shared)
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
        record |= failed(f"{type(error).__name__}: {error}")
    record["wall_s"] = round(time.perf_counter() - began, 2)
    write_record(folder, record)
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """One top-level key a line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items()]
    replace_text(folder / "runs" / f"{record['key']}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def failed(error: str) -> dict[str, Any]:
    return {"status": "failed", "error": error, "metrics": {}, "validation_loss": None, "rows": [],
            "baselines": {}}  # fmt: skip


def numbers(record: dict[str, Any]) -> list[tuple[str, float]]:
    return [("the validation loss", record["validation_loss"]), *record["metrics"].items()]


def measured(
    experiment: Experiment, job: Job, folder: Path, device: str, save_s: float, shared: bool
) -> dict[str, Any]:
    """Everything of the record that the run itself finds out."""
    where = chosen_device(device)
    task, method = find_task(job.task), find_method(job.method)
    config = config_of(experiment, job, folder, str(where))
    began = time.perf_counter()
    kind = "classification" if is_encoder(config.model) else "causal"
    splits = task.splits(data_root(), job.seed)
    read = split_rows(source_of(task, splits, classification=kind == "classification"), with_groups(config, splits))
    tokenizer = load_tokenizer(config.model)
    encoder = make_encoder(config, tokenizer, kind, read)
    data = encode_splits(read, encoder)
    dtype = chosen_dtype(config.dtype, where)
    model = method.load(config.model, kind, data.labels, device=where, dtype=dtype, seed=job.seed)
    loading_s = time.perf_counter() - began

    width = model.config.get_text_config().hidden_size
    lr = job.scale * method.default_lr(width, config)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    began = time.perf_counter()
    # A method without a learning rate takes no step; the configuration wants a positive one all the same.
    running = method.prepare(config.model_copy(update={"lr": lr or None}), data, model, kind)
    preparing_s = time.perf_counter() - began
    checkpoints = folder / "work" / job.training
    replace_text(folder / "work" / f"{job.training}.pid", str(os.getpid()))
    resumed_at, training_s = trained(running, checkpoints, save_s, keep=job.tuning)
    peak = None if shared and where.type == "cpu" else peak_bytes()

    validation = running.trainer.measure(data.validation.examples)
    found = running.described()
    result: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "validation_loss": float(validation.mean_K[0]),
        "metrics": {},
        "rows": [],
        "learning_rate": found.learning_rate,
        "rank": found.rank,
        "reason": found.reason,
        "parameters": found.parameters,
        "base_parameters": sum(p.numel() for p in model.parameters()) if job.method == "base" else None,
        "time": {
            "train_s": round(preparing_s + training_s, 3),
            "search_s": round(found.search_s, 3),
            "steps_s": round(running.trainer.seconds, 3),
            "loading_s": round(loading_s, 3),
        },
        "steps": running.trainer.step,
        "resumed_at": resumed_at,
        "tokens": running.trainer.tokens,
        "peak_bytes": peak,
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
    predictions = predict(running.trainer, encoder, tokenizer, task, rows)
    result["metrics"] = task.score(predictions, rows)
    if task.kind == "options" and kind == "causal":
        written = predict(running.trainer, encoder, tokenizer, task, rows, generated=True)
        result["metrics"] |= {f"generated_{n}": value for n, value in task.score(written, rows).items()}
    result["rows"] = row_scores(task, predictions, rows)
    result["samples"] = predictions[:5]
    result["time"]["test_s"] = round(time.perf_counter() - began, 3)
    result["baselines"] = {
        "empty": task.score([""] * len(rows), rows),
        "commonest": task.score([commonest(splits.train)] * len(rows), rows),
    }
    for used in (folder / "work").glob(f"{job.task}--{job.method}--seed{job.seed}--lr*"):
        shutil.rmtree(used, ignore_errors=True)  # its tuning's too
    return result


def trained(running: Running, checkpoints: Path, save_s: float, *, keep: bool) -> tuple[int, float]:
    """Trains to the end, from the newest checkpoint if there is one.

    Args:
        keep: save the end, too: the run for the table goes on from that of the tuning.

    Returns:
        The step from which it went on, and the seconds of training, over all sittings.
    """
    before = 0.0
    found = load_checkpoint(checkpoints) if checkpoints.exists() else None
    if found is not None:
        running.restore(found[0], found[1]["running"])
        before = found[1]["seconds"]
    trainer, began, saving, saved_at = running.trainer, time.perf_counter(), 0.0, time.perf_counter()
    first = trainer.step
    loss_K = None

    def elapsed() -> float:
        return before + time.perf_counter() - began - saving

    with Interrupts() as interrupts:
        for losses in running.run():
            loss_K, now = losses, time.perf_counter()
            if interrupts.asked or now - saved_at >= save_s:
                state = {"running": running.state(), "seconds": elapsed()}
                save_checkpoint(checkpoints, trainer.step, running.tensors(), state)
                saved_at = time.perf_counter()
                saving += saved_at - now
            if interrupts.asked:
                raise Stopped
    if trainer.bank.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = elapsed()
    if loss_K is not None:
        alarm_if_diverged(loss_K.tolist(), trainer.step)
    if keep and loss_K is not None:
        state = {"running": running.state(), "seconds": seconds}
        save_checkpoint(checkpoints, trainer.step, running.tensors(), state)
    return first, seconds


def source_of(task: Task, splits: Splits, *, classification: bool) -> SourceRows:
    """Only the parts that may choose something: the test rows are not among them."""
    return SourceRows(
        train=training_rows(task, splits.train, classification=classification),
        validation=training_rows(task, splits.validation, classification=classification),
        train_where=f"{task.name} (train)",
        validation_where=f"{task.name} (validation)",
    )


def with_groups(config: RunConfig, splits: Splits) -> RunConfig:
    return config.model_copy(update={"group_column": "document" if "document" in splits.train[0] else None})


def test_rows(splits: Splits, most: int | None) -> Rows:
    """The test part, or the same draw of it for every method and seed."""
    if most is None or most >= len(splits.test):
        return splits.test
    examples = [PromptCompletion(row["prompt"], row["completion"]) for row in splits.test]
    rows = {id(example): row for example, row in zip(examples, splits.test, strict=True)}
    return [rows[id(example)] for example in draw(examples, most, 0)]


def commonest(rows: Rows) -> str:
    """The commonest answer of the training rows."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["completion"].strip()] = counts.get(row["completion"].strip(), 0) + 1
    return max(counts, key=lambda text: counts[text])


def data_root() -> Path | None:
    """The folder of local data sets, $RANKRACE_DATA; None: tasks come from the hub."""
    root = os.environ.get("RANKRACE_DATA")
    return Path(root) if root else None


def provenance() -> dict[str, Any]:
    """Where the code comes from, when and by which command it ran."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_of": "device" if gpu else "process",
    }


def main() -> None:
    from rankrace.cli import quieten

    quieten()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        perform(
            Experiment(**request["experiment"]), Job(**request["job"]), Path(request["folder"]), request["device"],
            request["save_s"],
        )  # fmt: skip
    except Stopped:
        sys.exit(130)


if __name__ == "__main__":
    main()
