"""Does an early look tell the final order of ranks, and what does a cut to a rank end with? One training each.

    python -m benchmarks.early_looks --model SMOLLM2_FOLDER --data DATA --tasks gsm8k,squad2 --seeds 0,1

For each task and seed, on the same batches and the same held-out examples:

- all ranks train side by side to the end; at each look every rank is measured as it is (direct) and as it is cut
  from the largest one (truncated);
- from the largest one as it was after a tenth and a fifth of the training, cuts to each rank train on to the end
  (healed), with fresh moments of the optimiser or with those carried over.

With --rates instead: what the learning rate does to that. A few ranks from the start, each at several multiples of
the default learning rate, measured at each look as they are and as averages of the factors over the last quarter and
half of the steps so far (since the last look, if that is later). An average shows what a large rate has learnt
without the noise that the end of the schedule would take away.

With --lrs other than 1 only the first sweep, and only its end.

A unit is one JSON file; units that are there already are skipped, so the study goes on over many sittings. Losses of
each fresh example are kept: any two arms of one task and seed can be compared in pairs.

Shapes: K candidates, N held-out examples.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from rankrace.bank import Bank, Candidates, carried
from rankrace.bank.flat import Flat
from rankrace.config import RunConfig
from rankrace.data import Data, encode_splits, make_encoder, split_rows
from rankrace.data.sources import SourceRows
from rankrace.select.learning_rate import default_lr, multiplier
from rankrace.select.statistics import paired_difference
from rankrace.tasks import find_task
from rankrace.train.compiled import compile_blocks
from rankrace.train.loop import Measured, Recipe, Trainer
from rankrace.train.model import PackedModel, load_model, load_tokenizer

RANKS = (1, 2, 4, 8, 12, 16, 32, 64)
CUT_RANKS = (1, 2, 4, 8, 16, 32)
CUTS = (0.1, 0.2)
CARRIED = (4, 16)
"""Ranks that are also healed with carried moments, from the last cut."""
LOOKS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
RATES = (1.0, 2.0, 4.0)
RATED = (1, 4, 16, 64)
SINCE = {"quarter": 0.75, "half": 0.5}
"""Averages, from this share of the steps so far."""
ALPHA = 32.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The widest candidate at one step, alone."""

    step: int
    candidates: Candidates
    mean: dict[str, torch.Tensor]
    square: dict[str, torch.Tensor]
    updates: int


def described(measured: Measured, cluster_N: np.ndarray) -> dict[str, Any]:
    """Mean losses [K] and the standard errors [K, K] of all paired differences, nats per supervised token."""
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
    """The task's training and validation rows; never its test part."""
    splits = find_task(name).splits(root, 0)
    source = SourceRows(
        train=splits.train, validation=splits.validation, train_where=name, validation_where=f"{name} validation"
    )
    document = "document" if "document" in splits.train[0] else None
    config = config.model_copy(update={"group_column": document})
    rows = split_rows(source, config)
    return encode_splits(rows, make_encoder(config, load_tokenizer(config.model), "causal", rows))


