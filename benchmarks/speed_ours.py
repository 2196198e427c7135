"""The part `ours` of benchmarks.speed: rankrace as it sets itself up, and a whole adaptive run put together."""

import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.lengths import ROWS, read_lengths
from benchmarks.shapes import allocated_bytes, empty, made_up_data, peak_bytes, reset_peak
from benchmarks.speed_bench import ALPHA, BATCH, FINAL, LR, Bench, Found
from rankrace.bank import Bank, quantize
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Encoded
from rankrace.device import wait_for
from rankrace.plan import REFINEMENTS, LookPlan, resolved
from rankrace.select.build import make_strategy, penalty_of
from rankrace.select.learning_rate import multiplier
from rankrace.select.shrink import Shrink, ladder
from rankrace.select.strategy import LATER
from rankrace.session import recipe_of
from rankrace.training.compiled import compile_blocks, uncompile
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel

EPOCHS, WIDE, RANKS = 3, 64, (2, 4, 8, 16, 32)
LOOK_TOKENS = 16384
"""Of the examples by which a look is timed."""


def training_of(bench: Bench, lengths: str, rows: int | None = None, epochs: int = EPOCHS) -> tuple[RunConfig, Data]:
    """A run as a user would set it up, on so many rows of these lengths; by default as many as there are."""
    given = bench.given
    config = RunConfig(
        model=given.shape, data=lengths, epochs=epochs, batch_size=BATCH, lr=LR, alpha=ALPHA,
        micro_tokens=given.micro_tokens or None, compile=given.compile, cuda_graphs=given.graphs,
        quantize=given.quantize,
    )  # fmt: skip
    train = ROWS[lengths] if rows is None else rows
    read = read_lengths(lengths)
    return config, made_up_data(read, bench.vocabulary, train=train, validation=config.validation_max)


