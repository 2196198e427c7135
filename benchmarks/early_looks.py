"""Does an early look tell the final order of ranks? The truth and every look before it, in one training.

    python -m benchmarks.early_looks --model SMOLLM2_FOLDER --data gsm8k=DATA/gsm8k --seeds 0,1 --lrs 1

For each task, seed and learning rate: all ranks train side by side to the end on the same batches. At each look
every rank is measured as it is (direct) and as it is cut from the largest one (truncated), on the same held-out
examples. A unit is one JSON file; units that are there already are skipped, so the study goes on over many sittings.

Shapes: K ranks, N held-out examples.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.data import load_data
from rankrace.select.learning_rate import default_lr, lr_for, multiplier
from rankrace.select.statistics import paired_difference
from rankrace.train.compiled import compile_blocks
from rankrace.train.loop import Measured, Recipe, Trainer
from rankrace.train.model import PackedModel, load_model, load_tokenizer
from rankrace.train.passes import Graphs

RANKS = (1, 2, 4, 8, 12, 16, 32, 64)
LOOKS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
ALPHA = 32.0


def described(measured: Measured, cluster_N: np.ndarray) -> dict[str, Any]:
    """Mean losses [K] and the standard errors [K, K] of all paired differences, nats per supervised token."""
    loss_KN, tokens_N = measured.loss_KN, measured.tokens_N
    K = len(loss_KN)
    ses = [
        [round(paired_difference(loss_KN[i], loss_KN[j], tokens_N, cluster_N)[1], 6) for j in range(i)]
        for i in range(K)
    ]
    return {"loss": measured.mean_K.round(6).tolist(), "se": ses, "accuracy": measured.accuracy_K.round(4).tolist()}


def unit(config: RunConfig, scale: float, compiled: bool) -> dict[str, Any]:
    """One task, seed and learning rate."""
    began = time.perf_counter()
    cuda = config.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    hf = load_model(config.model, "causal", None, device=torch.device(config.device), dtype=dtype, seed=config.seed)
    data = load_data(config, load_tokenizer(config.model), "causal")
    half = len(data.validation) // 2
    order = np.random.Generator(np.random.Philox(config.seed)).permutation(len(data.validation))
    looked, fresh = ([data.validation.examples[i] for i in part] for part in (order[:half], order[half:]))
    bank = Bank(hf, seed=config.seed)
    model = PackedModel(hf, bank, "causal", chunk=2048)
    if compiled:
        compile_blocks(bank)
    recipe = Recipe(
        epochs=config.epochs,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        micro_tokens=config.micro_tokens or 20480,
        schedule="linear",
        warmup=0.03,
        weight_decay=0.0,
        clip=1.0,
        seed=config.seed,
        graphs=cuda,
    )
    trainer = Trainer(model, data.train.examples, recipe)
    lr = default_lr(hf.config.get_text_config().hidden_size) * scale
    bank.start(RANKS, [multiplier(r, ALPHA, "lora") for r in RANKS])
    trainer.start(bank.candidates, [lr_for(r, lr, ALPHA, "lora", {}) for r in RANKS])
    with bank.off():
        base = trainer.measure(looked)
    looks, cluster_N = [], np.array([e.group for e in looked])
    for share in LOOKS:
        for _ in trainer.run(max(1, round(share * trainer.total))):
            pass
        widest = len(RANKS) - 1
        cuts = bank.candidates.truncations(widest, RANKS[:-1], [multiplier(r, ALPHA, "lora") for r in RANKS[:-1]])
        direct = trainer.measure(looked)
        with bank.borrowed(cuts):
            truncated = trainer.measure(looked)
        looks.append(
            {
                "share": share,
                "step": trainer.step,
                "direct": described(direct, cluster_N),
                "truncated": described(truncated, cluster_N),
            }
        )
    final = described(trainer.measure(fresh), np.array([e.group for e in fresh]))
    return {
        "task": Path(config.data).name,
        "seed": config.seed,
        "lr": lr,
        "lr_scale": scale,
        "ranks": RANKS,
        "alpha": ALPHA,
        "steps": trainer.total,
        "batch_size": config.batch_size,
        "train_examples": len(data.train),
        "held_out": [len(looked), len(fresh)],
        "base_loss": float(base.mean_K[0]),
        "looks": looks,
        "fresh": final,
        "data_sha256": data.sha256,
        "seconds": time.perf_counter() - began,
        "training_s": trainer.seconds,
        "graphs": len(trainer.passes.graphs) if isinstance(trainer.passes, Graphs) else 0,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+", metavar="NAME=PATH")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--lrs", default="1", help="multiples of the default learning rate")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train-max", type=int, default=6400)
    parser.add_argument("--validation-max", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds after which no new unit starts")
    parser.add_argument("--out", type=Path, default=Path("results/selection"))
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for seed in map(int, given.seeds.split(",")):
        for scale in map(float, given.lrs.split(",")):
            for name, _, path in (entry.partition("=") for entry in given.data):
                file = given.out / f"{name}-seed{seed}-lr{scale:g}.json"
                if file.exists():
                    continue
                if time.perf_counter() - began > given.stop_after:
                    return
                config = RunConfig(
                    model=given.model,
                    data=path,
                    seed=seed,
                    max_steps=given.steps,
                    epochs=100,
                    train_max=given.train_max,
                    validation_max=given.validation_max,
                    device=given.device,
                )
                done = unit(config, scale, not given.no_compile)
                done["command"] = (
                    f"python -m benchmarks.early_looks --data {name} --seeds {seed} --lrs {scale:g} "
                    + (f"--steps {given.steps} --train-max {given.train_max} --validation-max {given.validation_max}")
                )
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(done) + "\n")
                partial.rename(file)
                curve = ", ".join(f"{x:.4f}" for x in done["fresh"]["loss"])
                print(
                    f"{file.name}: {done['seconds']:.0f} s (training {done['training_s']:.0f}), {curve}", flush=True
                )


if __name__ == "__main__":
    main()
