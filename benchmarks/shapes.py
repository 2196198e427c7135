"""What the measurements share: models by their shapes, real lengths of examples, a clock."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.lengths import Lengths
from rankrace.data import Data
from rankrace.data.encoded import NO_LABEL, Encoded, EncodedSet
from rankrace.device import wait_for

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 512},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "tie_word_embeddings": True, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "tie_word_embeddings": True, "vocab_size": 128256},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "vocab_size": 32000},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "vocab_size": 32000},
}  # fmt: skip


def random_model(shape: str, device: torch.device, layers: int | None = None) -> PreTrainedModel:
    """A LLaMA with random weights, bfloat16 on a GPU: time and memory do not depend on the values."""
    config = LlamaConfig(max_position_embeddings=8192, **SHAPES[shape])
    if layers is not None:
        config.num_hidden_layers = layers
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def made_up(lengths: Lengths, vocabulary: int, rows: int | None = None) -> list[Encoded]:
    """Examples of these lengths with random tokens, the last ones supervised; over and over up to `rows`."""
    generator = np.random.default_rng(0)
    examples = [
        Encoded(
            input_ids=generator.integers(vocabulary, size=tokens, dtype=np.int32),
            supervised=np.arange(tokens) >= tokens - supervised,
            label=NO_LABEL,
            group=i,
            row=i,
        )
        for i, (tokens, supervised) in enumerate(zip(lengths.tokens, lengths.supervised, strict=True))
    ]
    rows = len(examples) if rows is None else rows
    return (examples * -(-rows // len(examples)))[:rows]


def made_up_data(lengths: Lengths, vocabulary: int, *, train: int, validation: int) -> Data:
    """So many rows on either side."""

    def side(rows: int) -> EncodedSet:
        examples = made_up(lengths, vocabulary, rows)
        supervised = sum(int(e.supervised.sum()) for e in examples)
        return EncodedSet(examples=examples, truncated=0, dropped=0, supervised_tokens=supervised)

    return Data(train=side(train), validation=side(validation), labels=None, format="", how_split="", sha256="",
                notes=[])  # fmt: skip


def versions(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, **{p: version(p) for p in ("torch", "transformers", "peft")}}


def matmul_rates(shape: str, device: torch.device, dtype: torch.dtype, seconds: float = 3.0) -> tuple[float, float]:
    """TFLOP/s of plain products of the shape: of the best of them in a burst, and what the chip keeps up of it.

    A burst is over before the chip's power is limited; a training is not.
    """
    D, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    T, large = (8192, 8192) if device.type == "cuda" else (64, D)
    widths, rates = ((D, D), (D, inner), (inner, D), (large, large)), []

    def product(D_in: int, D_out: int) -> Callable[[int], object]:
        x_TD = torch.randn(T, D_in, device=device, dtype=dtype)
        W_OD = torch.randn(D_out, D_in, device=device, dtype=dtype)
        return lambda _: x_TD @ W_OD.T

    for D_in, D_out in widths:
        ms = milliseconds(product(D_in, D_out), range(60), device)[10:]
        rates.append(2 * T * D_in * D_out / statistics.median(ms) / 1e9)
    D_in, D_out = widths[rates.index(max(rates))]
    run, times, done = product(D_in, D_out), 100, list[tuple[float, float]]()
    began = time.perf_counter()
    while not done or done[-1][0] < seconds:
        at = time.perf_counter()
        for i in range(times):
            run(i)
        wait_for(device)
        now = time.perf_counter()
        done.append((now - began, 2 * T * D_in * D_out * times / (now - at) / 1e12))
    return max(rates), statistics.median(rate for at, rate in done if at >= seconds * 2 / 3)


def forget(device: torch.device) -> None:
    """Frees what nobody holds any more, compiled code as well, and starts to look for the peak anew."""
    torch.compiler.reset()
    reset_peak(device)


def command(module: str, out: Path) -> str:
    """As it was given, but for the folder of `out`, which is a machine's."""
    return f"python -m {module} " + " ".join(out.name if word == str(out) else word for word in sys.argv[1:])


def empty(device: torch.device) -> None:
    """Gives back what the allocator keeps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def clearings(device: torch.device) -> int:
    """How often the allocator had to give everything back to go on: its memory is too tight then to be fast."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Starts to look for the peak anew; what the allocator keeps from before is no part of it."""
    if device.type == "cuda":
        empty(device)
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int:
    """What torch had reserved, for every method alike, as `rankrace.progress.peak_bytes` has it: graphs' pools are no
    tensors between replays. 0 on a CPU, where a process has one peak for all its parts."""
    return torch.cuda.max_memory_reserved() if device.type == "cuda" else 0


def allocated_bytes(device: torch.device) -> int:
    """The same of tensors alone: less by gaps, by the cache, and by graphs' pools."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def milliseconds(go: Callable[[int], object], steps: Sequence[int], device: torch.device) -> list[float]:
    """Of each step. On a GPU by events between the steps, so that the host may run ahead as it does in a run."""
    if device.type != "cuda":
        ticks = [time.perf_counter()]
        for i in steps:
            go(i)
            ticks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(ticks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    events[0].record()
    for i, event in zip(steps, events[1:], strict=True):
        go(i)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]
