"""An adapter merged into its base model, for serving without PEFT."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rankrace.errors import RankraceError
from rankrace.train.checkpoint import written_whole
from rankrace.train.model import readable

TOLERANCE = 0.05
"""Largest difference of a logit, as a share of the largest logit, that rounding to 16 bits explains."""


def merge(adapter: Path, out: Path, model: str | None = None) -> float:
    """Writes the base with the adapter's update added to its weights, in bfloat16, and the tokenizer.

    The sum is taken in float32 and rounded once. The logits of the merged model, as read back from the disk,
    are compared with those of base and adapter on a text.

    Returns:
        The largest difference of a logit.

    Raises:
        RankraceError: no adapter there, the output exists, or the logits differ by more than rounding explains.
    """
    try:
        described = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RankraceError(
            f"{adapter} is not an adapter: {error}",
            why="a folder with adapter_config.json and adapter_model.safetensors is needed",
            fix="give OUT/adapter of a finished run",
        ) from error
    if out.exists() and any(out.iterdir()):
        raise RankraceError(
            f"{out} is not empty",
            why="its files would be overwritten",
            fix="choose another --out",
        )
    name = model or described["base_model_name_or_path"]
    classes = described["task_type"] == "SEQ_CLS"
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    head = next(iter(described["modules_to_save"] or []), None)
    extra = {"num_labels": class_count(adapter, head)} if classes and head else {}
    base = readable(name, lambda: auto.from_pretrained(name, dtype=torch.float32, **extra))
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer("Merging must change nothing but the number of files.", return_tensors="pt")["input_ids"]
    peft_model = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        expected = peft_model(input_ids=ids).logits
    merged = peft_model.merge_and_unload(safe_merge=True).to(torch.bfloat16)
    with written_whole(out) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        with torch.no_grad():
            again = auto.from_pretrained(partial, dtype=torch.float32).eval()(input_ids=ids).logits
        worst = (again - expected).abs().max().item()
        if not worst <= TOLERANCE * expected.abs().max().item():
            raise RankraceError(
                f"the merged model's logits differ by {worst:.3g}",
                why="more than rounding to 16 bits explains: the merged model is not the trained one",
                fix="serve base and adapter unmerged, and please report this",
            )
    return worst


def class_count(adapter: Path, head: str) -> int:
    """Rows of the saved classifier's last weight."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        weights = [k for k in file.keys() if f".{head}." in k and k.endswith("weight")]  # noqa: SIM118
        return file.get_slice(weights[-1]).get_shape()[0]
