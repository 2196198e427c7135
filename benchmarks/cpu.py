"""The whole adaptive run against one fixed-rank run of the usual stack.

    python -m benchmarks.cpu --model SMOLLM2_FOLDER --data SST-2_FOLDER --out benchmarks/results/cpu.json

A: rankrace shrink: wide start, looks, cut, training to the end, base and final measurements.
B: PEFT LoRA r=8 on the same layers by Hugging Face's Trainer, its default padding, no evaluation at all.
Same examples, epochs, batch size and dtype, in one process, in turn A B A B …; the ratio is that of the
medians. Loading the model and turning text into tokens are in neither.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.utils import logging

from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.data import Data, load_data
from rankrace.data.encoded import Task
from rankrace.session import chosen_device, chosen_dtype, prepare
from rankrace.training.model import is_encoder, load_model, load_tokenizer


def adaptive(config: RunConfig, data: Data) -> dict[str, Any]:
    """Seconds and outcome of one rankrace run."""
    model = fresh_model(config, data)
    synchronize(config)
    began = time.perf_counter()
    session = prepare(config, data, model, task_of(config))
    for _ in session.search.run():
        pass
    final = session.trainer.measure(session.fresh)
    synchronize(config)
    seconds = time.perf_counter() - began
    search = session.search.state
    return {
        "seconds": seconds,
        "training_s": session.trainer.seconds,
        "looks_s": search.look_seconds,
        "rank": session.trainer.bank.candidates.ranks[0],
        "base_loss": float(session.base_fresh.mean_K[0]),
        "final_loss": float(final.mean_K[0]),
        "final_accuracy": float(final.accuracy_K[0]),
        "peak_bytes": peak(config),
    }


def fixed(config: RunConfig, data: Data, rank: int = 8) -> dict[str, Any]:
    """Seconds and outcome of PEFT and Trainer at one rank."""
    model = fresh_model(config, data)
    bank = Bank(model)
    layers = sorted({name.rpartition(".")[2] for name in bank.layers})
    bank.detach()
    classes = task_of(config) == "classification"
    kind = "SEQ_CLS" if classes else "CAUSAL_LM"
    peft_model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=layers, task_type=kind))
    tokenizer = load_tokenizer(config.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [
        {
            "input_ids": e.input_ids.tolist(),
            "labels": e.label
            if classes
            else [int(t) if s else -100 for t, s in zip(e.input_ids, e.supervised, strict=True)],
        }
        for e in data.train.examples
    ]
    collator = DataCollatorWithPadding if classes else DataCollatorForSeq2Seq
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=config.batch_size,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=config.device == "cpu",
            bf16=config.device != "cpu",
            seed=config.seed,
        )
        trainer = Trainer(
            model=peft_model,
            args=arguments,
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=collator(tokenizer),
        )
        synchronize(config)
        began = time.perf_counter()
        trainer.train()
        synchronize(config)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "rank": rank, "peak_bytes": peak(config)}


def task_of(config: RunConfig) -> Task:
    return "classification" if is_encoder(config.model) else "causal"


def fresh_model(config: RunConfig, data: Data) -> Any:
    device = chosen_device(config.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dtype = chosen_dtype("auto", device)
    return load_model(config.model, task_of(config), data.labels, device=device, dtype=dtype, seed=config.seed)


def synchronize(config: RunConfig) -> None:
    if config.device != "cpu":
        torch.cuda.synchronize()


def peak(config: RunConfig) -> int | None:
    """Peak of one run; on a CPU a process has one peak for all its runs, so none is given."""
    return None if config.device == "cpu" else torch.cuda.max_memory_reserved()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train-max", type=int, default=1600)
    parser.add_argument("--validation-max", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = RunConfig(
        model=given.model,
        data=given.data,
        device=given.device,
        train_max=given.train_max,
        validation_max=given.validation_max,
        epochs=given.epochs,
        lr=1e-3,
    )
    data = load_data(config, load_tokenizer(config.model), task_of(config))
    runs: dict[str, list[dict[str, Any]]] = {"adaptive": [], "fixed": []}
    for i in range(given.repeats):
        for name, run in (("adaptive", adaptive), ("fixed", fixed)):
            runs[name].append(run(config, data))
            print(f"{i + 1}/{given.repeats} {name}: {json.dumps(runs[name][-1])}", flush=True)
    median = {name: statistics.median(r["seconds"] for r in done) for name, done in runs.items()}
    ratio = median["adaptive"] / median["fixed"]
    print(f"adaptive {median['adaptive']:.1f} s, fixed r=8 {median['fixed']:.1f} s, ratio {ratio:.3f}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": f"python -m benchmarks.cpu --model {Path(given.model).name} --data {Path(given.data).name} "
            f"--device {given.device} --train-max {given.train_max} --validation-max {given.validation_max} "
            f"--epochs {given.epochs} --repeats {given.repeats}",
            "ratio_of_medians": ratio,
            "median_seconds": median,
            "runs": runs,
            "train_examples": len(data.train),
            "mean_tokens": float(data.train.lengths.mean()),
            "device": torch.cuda.get_device_name() if given.device != "cpu" else platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
        }
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
