"""The columns time, parameters and memory of the paper's table, for its own models' shapes with random weights.

    python -m benchmarks.paper_shapes --shape 7b --out FILE.json

The paper's setting: batch 32, 3 epochs of SQuAD 2.0 (130,319 questions), so 12,219 steps. A few steps on the real
lengths are measured and the rest is EXTRAPOLATED from their median; time and memory do not depend on the weights'
values. What does not fit is measured with a quarter and an eighth of the blocks and extrapolated over blocks, too;
the line says so. All methods run eagerly, in the one loop. Of the strategies the parts are measured and put together
as they run: shrink has 60% of its steps at twice the largest rank (it may decide earlier) and five looks, grid 15%
with all candidates side by side and one look. Baselines do not look at validation data. race is not among them.

The file is written after each method, and the same command again measures only what is not in it.

Shapes: K candidates.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lengths import ROWS, read_lengths
from benchmarks.shapes import (
    SHAPES,
    allocated_bytes,
    made_up_data,
    peak_bytes,
    random_model,
    reset_peak,
    versions,
)
from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.device import wait_for
from rankrace.methods import find_method
from rankrace.select.shrink import PLANS
from rankrace.select.strategy import LATER
from rankrace.session import recipe_of
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel

QUESTIONS, EPOCHS, BATCH, LR = ROWS["squad2"], 3, 32, 1e-4
STEPS = EPOCHS * -(-QUESTIONS // BATCH)
RANKS, WIDE, FINAL = (2, 4, 8, 16, 32), 64, 8
LOOKED = 500
"""Validation examples of a look; half of the default's 1000, the other half reports the end."""
BASELINES = ("full", "lora-r8", "lora-r16", "houlsby", "dora-r16")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What was measured of one way to train."""

    step_s: float
    peak_bytes: int
    """Reserved: it fills the card where the lengths of passes vary."""
    allocated_bytes: int
    """What the training needs, without the allocator's cache and gaps."""
    parameters: int
    blocks: str
    """How many of the model's blocks were there."""


class Measurement:
    """Args:
    warm, steps: how many steps before the clock starts, and by the clock.
    """

    def __init__(self, shape: str, config: RunConfig, data: Data, warm: int, steps: int) -> None:
        self.shape, self.config, self.data = shape, config, data
        self.warm, self.steps = warm, steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.blocks = SHAPES[shape]["num_hidden_layers"]

    def part(self, build: "Build") -> Part:
        """With all blocks, or extrapolated from two smaller models where these do not fit."""
        found = self.with_blocks(build, self.blocks)
        if found is not None:
            return found
        few, more = self.blocks // 8, self.blocks // 4
        small, large = self.with_blocks(build, few), self.with_blocks(build, more)
        assert small is not None
        assert large is not None

        def line(a: float, b: float) -> float:
            return b + (b - a) / (more - few) * (self.blocks - more)

        return Part(
            step_s=line(small.step_s, large.step_s),
            peak_bytes=round(line(small.peak_bytes, large.peak_bytes)),
            allocated_bytes=round(line(small.allocated_bytes, large.allocated_bytes)),
            parameters=round(line(small.parameters, large.parameters)),
            blocks=f"does not fit; extrapolated from {few} and {more}",
        )

    def with_blocks(self, build: "Build", blocks: int) -> Part | None:
        """None: out of memory."""
        reset_peak(self.device)
        try:
            trainer, parameters = build(self, blocks)
            seconds = []
            for step in range(self.warm + self.steps):
                batch = trainer.batch(step)
                began = time.perf_counter()
                trainer.take_step(batch)
                wait_for(self.device)
                seconds.append(time.perf_counter() - began)
        except torch.OutOfMemoryError:
            return None
        return Part(step_s=statistics.median(seconds[self.warm :]), peak_bytes=peak_bytes(self.device),
                    allocated_bytes=allocated_bytes(self.device), parameters=parameters,
                    blocks=f"{blocks}")  # fmt: skip

    def look_s(self) -> float:
        """Of one rank on LOOKED examples."""
        trainer, _ = adapters((FINAL,))(self, self.blocks)
        examples = (self.data.validation.examples * LOOKED)[:LOOKED]
        trainer.measure(examples[:64])
        wait_for(self.device)
        began = time.perf_counter()
        trainer.measure(examples)
        return time.perf_counter() - began