class Ours:
    """One model for all lengths, so that it is compiled once.

    Args:
        rows, epochs: of the training that is put together.
    """

    def __init__(self, bench: Bench, rows: int | None = None, epochs: int = EPOCHS) -> None:
        self.bench = bench
        self.rows, self.epochs = rows, epochs
        model = bench.model()
        quantize(model, bench.given.quantize, bench.device)  # layer by layer, each in place of the one it is made of
        empty(bench.device)
        self.base_bytes = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
        self.bank = Bank(model)
        self.model = PackedModel(self.bank.model, self.bank, "causal")
        self.weights = sum(layer.d_in * layer.d_out for layer in self.bank.layers.values())
        self.compiled = False
        self.compile_s = 0.0

    def measure(self, lengths: str) -> Found:
        bench, given = self.bench, self.bench.given
        reset_peak(bench.device)
        config, data = training_of(bench, lengths, self.rows, self.epochs)
        held = data.validation.examples
        config = resolved(config, data, self.model, "causal")
        self.compile(config.compile == "on")
        assert config.micro_tokens is not None
        trainer = Trainer(self.model, data.train.examples, recipe_of(config, self.bank.model, config.micro_tokens))
        plan = LookPlan.of(config, data, trainer)
        found: Found = {
            "compile": config.compile, "graphs": config.cuda_graphs, "micro_tokens": config.micro_tokens,
            "run_steps": trainer.total, "base_bytes": self.base_bytes,
        }  # fmt: skip
        found["wide"] = self.phase(trainer, (WIDE,))
        strategy = make_strategy(config, trainer.total, self.bank, plan.fractions, penalty_of(config, self.bank))
        assert isinstance(strategy, Shrink)
        half = len(held) // 2
        looked, fresh = min(plan.looked, half), min(plan.fresh, half)
        found["look"] = self.look(trainer, ladder(strategy.largest), held[:looked])
        found["final"] = self.phase(trainer, (FINAL,))
        useful = 4 * self.weights * found["final"]["tokens"] / found["final"]["step_ms"] / 1e9
        found["final"]["useful_tflops"] = useful
        if "grid" not in given.skip:
            found["grid"] = self.phase(trainer, RANKS)
        found["run"] = self.run(found, plan.fractions, looked, fresh, REFINEMENTS if config.refine else 0)
        return found

    def compile(self, wanted: bool) -> None:
        if wanted and not self.compiled:
            compile_blocks(self.bank, self.bench.given.backend)
        if self.compiled and not wanted:
            uncompile(self.bank)
        self.compiled = wanted

    def phase(self, trainer: Trainer[Bank], ranks: Sequence[int]) -> Found:
        """Steps with these candidates."""
        reset_peak(self.bench.device)
        self.bank.start(ranks, [multiplier(r, ALPHA, "lora") for r in ranks])
        trainer.start(self.bank.candidates, [LR] * len(ranks))
        steps, warm = self.bench.given.steps, self.bench.given.warm

        def step(i: int) -> None:
            trainer.take_step(trainer.batch(i))

        trainer.step = 0
        found = self.bench.timed(step, range(steps, steps + warm))
        rows = [row for i in range(steps) for row in trainer.batch(i).micros]
        found["ranks"] = list(ranks)
        found["tokens"] = statistics.median(
            sum(trainer.lengths[n] for row in trainer.batch(i).micros for n in row) for i in range(steps)
        )
        found["passes_a_step"] = len(rows) / steps
        return found

    def look(self, trainer: Trainer[Bank], ladder: Sequence[int], held: list[Encoded]) -> Found:
        """Seconds of the spectra, and of measuring one example at one rank."""
        bank, device = self.bank, self.bench.device
        some = held[: max(1, round(LOOK_TOKENS * len(held) / sum(map(len, held))))]
        multipliers = [multiplier(r, ALPHA, "lora") for r in ladder]
        reset_peak(device)
        seconds = []
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            whole = bank.candidates.spectra(0)
            wait_for(device)
            cut = time.perf_counter()
            abreast = trainer.abreast_on(some, len(ladder))
            for k in range(0, len(ladder), abreast):
                part = slice(k, k + abreast)
                with bank.borrowed(bank.candidates.truncations(0, ladder[part], multipliers[part], whole)):
                    trainer.measure(some)
            wait_for(device)
            seconds.append((cut - began, time.perf_counter() - cut))
            del whole
        spectra, measuring = seconds[-1]
        compiling = max(0.0, sum(seconds[0]) - sum(seconds[1]))
        return {
            "ladder": list(ladder),
            "spectra_s": spectra,
            "example_s": measuring / len(some) / len(ladder),
            "compile_s": compiling,
            "peak_bytes": peak_bytes(device),
            "allocated_bytes": allocated_bytes(device),
        }

    def run(self, found: Found, fractions: Sequence[float], looked: int, fresh: int, refined: int) -> Found:
        """A whole adaptive run, in seconds."""
        total, look = found["run_steps"], found["look"]
        looks, share = len(fractions) + 1, LATER  # the latest that the choice may come
        training = total * (share * found["wide"]["step_ms"] + (1 - share) * found["final"]["step_ms"]) / 1e3
        ranks = looks * len(look["ladder"]) + refined + 1  # the 1: the base
        ranks += 3 * (self.epochs > 1)  # what was chosen, soon after, and both ends
        looking = looks * look["spectra_s"] + look["example_s"] * (looked * ranks + 2 * fresh)
        # What the first data set compiled, the others find there; each run pays for it all the same.
        self.compile_s = max(self.compile_s, sum(found[part]["compile_s"] for part in ("wide", "look", "final")))
        return {
            "wide_share": share, "looks": looks, "looked": looked, "fresh": fresh, "training_s": training,
            "looking_s": looking, "compiling_s": self.compile_s, "seconds": training + looking + self.compile_s,
            "peak_bytes": max(found[part]["peak_bytes"] for part in ("wide", "look", "final")),
        }  # fmt: skip
