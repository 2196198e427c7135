"""What the parts of benchmarks.speed share: the training's settings, the device, the clock."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.shapes import SHAPES, allocated_bytes, forget, milliseconds, peak_bytes, random_model
from rankrace.bank import check_quantize
from rankrace.device import wait_for
from rankrace.training.model import load_model

BATCH, LR, ALPHA, FINAL = 32, 1e-4, 16.0, 8
"""FINAL is the rank that the adaptive run ends with, and that of the baselines."""

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
        wait_for(self.device)
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