Build = Callable[[Measurement, int], tuple[Trainer, int]]
"""Makes a trainer for a model of so many blocks, and counts the parameters that it delivers."""


def baseline(name: str) -> Build:
    def build(m: Measurement, blocks: int) -> tuple[Trainer, int]:
        hf = random_model(m.shape, m.device, blocks)
        running = find_method(name).prepare(m.config, m.data, hf, "causal")
        return running.trainer, running.described().parameters

    return build


def adapters(ranks: Sequence[int]) -> Build:
    """A bank of candidates."""

    def build(m: Measurement, blocks: int) -> tuple[Trainer, int]:
        hf = random_model(m.shape, m.device, blocks)
        bank = Bank(hf)
        assert m.config.micro_tokens is not None
        trainer = Trainer(PackedModel(hf, bank, "causal"), m.data.train.examples,
                          recipe_of(m.config, hf, m.config.micro_tokens))  # fmt: skip
        bank.start(tuple(ranks), [1.0] * len(ranks))
        trainer.start(bank.candidates, [LR] * len(ranks))
        return trainer, bank.trainable_parameters(FINAL)

    return build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--methods", default=",".join(("shrink", "grid", *BASELINES)))
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    config = RunConfig(
        model=options.shape, data="squad2", lr=LR, batch_size=BATCH, epochs=100, micro_tokens=options.micro_tokens,
        compile="off", cuda_graphs="off",
    )  # fmt: skip
    vocabulary = SHAPES[options.shape]["vocab_size"]
    data = made_up_data(read_lengths("squad2"), vocabulary, train=512, validation=512)
    m = Measurement(options.shape, config, data, options.warm, options.steps)
    found = {
        "command": f"python -m benchmarks.paper_shapes --shape {options.shape}",
        "steps": STEPS,
        "measured_steps": options.steps,
        "micro_tokens": options.micro_tokens,
        "versions": versions(m.device),
    }
    lines = measured_before(options.out, found)
    for method in options.methods.split(","):
        if method in {line["method"] for line in lines}:
            continue
        began = time.perf_counter()
        line = line_of(method, m)
        lines.append(line | {"measuring_s": round(time.perf_counter() - began, 1)})
        options.out.write_text(json.dumps({**found, "methods": lines}, indent=1) + "\n")
        print(f"{method}: {line['train_s'] / 3600:.2f} h, {line['allocated_bytes'] / 2**30:.1f} GiB, "
              f"{line['parameters']:,} parameters; blocks: {line['blocks']}", flush=True)  # fmt: skip


def measured_before(out: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of an earlier sitting."""
    if not out.exists():
        return []
    before = json.loads(out.read_text())
    lines = before.pop("methods")
    if before != now:
        raise SystemExit(f"{out} was measured otherwise ({before}, now {now}): give another --out")
    return lines


def line_of(method: str, m: Measurement) -> dict[str, Any]:
    """One row; seconds are extrapolated to the paper's steps."""
    if method not in ("grid", "shrink"):
        part = m.part(baseline(method))
        return {"method": method, "train_s": STEPS * part.step_s, "search_s": 0.0, **asdict(part)}
    after = m.part(adapters((FINAL,)))
    if method == "shrink":
        first, share = m.part(adapters((WIDE,))), LATER
        looks = (len(PLANS[0]) + 1) * (RANKS[-1].bit_length() + 1)
    else:
        first, share, looks = m.part(adapters(RANKS)), 0.15, len(RANKS)
    search = looks * m.look_s()
    train = STEPS * (share * first.step_s + (1 - share) * after.step_s)
    losers = STEPS * share * (first.step_s - after.step_s) if method == "grid" else 0.0
    return {
        "method": method, "train_s": train + search, "search_s": search + losers, "step_s": after.step_s,
        "first_step_s": first.step_s, "peak_bytes": max(first.peak_bytes, after.peak_bytes),
        "allocated_bytes": max(first.allocated_bytes, after.allocated_bytes),
        "parameters": after.parameters, "blocks": after.blocks,
    }  # fmt: skip


if __name__ == "__main__":
    main()
