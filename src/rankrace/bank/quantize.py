"""A frozen base in fewer bits: NF4 for memory, FP8 for time (`rankrace.bank.base`)."""

import torch
from torch import nn
from transformers import PreTrainedModel

from rankrace.bank.base import fp8, nf4
from rankrace.bank.targets import find_targets
from rankrace.config import Quantize
from rankrace.errors import RankraceError

KINDS = {"nf4": nf4, "fp8": fp8}


def check_quantize(kind: Quantize, device: torch.device, dtype: torch.dtype) -> None:
    """Before anything is loaded.

    Raises:
        RankraceError: this device, type or installation cannot have such a base.
    """
    if kind != "none":
        KINDS[kind].check(device, dtype)


def quantize(model: PreTrainedModel, kind: Quantize, device: torch.device) -> None:
    """Puts the model's linear layers, all but its head, onto the device in fewer bits; the rest stays where it is.

    One after another: at no time are there two models.

    Raises:
        RankraceError: the model has a layer that cannot be kept so.
    """
    if kind == "none":
        return
    for name in list(find_targets(model, "all-linear")):
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear:
            raise RankraceError(
                f"{name} is a {type(layer).__name__}, which --quantize {kind} does not know",
                why="only plain nn.Linear layers in 16 or 32 bits are packed",
                fix="leave out --quantize for this model",
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, KINDS[kind].quantized(layer, device))
