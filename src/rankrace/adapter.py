"""An adapter as it lies on the disk, and the base with it on."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rankrace.data.encoded import Task
from rankrace.data.hub import reach_hub
from rankrace.errors import RankraceError
from rankrace.result import Result
from rankrace.training.model import readable

NEEDED = {"base_model_name_or_path", "task_type", "modules_to_save"}
"""What is read of an adapter's configuration."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A base with an adapter on it."""

    model: PeftModel
    task: Task
    loader: Any
    """The class of Transformers that loads the base."""

    @property
    def base(self) -> PreTrainedModel:
        """The base with the adapter's layers in it."""
        found = self.model.get_base_model()
        assert isinstance(found, PreTrainedModel)
        return found


def load_adapted(adapter: Path, model: str | None, dtype: torch.dtype) -> Adapted:
    """The base with the adapter on it, on the host.

    Args:
        model: the base, if it has moved.

    Raises:
        RankraceError: no adapter there, no such base, or one that does not fit.
    """
    described = description(adapter)
    name = model or described["base_model_name_or_path"]
    classes = described["task_type"] == "SEQ_CLS"
    loader = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    extra = labels(adapter, described["modules_to_save"] or []) if classes else {}
    reach_hub(name)
    base = readable(name, lambda: loader.from_pretrained(name, dtype=dtype, **extra))
    return Adapted(model=attached(base, adapter, name), task="classification" if classes else "causal", loader=loader)


def description(adapter: Path) -> dict[str, Any]:
    """The adapter's own configuration; its weights are there and readable.

    Raises:
        RankraceError: the folder is not a whole adapter.
    """
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt"):
            described = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            if not isinstance(described, dict) or not described.keys() >= NEEDED:
                raise ValueError(f"adapter_config.json does not have all of {', '.join(sorted(NEEDED))}")
            return described
    except (OSError, ValueError, SafetensorError) as error:
        below = adapter / "adapter"  # OUT of a run instead of what is in it
        raise RankraceError(
            f"{adapter} is not an adapter: {error}",
            why="a folder with adapter_config.json and adapter_model.safetensors is needed",
            fix=f"did you mean {below}?" if os.path.exists(below) else "give OUT/adapter of a finished run",
        ) from error


def attached(base: PreTrainedModel, adapter: Path, name: str) -> PeftModel:
    """The base with the adapter on it.

    Raises:
        RankraceError: the adapter was trained on another base.
    """
    try:
        peft_model = PeftModel.from_pretrained(base, str(adapter))
        # PEFT passes over factors for which the base has no layer.
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            saved = set(file.keys())
        placed = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        lost = sorted(key for key in saved ^ placed.keys() if ".lora_" in key)
        if lost:
            raise ValueError(f"{len(lost)} factors have no counterpart, such as {lost[0]}")
    except (ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[-1]  # of many factors that do not fit, one will do
        raise RankraceError(
            f"{adapter} does not fit {name}: {said.strip()}",
            why="it was trained on a model with other layers, or with layers of other shapes",
            fix="give the base that it was trained on with --model",
        ) from error
    return peft_model


def labels(adapter: Path, heads: list[str]) -> dict[str, Any]:
    """How many classes the saved classifier has, and their names if the run's result.json stands beside it."""
    record = adapter.parent / "result.json"
    if record.exists() and (names := Result.read(record).labels):
        return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        shapes = [
            file.get_slice(key).get_shape()
            for key in file.keys()  # noqa: SIM118
            if key.endswith("weight") and any(f".{head}." in key for head in heads)
        ]
    return {"num_labels": shapes[-1][0]} if shapes else {}
