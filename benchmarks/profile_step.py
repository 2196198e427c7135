"""Where the time of a training step goes: ms, useful TFLOP/s, and the kernels, for each way to launch it.

    python -m benchmarks.profile_step --shape 7b --lengths squad2 --ranks 16
    python -m benchmarks.profile_step --shape 135m --lengths sst2 --ranks 2,4,8,16,32 --table 0

A LLaMA of the shape with random weights (time and memory do not depend on the values) on real lengths
(benchmarks/lengths.json); adapters on all linear layers. Useful work is that of the frozen weights alone: 2
operations a weight and token forward, 2 for the gradient of the input; no adapter, attention or head counts.

Shapes: K candidates, T tokens of a pass, R rank.
"""

import argparse
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.lengths import ROWS, read_lengths
from benchmarks.shapes import SHAPES, made_up, peak_bytes, random_model
from rankrace.bank import Bank
from rankrace.data.encoded import Encoded
from rankrace.device import wait_for
from rankrace.training.compiled import compile_blocks, uncompile
from rankrace.training.loop import Recipe, Trainer
from rankrace.training.model import PackedModel

WAYS = ("eager", "compiled", "graphs", "compiled-graphs")

KINDS = {
    "compiled (norms, rotary, SwiGLU, residuals)": r"^triton",  # first: their names tell of copies that are fused
    "copies": r"copy|memcpy|CatArray",
    "attention": r"flash|fmha|attn",
    "matrix products": r"gemm|cutlass|nvjet|cublas|splitK|gemv|sm\d+_x",
    "clearing": r"memset|FillFunctor",
    "reductions": r"reduce",
    "other elementwise": r"elementwise|vectorized",
}
"""What a kernel's name says it is; the first that fits."""


def steps(
    model: PackedModel, train: list[Encoded], ranks: tuple[int, ...], batch: int, micro: int, graphs: bool
) -> tuple[Trainer, Iterator[Tensor]]:
    recipe = Recipe(
        epochs=100, max_steps=None, batch_size=batch, micro_tokens=micro, schedule="constant", warmup=0.0,
        weight_decay=0.0, clip=1.0, seed=0, graphs=graphs,
    )  # fmt: skip
    trainer = Trainer(model, train, recipe)
    model.bank.start(ranks, [1.0] * len(ranks))
    trainer.start(model.bank.candidates, [1e-4] * len(ranks))
    return trainer, trainer.run(10**9)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "rest")


def table(go: Callable[[], None], device: torch.device, times: int, rows: int) -> None:
    """The device's kernels of a step, by kind and one by one, and how long the device waits for the host."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(times):
            go()
        wait_for(device)
        wall = (time.perf_counter() - began) * 1e3 / times
    cuda = device.type == "cuda"
    spent: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        # On the device there are kernels, and the shadows of annotations made on the host.
        if cuda and (event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation):
            continue
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[event.key] = (us / 1e3 / times, event.count // times)
    by_kind: dict[str, float] = defaultdict(float)
    for name, (ms, _) in spent.items():
        by_kind[kind_of(name)] += ms
    busy = sum(by_kind.values())
    print(f"  a profiled step: {wall:.1f} ms, of which {busy:.1f} ms in kernels")
    for kind, ms in sorted(by_kind.items(), key=lambda item: -item[1]):
        print(f"  {ms:9.2f} ms  {ms / busy:5.1%}  {kind}")
    for name, (ms, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:rows]:
        print(f"  {ms:9.2f} ms  {count:5d} ×  {name[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, to fit or to be quick")
    parser.add_argument("--lengths", choices=ROWS, default="squad2")
    parser.add_argument("--ranks", default="16", help="one for each candidate: 2,4,8,16,32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-tokens", type=int, default=8192, help="of one pass, over all candidates in it")
    parser.add_argument("--ways", default=",".join(WAYS[:2]), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=4, help="steps before the clock starts; graphs want more")
    parser.add_argument("--table", type=int, default=25, help="kernels to list; 0: no profile")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {options}")
    ranks = tuple(int(r) for r in options.ranks.split(","))

    train = made_up(read_lengths(options.lengths), SHAPES[options.shape]["vocab_size"], 50 * options.batch)
    hf = random_model(options.shape, device, options.layers)
    bank = Bank(hf)
    model = PackedModel(hf, bank, "causal", chunk=1024)
    weights = sum(layer.d_in * layer.d_out for layer in bank.layers.values())
    for way in options.ways.split(","):
        assert way in WAYS, way
        if "compiled" in way:
            compile_blocks(bank)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        trainer, run = steps(model, train, ranks, options.batch, options.micro_tokens, "graphs" in way)
        for _ in range(options.warm):
            next(run)
        wait_for(device)
        warmed, tokens, ms = time.perf_counter() - began, trainer.tokens, []
        for _ in range(options.steps):
            began = time.perf_counter()
            loss_K = next(run)
            wait_for(device)
            ms.append((time.perf_counter() - began) * 1e3)
        median = statistics.median(ms)
        KT = len(ranks) * (trainer.tokens - tokens) / options.steps
        print(
            f"{way}: {median:.2f} ms a step (from {min(ms):.2f} to {max(ms):.2f}), {KT:.0f} tokens of {len(ranks)} "
            f"candidates, {4 * weights * KT / (sum(ms) / len(ms)) / 1e9:.1f} TFLOP/s useful, "
            f"peak {peak_bytes(device) / 2**30:.2f} GiB, "
            f"warm-up {warmed:.1f} s, losses {[round(x, 4) for x in loss_K.tolist()]}"
        )
        if options.table:
            table(lambda run=run: next(run), device, 3, options.table)
        if "compiled" in way:
            uncompile(bank)


if __name__ == "__main__":
    main()
