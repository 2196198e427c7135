"""From the bank to a plain PEFT adapter on disk.

What is written loads with `peft.PeftModel.from_pretrained`, in Transformers and in vLLM; nothing of rankrace
is needed to use it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from rankrace.bank.attach import Bank
from rankrace.bank.targets import matches


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One candidate, cut to its own rank."""

    rank: int
    """That of most layers, or what their ranks come to on average: `Candidates.ranks`."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """Layer name → A [r, D_in], B [D_out, r]; r may differ from layer to layer, and where it is 0 there is no entry:
    PEFT knows no rank 0, but leaves alone what is not among its target modules."""
    multiplier: float
    heads: dict[str, dict[str, Tensor]]
    """Head name → parameter name → value."""

    @property
    def ranks(self) -> dict[str, int]:
        return {name: A.shape[0] for name, (A, _) in self.factors.items()}


def adapter_of(bank: Bank, k: int) -> Adapter:
    """Candidate k of the bank, without its padding."""
    c = bank.candidates
    return Adapter(
        rank=c.ranks[k],
        factors={n: (A.contiguous(), B.contiguous()) for n, (A, B) in c.factors_of(k).items() if len(A) > 0},
        multiplier=c.multipliers[k],
        heads={n: {p: t[k] for p, t in zip(head.names, c.heads[n], strict=True)} for n, head in bank.heads.items()},
    )


def lora_config(bank: Bank, adapter: Adapter) -> LoraConfig:
    """PEFT's description of the adapter. α = s·r, so that PEFT's multiplier α/r is ours for every layer."""
    pattern = {name: r for name, r in adapter.ranks.items() if r != adapter.rank}
    conv1d = [isinstance(layer.base, Conv1D) for layer in bank.layers.values()]
    assert all(conv1d) or not any(conv1d), "PEFT keeps one layout flag for all layers"
    return LoraConfig(
        task_type=TaskType.SEQ_CLS if bank.heads else TaskType.CAUSAL_LM,
        base_model_name_or_path=bank.model.name_or_path,
        r=adapter.rank,
        lora_alpha=tidy(adapter.multiplier * adapter.rank),  # type: ignore[arg-type]  # PEFT takes fractions too
        rank_pattern=pattern,
        alpha_pattern={name: tidy(adapter.multiplier * r) for name, r in pattern.items()},
        target_modules=short_names(bank, adapter.factors),
        modules_to_save=list(bank.heads) or None,
        lora_dropout=bank.dropout,
        fan_in_fan_out=any(conv1d),
        inference_mode=True,
    )


def save_adapter(bank: Bank, adapter: Adapter, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into an existing folder."""
    lora_config(bank, adapter).save_pretrained(str(folder))
    tensors = {}
    for name, (A, B) in adapter.factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    for head, parameters in adapter.heads.items():
        for name, value in parameters.items():
            tensors[f"base_model.model.{head}.{name}"] = value
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def short_names(bank: Bank, layers: Collection[str]) -> list[str]:
    """The last parts of these layers' names (q_proj, …) where they mean exactly these layers, else whole names."""
    endings = sorted({name.rpartition(".")[2] for name in layers})
    hit = {name for name in module_names(bank) if any(matches(name, e) for e in endings)}
    return endings if hit == set(layers) else list(layers)


def module_names(bank: Bank) -> Iterable[str]:
    """The names of the model's modules as they were before the bank was attached."""
    inside = tuple(f"{name}." for name in (*bank.layers, *bank.heads))
    names = [name for name, _ in bank.model.named_modules() if name and not name.startswith(inside)]
    return [name for name in names if name not in bank.heads]


def tidy(value: float) -> int | float:
    """An integer where it is one: 32, not 32.00000000000001."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value
