"""What a whole adaptive run costs against the usual stacks, part by part, in one process.

    python -m benchmarks.speed --shape 7b --lengths squad2,sst2 --out benchmarks/results/speed-7b.json
    python -m benchmarks.speed --shape 7b --parts ours --quantize nf4 --out benchmarks/results/speed-7b-nf4.json
    python -m benchmarks.speed --shape tiny --device cpu --backend aot_eager --steps 2 --warm 1 --out /tmp/speed.json

Models have random weights, examples random tokens of real lengths (benchmarks/lengths.json): time and memory do not
depend on the values. All parts take the same batches of 32 examples. The parts:

ours    rankrace as it sets itself up for a training of 3 epochs: the step of the wide start, of the final rank and of
        five candidates side by side (grid); a look. A whole adaptive run is put together from them: wide until the
        third look, which is the earliest that may decide, then the final rank; all looks, first and last figures.
a       PEFT r=8, all linear layers, as Hugging Face's Trainer runs it: padded batches, autocast, fp32 adapter,
        clipping, fused AdamW. The loop is plain: Trainer's own overhead, its casting of all logits to float32, and
        its schedule are left out, in its favour. As many examples a pass as fit.
b       The strongest public stack: PEFT r=8 with a bfloat16 adapter and no dropout; the batch packed into rows
        without padding, position ids restarting; each decoder layer and the loss compiled with dynamic sizes; fused
        AdamW. Transformers' own attention for such rows wants the flash-attn package or fills a mask of all pairs;
        so it is given rankrace's (torch's flash attention over boundaries), in its favour.
c       Full fine-tuning as (a) runs, with stateless SGD and no masters, both in its favour: with AdamW it would not
        fit.
d       Five runs of (a), one after another, is five times (a).

Milliseconds of a step are medians after a warm-up; peaks are what torch's allocator had reserved, warm-up and weights
included, and beside them what tensors took at once (allocated_bytes); nothing is recomputed anywhere. Compiling is
what the warm-up took longer than its steps would have; a whole run has it in full, of every part.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import logging

from benchmarks.lengths import ROWS, read_lengths
from benchmarks.shapes import (
    SHAPES,
    allocated_bytes,
    clearings,
    empty,
    forget,
    made_up,
    made_up_data,
    matmul_rates,
    milliseconds,
    peak_bytes,
    random_model,
    reset_peak,
    synchronize,
    versions,
)
from rankrace.bank import Bank, check_quantize, quantize
from rankrace.config import RunConfig
from rankrace.data.encoded import Encoded
from rankrace.data.pack import epoch_batches
from rankrace.methods.peft_lora import padded
from rankrace.plan import REFINEMENTS, LookPlan, resolved
from rankrace.select.build import make_strategy, penalty_of
from rankrace.select.learning_rate import multiplier
from rankrace.select.shrink import STABLE_LOOKS, Shrink
from rankrace.session import recipe_of
from rankrace.training import attention
from rankrace.training.compiled import compile_blocks, uncompile
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel, load_model

BATCH, EPOCHS, LR, ALPHA = 32, 3, 1e-4, 16.0
RANKS, WIDE, FINAL = (2, 4, 8, 16, 32), 64, 8
LOOK_TOKENS = 16384
"""Of the examples by which a look is timed."""
PARTS = ("ours", "a", "b", "c")
GOALS = {
    "useful work / matmul rate": {"squad2": (">=", 0.70)},
    "the same / rate kept up": {},
    "adaptive / a": {"squad2": ("<=", 0.35), "sst2": ("<=", 0.20)},
    "adaptive / b": {"squad2": ("<=", 0.85), "sst2": ("<=", 0.85)},
    "adaptive / c": {"squad2": ("<=", 0.25), "sst2": ("<=", 0.25)},
    "adaptive / d": {"squad2": ("<=", 0.10), "sst2": ("<=", 0.10)},
    "peak / peak of a": {"squad2": ("<=", 0.50), "sst2": ("<=", 0.50)},
    "five side by side / one": {"sst2": ("<=", 2.0)},
    "compiling / 10 minutes": {"squad2": ("<=", 0.05), "sst2": ("<=", 0.05)},
}

Found = dict[str, Any]


class Bench:
    """What all parts share: the shape, the device, how many steps, the examples."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.device = torch.device(given.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        check_quantize(given.quantize, self.device, self.dtype)
        self.vocabulary: int = SHAPES[given.shape]["vocab_size"]

    def model(self) -> PreTrainedModel:
        forget(self.device)
        if self.given.model is None:
            return random_model(self.given.shape, self.device, self.given.layers)
        return load_model(self.given.model, "causal", None, device=self.device, dtype=self.dtype, seed=0)

    def timed(self, step: Callable[[int], object], warm: Sequence[int] | None = None) -> Found:
        """Median milliseconds of the steps 0, 1, …, after others to warm up."""
        steps = self.given.steps
        warm = range(steps, steps + self.given.warm) if warm is None else warm
        began = time.perf_counter()
        for i in warm:
            step(i)
        synchronize(self.device)
        warmed = time.perf_counter() - began
        ms = milliseconds(step, range(steps), self.device)
        median = statistics.median(ms)
        return {
            "step_ms": median,
            "all_ms": ms,
            "compile_s": max(0.0, warmed - len(warm) * median / 1e3),
            "peak_bytes": peak_bytes(self.device),
            "allocated_bytes": allocated_bytes(self.device),
        }


