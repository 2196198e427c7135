"""An adapter merged into its base model, for serving without PEFT."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rankrace.data.hub import reach_hub
from rankrace.errors import RankraceError
from rankrace.result import Result
from rankrace.training.checkpoint import written_whole
from rankrace.training.model import load_tokenizer, readable

TOLERANCE = 0.05
"""Largest difference of a logit, as a share of the largest logit, that rounding to 16 bits explains."""
NEEDED = {"base_model_name_or_path", "task_type", "modules_to_save"}
"""What merging reads of an adapter's configuration."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was found of the merged model as it is on disk."""

    worst: float
    """The largest difference of a logit from that of base and adapter."""
    largest: float
    """Of their logits, without its sign."""
    loader: str
    """The class of Transformers that loads it."""


def merge(adapter: Path, out: Path, model: str | None = None) -> Merged:
    """Writes the base with the adapter's update added to its weights, in bfloat16, and the tokenizer.

    The sum is taken in float32 and rounded once. The logits of the merged model, as read back from the disk,
    are compared with those of base and adapter on a text.

    Raises:
        RankraceError: no adapter there, it was trained on another base, the output exists, or the logits differ by
            more than rounding explains.
    """
    described = description(adapter)
    if os.path.exists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise RankraceError(
            f"{out} is not an empty folder",
            why="what is there would be overwritten",
            fix="choose another --out",
        )
    name = model or described["base_model_name_or_path"]
    classes = described["task_type"] == "SEQ_CLS"
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    extra = labels(adapter, described["modules_to_save"] or []) if classes else {}
    reach_hub(name)
    base = readable(name, lambda: auto.from_pretrained(name, dtype=torch.float32, **extra))
    tokenizer = load_tokenizer(str(adapter))
    ids = tokenizer("Merging must change nothing but the number of files.", return_tensors="pt")["input_ids"]
    peft_model = attached(base, adapter, name).eval()
    with torch.no_grad():
        expected = peft_model(input_ids=ids).logits
    merged = peft_model.merge_and_unload(safe_merge=True).to(torch.bfloat16)
    with written_whole(out) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        with torch.no_grad():
            again = auto.from_pretrained(partial, dtype=torch.float32).eval()(input_ids=ids).logits
        worst, largest = (again - expected).abs().max().item(), expected.abs().max().item()
        if not worst <= TOLERANCE * largest:
            raise RankraceError(
                f"the merged model's logits differ by {worst:.3g}, where the largest is {largest:.3g}",
                why="more than rounding to 16 bits explains: the merged model is not the trained one",
                fix="serve base and adapter unmerged, and please report this",
            )
    return Merged(worst=worst, largest=largest, loader=auto.__name__)


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
