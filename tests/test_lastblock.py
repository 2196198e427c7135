"""The last block runs behind its attention only where its output is read, and gives what all of it gives."""

import pytest
import torch
from torch import Tensor, nn

from examples import examples
from models import CAUSAL, CLASSIFYING, tiny
from onepass import prepared
from rankrace.bank import Bank
from rankrace.bank.linear import BankLinear
from rankrace.choose import lent
from rankrace.training.lastblock import WAYS, OnlyWhereRead
from rankrace.training.model import PackedModel

CASES = [(range(12), slice(0, 3)), (range(3, 8), slice(1, 3)), (range(4, 5), slice(0, 1)), (range(2, 3), slice(0, 3))]
"""Rows and candidates; one example of a classifier is one place that is read."""


def blocks_of(model: PackedModel) -> nn.ModuleList:
    return next(m for m in model.trunk.modules() if isinstance(m, nn.ModuleList))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
def test_losses_and_gradients(family: str, dropout: float) -> None:
    model, run = prepared(family, dropout)
    known = type(blocks_of(model)[-1]).__name__ in WAYS
    assert model.reads_only == isinstance(blocks_of(model)[-1], OnlyWhereRead) == known
    if dropout:  # masks are of the rows that there are: other ones, and as many for each candidate
        for rows, active in CASES:
            alone = [run(rows, slice(k, k + 1))[0] for k in range(active.start, active.stop)]
            torch.testing.assert_close(torch.cat(alone), run(rows, active)[0], rtol=0, atol=1e-9)
        return
    ours = [run(*case) for case in CASES]
    model.reads_only = False
    for found, case in zip(ours, CASES, strict=True):
        for a, b in zip(found, run(*case), strict=True):
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "bert-classification"])
def test_what_is_not_read_is_not_computed(family: str) -> None:
    model, run = prepared(family)
    rows: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        rows[module] = inputs[0].shape[1]

    for layer in model.bank.layers.values():
        layer.register_forward_hook(count)
    run(range(12))
    packed = model.pack(examples(12, classes=3 if family in CLASSIFYING else 0), range(12))
    T, S = packed.size.tokens, packed.size.targets
    first, last = ({rows[m] for m in block.modules() if isinstance(m, BankLinear)} for block in blocks_of(model))
    assert S < T
    assert (first, last) == ({3 * T}, {3 * T, 3 * S})


def test_a_row_without_targets() -> None:
    model, _ = prepared("llama")
    row = model.pack(examples(12), range(3))
    none = model.pack(examples(12), range(3)).emptied().padded(row.size)
    with torch.no_grad():
        assert model.losses(none).loss_KS.abs().max() == 0
    empty = type(row)(
        **{**vars(row), **{n: getattr(row, n)[:0] for n in ("target_positions_S", "targets_S", "example_S")}}
    )
    with torch.no_grad():
        assert model.losses(empty).loss_KS.shape == (3, 0)


def test_the_model_itself_is_as_it_was() -> None:
    """Its own forward where nothing is packed; and its class, once it is given back."""
    model = tiny("llama")
    model.set_attn_implementation("eager")
    ids = torch.arange(1, 8)[None]
    expected, kind = model(input_ids=ids).logits, type(model.model.layers[-1])
    with lent(model):
        bank = Bank(model)
        PackedModel(model, bank, "causal")
        assert isinstance(model.model.layers[-1], OnlyWhereRead)
        model.set_attn_implementation("eager")
        with bank.off():
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-9)
    assert type(model.model.layers[-1]) is kind