# --- ours


class Ours:
    """One model for all lengths, so that it is compiled once."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
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
        config = RunConfig(
            model=given.shape, data=lengths, epochs=EPOCHS, batch_size=BATCH, lr=LR, alpha=ALPHA,
            micro_tokens=given.micro_tokens or None, compile=given.compile, cuda_graphs=given.graphs,
            quantize=given.quantize,
        )  # fmt: skip
        data = made_up_data(
            read_lengths(lengths), bench.vocabulary, train=ROWS[lengths], validation=config.validation_max
        )
        held = data.validation.examples
        config = resolved(config, data, self.model, "causal")
        self.compile(config.compile == "on")
        assert config.micro_tokens is not None
        trainer = Trainer(self.model, data.train.examples, recipe_of(config, config.micro_tokens))
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
        found["look"] = self.look(trainer, strategy.ladder(), held[:looked])
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
            synchronize(device)
            cut = time.perf_counter()
            abreast = trainer.abreast_on(some, len(ladder))
            for k in range(0, len(ladder), abreast):
                part = slice(k, k + abreast)
                with bank.borrowed(bank.candidates.truncations(0, ladder[part], multipliers[part], whole)):
                    trainer.measure(some)
            synchronize(device)
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
        looks = min(STABLE_LOOKS, len(fractions))
        share = fractions[looks - 1]
        training = total * (share * found["wide"]["step_ms"] + (1 - share) * found["final"]["step_ms"]) / 1e3
        ranks = looks * len(look["ladder"]) + refined + 1  # the 1: the base
        looking = looks * look["spectra_s"] + look["example_s"] * (looked * ranks + 2 * fresh)
        # What the first data set compiled, the others find there; each run pays for it all the same.
        self.compile_s = max(self.compile_s, sum(found[part]["compile_s"] for part in ("wide", "look", "final")))
        return {
            "wide_share": share, "looks": looks, "looked": looked, "fresh": fresh, "training_s": training,
            "looking_s": looking, "compiling_s": self.compile_s, "seconds": training + looking + self.compile_s,
            "peak_bytes": max(found[part]["peak_bytes"] for part in ("wide", "look", "final")),
        }  # fmt: skip


# --- baselines


class Baseline(Protocol):
    """A way to take a step on some examples."""

    model: nn.Module
    size: int
    """What a pass may hold, in the baseline's own unit; halved until it fits."""

    def step(self, examples: Sequence[Encoded]) -> None: ...


