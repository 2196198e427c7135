"""Which layers of a model are adapted: by name, under PEFT's rule."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankrace.bank.linear import linear_shape
from rankrace.errors import RankraceError

HEAD_NAMES = ("score", "classifier")
"""The attributes under which Transformers keeps a classifier; PEFT saves the same ones."""


def find_targets(model: PreTrainedModel, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The layers to adapt, by name, in the model's order. "all-linear" leaves out the output head."""
    head = model.get_output_embeddings()
    linear: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.partition(".")[0] not in HEAD_NAMES
    }
    if target_modules == "all-linear":
        chosen = linear
    else:
        endings = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        missing = [e for e in endings if not any(matches(name, e) for name in linear)]
        if missing:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise RankraceError(
                f"{type(model).__name__} has no linear layer named {', '.join(missing)}",
                why="an adapter needs layers to sit on",
                fix=f"choose among {', '.join(known) or 'none'}, or target_modules=all-linear",
            )
        chosen = {name: module for name, module in linear.items() if any(matches(name, e) for e in endings)}
    if not chosen:
        raise RankraceError(
            f"{type(model).__name__} has no linear layers to adapt",
            why="LoRA sits on nn.Linear or Conv1D layers",
            fix="use a model with such layers",
        )
    assert all(linear_shape(module) for module in chosen.values())
    return chosen


def matches(name: str, ending: str) -> bool:
    """PEFT's rule: the whole name, or its end after a dot."""
    return name == ending or name.endswith("." + ending)
