"""Predicted against measured peak memory of a training step, for five shapes of model.

    python -m benchmarks.memory --out benchmarks/results/memory-h100.json
    python -m benchmarks.memory --tiny --out FILE.json        the same with tiny shapes, on any device

Random weights, made on the device: memory does not depend on their values. Predicted is what `rankrace plan` would
say, from rows of 256 and 512 tokens (`rankrace.training.memory.probe`); measured is the peak of two whole steps on a
batch whose rows fill the budget. On a GPU both are the allocator's bytes, all of them. On a CPU, where a process's
peak cannot be told from an earlier one, they are those of tensors alone, beside what lies there between steps.

Shapes: K candidates.
"""

import argparse
import gc
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rankrace.bank import Bank
from rankrace.data.encoded import Encoded, Task
from rankrace.data.pack import Size
from rankrace.plan import candidate_bytes
from rankrace.record import versions
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.memory import gauge, held_bytes, probe
from rankrace.training.model import PackedModel


@dataclass(frozen=True, kw_only=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


SHAPES = {
    "bert-22m": Shape(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
                      num_key_value_heads=12, vocab_size=30522),
    "llama-135m": Shape(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                        num_key_value_heads=3, vocab_size=49152),
    "llama-1b": Shape(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                      num_key_value_heads=8, vocab_size=128256),
    "llama-3b": Shape(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                      num_key_value_heads=8, vocab_size=128256),
    "llama-7b": Shape(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=32, vocab_size=32000),
}  # fmt: skip
TINY = Shape(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, vocab_size=2000)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and with how many tokens a pass and a step."""

    ranks: tuple[int, ...]
    micro_tokens: int
    step_tokens: int
    longest: int
    supervised: float
    """The share of an example's tokens."""


SETTINGS = (
    Setting(ranks=(64,), micro_tokens=4096, step_tokens=8192, longest=512, supervised=0.1),
    Setting(ranks=(64,), micro_tokens=2048, step_tokens=4096, longest=128, supervised=1.0),
    Setting(ranks=(2, 4, 8, 16, 32), micro_tokens=4096, step_tokens=800, longest=64, supervised=0.05),
)


def random_model(name: str, shape: Shape, device: torch.device) -> tuple[PreTrainedModel, Task]:
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        with device:
            if name.startswith("bert"):
                values = {k: v for k, v in asdict(shape).items() if k != "num_key_value_heads"}
                return BertForSequenceClassification(BertConfig(**values, num_labels=2)), "classification"
            return LlamaForCausalLM(LlamaConfig(**asdict(shape), max_position_embeddings=2048)), "causal"
    finally:
        torch.set_default_dtype(before)


def examples(setting: Setting, task: Task, vocabulary: int) -> list[Encoded]:
    """Of a step: lengths from a quarter of the longest to the longest."""
    rng = np.random.default_rng(0)
    made: list[Encoded] = []
    while sum(map(len, made)) < setting.step_tokens:
        length = int(rng.integers(setting.longest // 4, setting.longest + 1))
        begins = length - max(1, round(setting.supervised * length))
        made.append(
            Encoded(
                input_ids=rng.integers(5, vocabulary, length).astype(np.int32),
                supervised=np.arange(length) >= (begins if task == "causal" else length),
                label=len(made) % 2 if task == "classification" else -1,
                group=len(made),
                row=len(made),
            )
        )
    return made


def line_of(hf: PreTrainedModel, task: Task, setting: Setting) -> dict[str, Any]:
    """Predicted and measured bytes of one setting; the model comes back as it was."""
    device = hf.device
    held = held_bytes(device)
    bank = Bank(hf)
    try:
        rows = examples(setting, task, hf.config.get_text_config().vocab_size)
        recipe = Recipe(
            epochs=2, max_steps=2, batch_size=len(rows), micro_tokens=setting.micro_tokens, schedule="constant",
            warmup=0.0, weight_decay=0.0, clip=1.0, seed=0,
        )  # fmt: skip
        trainer = Trainer(PackedModel(hf, bank, task), rows, recipe)
        K, R = len(setting.ranks), max(setting.ranks)
        bank.start(setting.ranks, [1.0] * K)
        trainer.start(bank.candidates, [1e-4] * K)
        began = time.perf_counter()
        cost = probe(trainer.model, rows)
        probe_s = time.perf_counter() - began

        def of_pass(size: Size) -> tuple[float, int, int]:
            abreast = trainer.abreast(size.tokens, K)
            return cost.training(size, abreast) / cost.slack, size.tokens, abreast

        training, tokens, abreast = max(map(of_pass, trainer.sizes()))
        # With what no part accounts for, such as the libraries' workspace.
        between = held + candidate_bytes(bank, K, R)
        workspace = held_bytes(device) - between if device.type == "cuda" else 0
        with gauge(device) as taken:
            for _ in trainer.run(trainer.total):
                pass
            measured = taken.peak
        beside = between + workspace if device.type == "cuda" else 0
        return {
            **asdict(setting), "pass_tokens": tokens, "side_by_side": abreast, "passes": len(trainer.batch(0).micros),
            "base_bytes": held, "candidate_bytes": candidate_bytes(bank, K, R), "workspace_bytes": workspace,
            "predicted_bytes": round(beside + training), "measured_bytes": beside + measured,
            "ratio": round((beside + training) / (beside + measured), 4), "pass_ratio": round(training / measured, 4),
            "probe_s": round(probe_s, 2),
        }  # fmt: skip
    finally:
        bank.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tiny", action="store_true", help="two small blocks in place of each shape")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for name in options.shapes.split(","):
        hf, task = random_model(name, TINY if options.tiny else SHAPES[name], device)
        for setting in SETTINGS:
            line = {"shape": name, **line_of(hf, task, setting)}
            lines.append(line)
            print(json.dumps(line), flush=True)
            gc.collect()
        del hf
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    command = "python -m benchmarks.memory" + (" --tiny" if options.tiny else "")
    found = {"command": command, "versions": versions(device), "lines": lines}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
