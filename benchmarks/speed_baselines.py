"""The parts `a`, `b` and `c` of benchmarks.speed: the usual stacks, on the batches that `ours` takes."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from benchmarks.lengths import ROWS, read_lengths
from benchmarks.shapes import clearings, empty, made_up, reset_peak
from benchmarks.speed_bench import ALPHA, BATCH, FINAL, LR, Bench, Found
from rankrace.data.encoded import Encoded
from rankrace.data.pack import epoch_batches
from rankrace.methods.peft_lora import padded
from rankrace.training import attention
from rankrace.training.model import PackedModel


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
    stateless = bench.given.full_optimizer == "sgd"
    return Padded(model, torch.optim.SGD(model.parameters(), LR, fused=True) if stateless else adamw(model), bench)


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