class Padded:
    """One step as Trainer takes it; `size` examples a pass, whose losses add up to the mean over all targets."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, bench: Bench) -> None:
        self.model, self.optimizer, self.device = model, optimizer, bench.device
        self.size = BATCH

    def step(self, examples: Sequence[Encoded]) -> None:
        targets = torch.tensor(sum(int(e.supervised.sum()) for e in examples), device=self.device)
        for start in range(0, len(examples), self.size):
            some = examples[start : start + self.size]
            batch = {name: x.to(self.device) for name, x in padded(some).items()}
            labels = labels_of(some, batch["input_ids"].shape[1]).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.model(**batch, labels=labels, use_cache=False, num_items_in_batch=targets).loss
            loss.backward()
        update(self.model, self.optimizer)


class Packed:
    """One step on rows without padding; `size` tokens a row."""

    def __init__(self, model: nn.Module, packing: PackedModel[Any], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.packing, self.optimizer = model, packing, optimizer
        self.size = 0

    def step(self, examples: Sequence[Encoded]) -> None:
        device = self.packing.model.device
        targets = torch.tensor(sum(int(e.supervised.sum()) for e in examples), device=device)
        (batch,) = epoch_batches([len(e) for e in examples], len(examples), self.size, seed=0, epoch=0)
        for indices in batch.micros:
            row = self.packing.pack(examples, indices)
            some = [examples[i] for i in indices]
            labels = torch.cat([labels_of([e], len(e))[0] for e in some])[None].to(device)
            row = row.to(device)
            loss = self.model(
                input_ids=row.input_ids_T[None],
                position_ids=row.position_ids_T[None],
                layout=self.packing.layout(row, 1),
                labels=labels,
                num_items_in_batch=targets,
                use_cache=False,
            ).loss
            loss.backward()
        update(self.model, self.optimizer)


def labels_of(examples: Sequence[Encoded], width: int) -> Tensor:
    """Token ids where supervised, else -100."""
    labels = torch.full((len(examples), width), -100)
    for i, e in enumerate(examples):
        labels[i, : len(e)] = torch.where(torch.as_tensor(e.supervised), torch.as_tensor(e.input_ids).long(), -100)
    return labels


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def adapted(hf: PreTrainedModel, *, dropout: float, in_fp32: bool) -> nn.Module:
    lora = LoraConfig(
        r=FINAL, lora_alpha=int(ALPHA), lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(hf, lora, autocast_adapter_dtype=in_fp32).train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Trainer's default."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, weight_decay=0.0, fused=True)


def usual(bench: Bench) -> Baseline:
    """(a)"""
    model = adapted(bench.model(), dropout=bench.given.peft_dropout, in_fp32=True)
    return Padded(model, adamw(model), bench)


def strongest(bench: Bench) -> Baseline:
    """(b)"""
    hf = bench.model()
    packing = PackedModel(hf, Unadapted(), "causal")
    model = adapted(hf, dropout=0.0, in_fp32=False)
    hf.enable_input_require_grads()  # or the first layer would be compiled a second time
    if not attention.has_flash(bench.device, hf.dtype):
        AttentionInterface.register("apart", torch.compiler.disable(attention.packed_attention))
        hf.set_attn_implementation("apart")
    compiled = {"dynamic": True, "backend": bench.given.backend}
    for layer in hf.base_model.get_submodule("layers").children():
        layer.forward = torch.compile(layer.forward, **compiled)
    hf.loss_function = torch.compile(hf.loss_function, **compiled)
    baseline = Packed(model, packing, adamw(model))
    baseline.size = bench.given.micro_tokens or 8192
    return baseline


class Unadapted:
    """No bank: (b) takes only the packing from PackedModel."""

    def find_siblings(self, run: Callable[[], Any]) -> None: ...


def full(bench: Bench) -> Baseline:
    """(c)"""
    model = bench.model().train()
    return Padded(model, torch.optim.SGD(model.parameters(), LR, fused=True), bench)


BASELINES: dict[str, Callable[[Bench], Baseline]] = {"a": usual, "b": strongest, "c": full}


def measure_baseline(bench: Bench, baseline: Baseline, lengths: str) -> Found:
    """With the largest passes that fit. Where they only just do, and the allocator has to clear up in between, half
    as large ones are tried too, and the faster way counts."""
    examples = made_up(read_lengths(lengths), bench.vocabulary, ROWS[lengths])
    batches = epoch_batches([len(e) for e in examples], BATCH, 1, seed=0, epoch=0)

    def step(i: int) -> None:
        # In the order of the rows: by chance, as Trainer has them.
        baseline.step([examples[n] for n in sorted(n for row in batches[i].micros for n in row)])

    best: Found = {"does_not_fit": True}
    tight, largest = True, baseline.size
    while tight and baseline.size:
        reset_peak(bench.device)
        before = clearings(bench.device)
        found = fitting(bench, step)
        tight = found is None or clearings(bench.device) > before
        if found is not None and found["step_ms"] < best.get("step_ms", float("inf")):
            best = {**found, "size_of_a_pass": baseline.size}
        baseline.model.zero_grad()
        if tight:
            baseline.size //= 2
            empty(bench.device)
    baseline.size = largest  # other lengths may fit in fewer passes
    return best


def fitting(bench: Bench, step: Callable[[int], None]) -> Found | None:
    """None: out of memory."""
    try:
        return bench.timed(step)
    except torch.OutOfMemoryError:
        return None


# --- the table


def table(results: dict[str, Found], rates: Sequence[float]) -> list[Found]:
    """A line for each figure and data set whose parts were measured."""
    lines = []
    for lengths, found in results.items():
        for name, figure in figures(found, preparation(results), rates).items():
            sign, goal = GOALS[name].get(lengths, ("", None))
            met = None if goal is None else (figure <= goal if sign == "<=" else figure >= goal)
            lines.append({"lengths": lengths, "what": name, "measured": round(figure, 3),
                          "goal": None if goal is None else f"{sign} {goal}", "met": met})  # fmt: skip
    return lines


def preparation(results: dict[str, Found]) -> dict[str, float]:
    """Seconds of each baseline: the first data set paid for what the others found compiled."""
    names = {name for found in results.values() for name in found} & set(BASELINES)
    return {n: max(found.get(n, {}).get("compile_s", 0.0) for found in results.values()) for n in names}


def figures(found: Found, prepare_s: dict[str, float], rates: Sequence[float]) -> dict[str, float]:
    """Those of GOALS for one data set."""
    if "ours" not in found:
        return {}
    ours, run, final = found["ours"], found["ours"]["run"], found["ours"]["final"]
    burst, kept_up = rates
    made = {
        "useful work / matmul rate": final["useful_tflops"] / burst,
        "the same / rate kept up": final["useful_tflops"] / kept_up,
        "compiling / 10 minutes": run["compiling_s"] / 600,
    }
    for name in BASELINES:
        if "step_ms" in found.get(name, {}):
            other = found[name]["step_ms"] / 1e3 * ours["run_steps"] + prepare_s[name]
            made[f"adaptive / {name}"] = run["seconds"] / other
            if name == "a":
                made["adaptive / d"] = run["seconds"] / (5 * other)
    if "a" in found and run["peak_bytes"]:
        made["peak / peak of a"] = run["peak_bytes"] / found["a"]["peak_bytes"]
    if "grid" in ours:
        made["five side by side / one"] = ours["grid"]["step_ms"] / final["step_ms"]
    return {name: made[name] for name in GOALS if name in made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--model", help="a folder with real weights of the shape, instead of random ones")
    parser.add_argument("--lengths", default="squad2,sst2", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--skip", default="", help="grid: without the five candidates")
    parser.add_argument(
        "--micro-tokens", type=int, default=0, help="of a packed pass; 0: rankrace's own choice, 8192 for (b)"
    )
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="ours")
    parser.add_argument("--graphs", choices=("auto", "on", "off"), default="auto", help="ours")
    parser.add_argument("--quantize", choices=("none", "nf4", "fp8"), default="none", help="ours")
    parser.add_argument("--peft-dropout", type=float, default=0.05, help="of (a); LoraConfig's own default is 0")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    logging.set_verbosity_error()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # nobody is to run eagerly unawares
    bench = Bench(given)
    record: Found = {
        "command": "python -m benchmarks.speed " + " ".join(sys.argv[1:]),
        "versions": versions(bench.device),
        "options": {k: str(v) for k, v in vars(given).items() if k != "out"},
        "matmul_tflops": matmul_rates(given.shape, bench.device, bench.dtype),
        "results": {lengths: {} for lengths in given.lengths.split(",")},
    }
    burst, kept_up = record["matmul_tflops"]
    print(f"plain products: {burst:.0f} TFLOP/s in a burst, {kept_up:.0f} kept up", flush=True)
    failed = False
    for part in given.parts.split(","):
        began = time.perf_counter()
        try:
            measured_part(part, bench, record, given.out)
        except Exception:  # one part that cannot run leaves the others their figures; the exit code tells
            failed = True
            traceback.print_exc()
            record.setdefault("failed", {})[part] = traceback.format_exc().strip().splitlines()[-1]
        print(f"{part}: {time.perf_counter() - began:.0f} s in all", flush=True)
        record["table"] = table(record["results"], record["matmul_tflops"])
        written(record, given.out)
    print(f"{'lengths':10} {'what':28} {'measured':>9} {'goal':>8}")
    for line in record["table"]:
        mark = {None: "", True: "met", False: "MISSED"}[line["met"]]
        print(f"{line['lengths']:10} {line['what']:28} {line['measured']:9.3f} {line['goal'] or '':>8} {mark}")
    sys.exit(failed)


def measured_part(part: str, bench: Bench, record: Found, out: Path) -> None:
    """All lengths with one model."""
    if part == "ours":
        measure = Ours(bench).measure
    else:
        baseline = BASELINES[part](bench)

        def measure(lengths: str) -> Found:
            return measure_baseline(bench, baseline, lengths)

    for lengths, found in record["results"].items():
        found[part] = measure(lengths)
        shown = {k: v for k, v in found[part].items() if k != "all_ms"}
        print(f"{part}, {lengths}: {json.dumps(shown, default=str)}", flush=True)
        written(record, out)


def written(record: Found, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
