"""An adapter merged into its base model, for serving without PEFT."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from rankrace.adapter import load_adapted
from rankrace.errors import RankraceError
from rankrace.training.checkpoint import written_whole
from rankrace.training.model import load_tokenizer

TOLERANCE = 0.05
"""Largest difference of a logit, as a share of the largest logit, that rounding to 16 bits explains."""


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
    if os.path.exists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise RankraceError(
            f"{out} is not an empty folder",
            why="what is there would be overwritten",
            fix="choose another --out",
        )
    adapted = load_adapted(adapter, model, torch.float32)
    tokenizer = load_tokenizer(str(adapter))
    ids = tokenizer("Merging must change nothing but the number of files.", return_tensors="pt")["input_ids"]
    peft_model = adapted.model.eval()
    with torch.no_grad():
        expected = peft_model(input_ids=ids).logits
    merged = peft_model.merge_and_unload(safe_merge=True).to(torch.bfloat16)
    with written_whole(out) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        with torch.no_grad():
            again = adapted.loader.from_pretrained(partial, dtype=torch.float32).eval()(input_ids=ids).logits
        worst, largest = (again - expected).abs().max().item(), expected.abs().max().item()
        if not worst <= TOLERANCE * largest:
            raise RankraceError(
                f"the merged model's logits differ by {worst:.3g}, where the largest is {largest:.3g}",
                why="more than rounding to 16 bits explains: the merged model is not the trained one",
                fix="serve base and adapter unmerged, and please report this",
            )
    return Merged(worst=worst, largest=largest, loader=adapted.loader.__name__)
