"""One pass over some rows by some candidates, to be compared with the same pass run in another way."""

from collections.abc import Callable

import torch
from torch import Tensor

from examples import examples
from models import CLASSIFYING, tiny
from rankrace.bank import Bank
from rankrace.training.model import PackedModel
from rankrace.training.passes import Eager

RANKS = (4, 2, 7)


def prepared(family: str, dropout: float = 0.0) -> tuple[PackedModel, Callable[..., list[Tensor]]]:
    """A model, and a pass over some of its rows by some of its candidates: losses [K] and all gradients."""
    classes = 3 if family in CLASSIFYING else 0
    bank = Bank(tiny(family), dropout=dropout)
    model = PackedModel(bank.model, bank, "classification" if classes else "causal", chunk=5)
    bank.start(RANKS, [16.0 / r for r in RANKS])
    torch.manual_seed(1)
    for layer in bank.layers.values():
        layer.B_KDR.data.normal_(std=0.1)
    rows = examples(12, classes=classes)

    def run(indices: range, active: slice = slice(0, 3)) -> list[Tensor]:
        gradients = bank.loaded.gradients.all_KP.zero_()
        with bank.training(indices.start, 0):
            loss_K = Eager(model).run(model.pack(rows, indices), active, torch.tensor(0.1, dtype=torch.float64))
        return [loss_K, gradients.clone()]

    return model, run