class Study:
    """One task, seed and learning rate."""

    def __init__(self, name: str, root: Path, config: RunConfig, scale: float, compiled: bool) -> None:
        self.name, self.config, self.scale = name, config, scale
        device = torch.device(config.device)
        cuda = device.type == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        self.hf = load_model(config.model, "causal", None, device=device, dtype=dtype, seed=config.seed)
        self.data = read(name, root, config)
        examples = self.data.validation.examples
        order = np.random.Generator(np.random.Philox(config.seed)).permutation(len(examples))
        half = min(256, len(examples) // 2)
        self.looked, self.fresh = ([examples[i] for i in part] for part in (order[:half], order[half : 3 * half]))
        self.bank = Bank(self.hf, seed=config.seed)
        model = PackedModel(self.hf, self.bank, "causal", chunk=2048)
        if compiled:
            compile_blocks(self.bank)
        recipe = Recipe(
            epochs=config.epochs,
            max_steps=config.max_steps,
            batch_size=config.batch_size,
            micro_tokens=config.micro_tokens or 20480,
            schedule="linear",
            warmup=config.warmup,
            weight_decay=0.0,
            clip=1.0,
            seed=config.seed,
            graphs=cuda,
        )
        self.trainer = Trainer(model, self.data.train.examples, recipe)
        self.lr = default_lr(self.hf.config.get_text_config().hidden_size) * scale
        self.cluster_N = np.array([e.group for e in self.looked])

    def run(self, *, rates: bool) -> dict[str, Any]:
        began = time.perf_counter()
        trainer = self.trainer
        with self.bank.off():
            base = trainer.measure(self.looked)
        if rates:
            sweep, healed = self.rates(), []
        else:
            sweep, snapshots = self.sweep(look=self.scale == 1)
            healed = [self.heal(snapshot, CUT_RANKS, carry=False) for snapshot in snapshots]
            if snapshots:
                healed.append(self.heal(snapshots[-1], CARRIED, carry=True))
        fresh_tokens = [int(n) for n in trainer.measure(self.fresh).tokens_N]
        return {
            "task": self.name,
            "seed": self.config.seed,
            "lr": self.lr,
            "lr_scale": self.scale,
            "ranks": [r for r in RATED for _ in RATES] if rates else RANKS,
            "rates": [x for _ in RATED for x in RATES] if rates else [self.scale] * len(RANKS),
            "alpha": ALPHA,
            "warmup": self.config.warmup,
            "steps": trainer.total,
            "batch_size": self.config.batch_size,
            "train_examples": len(self.data.train),
            "held_out": [len(self.looked), len(self.fresh)],
            "base_loss": float(base.mean_K[0]),
            **sweep,
            "healed": healed,
            "fresh_tokens": fresh_tokens,
            "fresh_cluster": [int(e.group) for e in self.fresh],
            "data_sha256": self.data.sha256,
            "seconds": time.perf_counter() - began,
            "training_s": trainer.seconds,
            "device": torch.cuda.get_device_name() if self.config.device == "cuda" else "cpu",
            "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
        }

    def sweep(self, *, look: bool) -> tuple[dict[str, Any], list[Snapshot]]:
        """All ranks from the start."""
        trainer, widest = self.trainer, len(RANKS) - 1
        self.bank.start(RANKS, multipliers(RANKS))
        trainer.start(self.bank.candidates, [self.lr] * len(RANKS))
        looks, snapshots = [], []
        for share in LOOKS if look else (1.0,):
            for _ in trainer.run(max(1, round(share * trainer.total))):
                pass
            if not look:
                continue
            cuts = self.bank.candidates.truncations(widest, RANKS[:-1], multipliers(RANKS[:-1]))
            direct = trainer.measure(self.looked)
            with self.bank.borrowed(cuts):
                truncated = trainer.measure(self.looked)
            looks.append(
                {
                    "share": share,
                    "step": trainer.step,
                    "direct": described(direct, self.cluster_N),
                    "truncated": described(truncated, self.cluster_N),
                }
            )
            if share in CUTS:
                snapshots.append(self.snapshot(widest))
        return {"looks": looks, "fresh": ended(trainer.measure(self.fresh))}, snapshots

    def rates(self) -> dict[str, Any]:
        """Two ranks from the start at several learning rates."""
        trainer = self.trainer
        arms = [(r, x) for r in RATED for x in RATES]
        ranks, looks = [r for r, _ in arms], []
        self.bank.start(ranks, multipliers(ranks))
        trainer.start(self.bank.candidates, [self.lr * x for _, x in arms])
        for share in LOOKS:
            until = max(1, round(share * trainer.total))
            before, sums = trainer.step, {name: torch.zeros_like(self.bank.values.all_KP) for name in SINCE}
            for _ in trainer.run(until):
                for name, since in SINCE.items():
                    if trainer.step > since * until:
                        sums[name] += self.bank.values.all_KP
            look = {"direct": described(trainer.measure(self.looked), self.cluster_N)}
            for name, since in SINCE.items():
                average = Flat.like(self.bank.values.views)
                average.all_KP.copy_(sums[name] / (until - max(before, int(since * until))))
                with self.bank.borrowed(self.bank.candidates.with_tensors(average.views)):
                    look[name] = described(trainer.measure(self.looked), self.cluster_N)
            looks.append({"share": share, "step": trainer.step, **look})
        return {"looks": looks, "fresh": ended(trainer.measure(self.fresh))}

    def snapshot(self, k: int) -> Snapshot:
        optimizer = self.trainer.optimizer
        return Snapshot(
            step=self.trainer.step,
            candidates=self.bank.candidates.keep([k]),
            mean={n: t[k].clone() for n, t in optimizer.mean.views.items()},
            square={n: t[k].clone() for n, t in optimizer.square.views.items()},
            updates=optimizer.updates,
        )

    def heal(self, snapshot: Snapshot, ranks: Sequence[int], *, carry: bool) -> dict[str, Any]:
        """Cuts the snapshot to each rank and trains all to the end, side by side."""
        trainer = self.trainer
        cuts = snapshot.candidates.truncations(0, ranks, multipliers(ranks))
        trainer.step = snapshot.step
        trainer.start(cuts, [self.lr] * len(ranks))
        if carry:
            whole = snapshot.candidates.spectra(0)
            mean, square = carried(snapshot.candidates, 0, whole, cuts, snapshot.mean, snapshot.square)
            trainer.optimizer.resume(mean, square, updates=snapshot.updates)
        looks = []
        for share in LOOKS:
            until = max(1, round(share * trainer.total))
            if until <= snapshot.step:
                continue
            for _ in trainer.run(until):
                pass
            measured = trainer.measure(self.looked)
            looks.append({"share": share, "step": trainer.step, "direct": described(measured, self.cluster_N)})
        return {
            "cut_at": snapshot.step / trainer.total,
            "ranks": list(ranks),
            "carried": carry,
            "looks": looks,
            "fresh": ended(trainer.measure(self.fresh)),
        }


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    """What every study of this kind is told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path, help="the folder with all tasks' files")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--lrs", default="1", help="multiples of the default learning rate")
    parser.add_argument("--warmup", type=float, default=0.03)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train-max", type=int, default=6400)
    parser.add_argument("--micro-tokens", type=int, default=20480)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds after which no new unit starts")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def run_units(
    given: argparse.Namespace,
    module: str,
    kind: Callable[[float], str],
    mode: Callable[[str], str],
    run: Callable[[Study], dict[str, Any]],
) -> None:
    """Every unit that is not there yet, into a file of its own.

    Args:
        kind: learning rate's multiple → the end of the file's name.
        mode: the multiple as it was given → the options that make the command this unit's.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    units = [
        (s, lr, n) for s in given.seeds.split(",") for lr in given.lrs.split(",") for n in given.tasks.split(",")
    ]
    for seed, lr, name in units:
        file = given.out / f"{name}-seed{seed}-{kind(float(lr))}.json"
        if file.exists():
            continue
        if time.perf_counter() - began > given.stop_after:
            return
        config = RunConfig(
            model=given.model,
            data=name,
            seed=int(seed),
            max_steps=given.steps,
            epochs=100,
            train_max=given.train_max,
            warmup=given.warmup,
            validation_max=768,
            micro_tokens=given.micro_tokens,
            device=given.device,
        )
        study = Study(name, given.data, config, float(lr), not given.no_compile)
        done = run(study)
        done["command"] = (
            f"python -m {module} --tasks {name} --seeds {seed} {mode(lr)} --steps {given.steps} "
            f"--train-max {given.train_max}"
        )
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(done) + "\n")
        partial.rename(file)
        curve = ", ".join(f"{x:.4f}" for x in done["fresh"]["loss"])
        print(f"{file.name}: {done['seconds']:.0f} s, {curve}", flush=True)
        del study


def main() -> None:
    parser = arguments(__doc__, "results/selection")
    parser.add_argument("--rates", action="store_true")
    given = parser.parse_args()
    run_units(
        given,
        "benchmarks.early_looks",
        lambda lr: f"rates-warmup{given.warmup:g}" if given.rates else f"lr{lr:g}",
        lambda lr: f"--rates --warmup {given.warmup:g}" if given.rates else f"--lrs {lr}",
        lambda study: study.run(rates=given.rates),
    )


if __name__ == "__main__":
    main()
