"""What the studies of the rank share: a task's rows, a model under a bank, units that are files, measurements.

A unit is one task and seed. Units that are there already are skipped, so that a study goes on over many sittings.
Of the held-out examples half (256 at most) are looked at on the way, and the others (512 at most) are fresh: they
choose nothing, and each one's own loss at the end is kept, so that any two arms can be compared in pairs.

Shapes: K candidates, N held-out examples.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from transformers.utils import logging

from rankrace.bank import Bank
from rankrace.bench.record import provenance
from rankrace.config import Quantize, RunConfig
from rankrace.data import Data, encode_splits, make_encoder, split_rows
from rankrace.data.encoded import FEW_DOCUMENTS
from rankrace.data.sources import SourceRows
from rankrace.select.learning_rate import default_lr, multiplier
from rankrace.select.statistics import paired_difference
from rankrace.session import recipe_of
from rankrace.tasks import find_task
from rankrace.training.compiled import compile_blocks
from rankrace.training.loop import Measured, Trainer
from rankrace.training.model import PackedModel, load_model, load_tokenizer

ALPHA = 32.0
LOOKED, FRESH = 256, 512


def described(measured: Measured, cluster_N: np.ndarray) -> dict[str, Any]:
    """Mean losses [K] and the standard errors of all paired differences as a triangle, nats per supervised token."""
    loss_KN, tokens_N = measured.loss_KN, measured.tokens_N
    ses = [
        [round(paired_difference(loss_KN[i], loss_KN[j], tokens_N, cluster_N)[1], 6) for j in range(i)]
        for i in range(len(loss_KN))
    ]
    return {"loss": measured.mean_K.round(6).tolist(), "se": ses, "accuracy": measured.accuracy_K.round(4).tolist()}


def ended(measured: Measured) -> dict[str, Any]:
    """The end of a training on the fresh examples, with each example's own loss."""
    return {
        "loss": measured.mean_K.round(6).tolist(),
        "accuracy": measured.accuracy_K.round(4).tolist(),
        "per_example": [[round(float(x), 4) for x in row] for row in measured.loss_KN],
    }


def multipliers(ranks: Sequence[int]) -> list[float]:
    return [multiplier(r, ALPHA, "lora") for r in ranks]


def read(name: str, root: Path, config: RunConfig) -> Data:
    """The task's training and validation rows; never its test part.

    Where validation is of few documents every third of the others is held out too: no error could be estimated from
    the four articles of SQuAD's.
    """
    splits = find_task(name).splits(root, 0)
    train, validation = splits.train, splits.validation
    document = "document" if "document" in train[0] else None
    if document and len({row[document] for row in validation}) < FEW_DOCUMENTS:
        held = set(sorted({row[document] for row in train})[::3])
        validation = [*validation, *(row for row in train if row[document] in held)]
        train = [row for row in train if row[document] not in held]
        config = config.model_copy(update={"validation_max": len(validation)})
    source = SourceRows(train=train, validation=validation, train_where=name, validation_where=f"{name} validation")
    config = config.model_copy(update={"group_column": document})
    rows = split_rows(source, config)
    return encode_splits(rows, make_encoder(config, load_tokenizer(config.model), "causal", rows))


class Study:
    """One unit's model, rows and held-out examples."""

    def __init__(self, name: str, given: argparse.Namespace, seed: int) -> None:
        self.name = name
        self.config = RunConfig(
            model=given.model,
            data=name,
            seed=seed,
            max_steps=given.steps,
            epochs=100,
            train_max=given.train_max,
            warmup=given.warmup,
            alpha=ALPHA,
            validation_max=LOOKED + FRESH,
            micro_tokens=given.micro_tokens,
            device=given.device,
            quantize=given.quantize,
        )
        self.compiled = not given.no_compile
        cuda = torch.device(given.device).type == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        self.hf = load_model(
            given.model, "causal", None, device=torch.device(given.device), dtype=dtype, seed=seed,
            quantize_to=given.quantize,
        )  # fmt: skip
        self.data = read(name, given.data, self.config)
        examples = self.data.validation.examples
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(examples))
        half = min(LOOKED, len(examples) // 2)
        self.looked, self.fresh = ([examples[i] for i in part] for part in (order[:half], order[half : half + FRESH]))
        self.lr = default_lr(self.hf.config.get_text_config().hidden_size)
        self.cluster_N = np.array([e.group for e in self.looked])
        self.began = time.perf_counter()

    def trainer(self) -> Trainer[Bank]:
        """A bank on the model, and the loop around it."""
        bank = Bank(self.hf, seed=self.config.seed)
        model = PackedModel(self.hf, bank, "causal", chunk=2048)
        cuda = self.hf.device.type == "cuda"
        if self.compiled and cuda:
            compile_blocks(bank)
        recipe = recipe_of(self.config, self.hf, self.config.micro_tokens or 0)
        return Trainer(model, self.data.train.examples, replace(recipe, graphs=cuda))

    def record(self, fresh_tokens_N: np.ndarray) -> dict[str, Any]:
        """What every unit says of itself."""
        return {
            "task": self.name,
            "seed": self.config.seed,
            "lr": self.lr,
            "alpha": ALPHA,
            "warmup": self.config.warmup,
            "quantize": self.config.quantize,
            "steps": self.config.max_steps,
            "batch_size": self.config.batch_size,
            "train_examples": len(self.data.train),
            "held_out": [len(self.looked), len(self.fresh)],
            "fresh_tokens": [int(n) for n in fresh_tokens_N],
            "fresh_cluster": [int(e.group) for e in self.fresh],
            "data_sha256": self.data.sha256,
            **provenance(),
            "seconds": time.perf_counter() - self.began,
            "device": torch.cuda.get_device_name() if self.hf.device.type == "cuda" else "cpu",
            "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
        }


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    """What every study of this kind is told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path, help="the folder with all tasks' files")
    parser.add_argument("--units", required=True, help="task:seed,task:seed,… in this order")
    parser.add_argument("--warmup", type=float, default=0.03)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train-max", type=int, default=6400)
    parser.add_argument("--micro-tokens", type=int, default=20480)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--quantize", choices=get_args(Quantize), default="none", help="of the frozen base")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds after which no new unit starts")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


ELSEWHERE = ("model", "data", "units", "out", "device", "stop_after")
"""Options that say where and when, not what."""


def command_of(given: argparse.Namespace, module: str, unit: str) -> str:
    """That makes this unit again: every option that says what is run, but not where its model and data lie."""
    words = [f"python -m {module} --units {unit}"]
    for name, value in vars(given).items():
        if name not in ELSEWHERE and value is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            words.append(option if value is True else f"{option} {value}")
    return " ".join(words)


def run_units(given: argparse.Namespace, module: str, run: Callable[[Study], dict[str, Any]], kind: str = "") -> None:
    """Every unit that is not there yet, into a file of its own, whose name also says how the base is quantised.

    Args:
        kind: the end of the files' names.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if given.quantize != "none":
        kind = f"{kind}-{given.quantize}"
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for unit in given.units.split(","):
        name, seed = unit.split(":")
        file = given.out / f"{name}-seed{seed}{kind}.json"
        if file.exists():
            continue
        if time.perf_counter() - began > given.stop_after:
            return
        study = Study(name, given, int(seed))
        done = run(study)
        done["command"] = command_of(given, module, unit)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(done) + "\n")
        partial.rename(file)
        curve = ", ".join(f"{x:.4f}" for x in done["fresh"]["loss"])
        print(f"{module} {file.name}: {done['seconds']:.0f} s, {curve}", flush=True)
        del study
