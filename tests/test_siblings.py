"""Layers that share an input, computed together, against one layer at a time and against plain autograd.

Shapes: K candidates, T tokens, R rank, D widths.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from examples import examples
from models import CAUSAL, CLASSIFYING, tiny
from rankrace.bank import Bank, Candidates
from rankrace.bank.dropout import DropoutKeys, dropped
from rankrace.bank.linear import BankLinear, BankSwitch, Siblings
from rankrace.bank.loaded import Loaded
from rankrace.bank.opaque import Opaque, can_be_opaque
from rankrace.data.encoded import Encoded
from rankrace.training.model import PackedModel
from rankrace.training.passes import Eager

D_IN, D_OUTS = 12, (10, 6, 9)


def group(K: int, R: int, bases: Sequence[nn.Module] | None = None, together: bool = True) -> list[BankLinear]:
    """Three layers with random candidates of that rank, ready to run."""
    torch.manual_seed(5)
    switch = BankSwitch(keys=DropoutKeys(0, 3, torch.device("cpu")))
    switch.active = slice(0, K)
    bases = bases or [nn.Linear(D_IN, d) for d in D_OUTS]
    layers = [BankLinear(base.double().requires_grad_(False), i, switch) for i, base in enumerate(bases)]
    loaded = Loaded(
        Candidates(
            ranks=(R,) * K,
            multipliers=tuple(1.0 + k for k in range(K)),
            factors={
                str(i): (torch.randn(K, R, D_IN).double(), torch.randn(K, layer.d_out, R).double())
                for i, layer in enumerate(layers)
            },
            heads={},
        ),
        torch.float64,
    )
    loaded.refresh()
    for members in [layers] if together else [[layer] for layer in layers]:
        siblings = Siblings(members, switch)
        names = [f"{layer.index}.A" for layer in members]
        siblings.multiplier_K = loaded.multiplier_K
        siblings.compute_A_KRD, siblings.A_grad_KRD = loaded.compute.joined(names), loaded.gradients.joined(names)
        for layer in members:
            layer.siblings = siblings
            layer.A_KRD, layer.B_KDR = (loaded.parameter(f"{layer.index}.{ab}") for ab in "AB")
            layer.compute_sB_KDR = loaded.compute.views[f"{layer.index}.B"]
    return layers


def plain(layer: BankLinear, x_KTD: Tensor, A_KRD: Tensor, B_KDR: Tensor, p: float) -> Tensor:
    """The equation in the docstring of BankLinear, one candidate at a time."""
    switch = layer.switch
    read_KTD = dropped(x_KTD, switch.keys.of(0), p) if p else x_KTD
    return torch.stack(
        [
            layer.base(x_KTD[k]) + (1.0 + k) * (read_KTD[k] @ A_KRD[k].T) @ B_KDR[k].T
            for k in range(*switch.active.indices(len(A_KRD)))
        ]
    )


@pytest.mark.parametrize("K", [1, 2, 3, 8])
@pytest.mark.parametrize(("R", "T"), [(8, 7), (5, 1), (1, 3), (16, 2)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_group_is_its_layers_in_plain_autograd(K: int, R: int, T: int, p: float) -> None:
    layers = group(K, R)
    layers[0].switch.dropout = p
    x = torch.randn(1, K * T, D_IN).double().requires_grad_()  # as one row, candidates end to end
    weights = [torch.randn(K, T, d).double() for d in D_OUTS]
    ours = [layer(x) for layer in layers]
    assert ours[0].shape == (1, K * T, D_OUTS[0])
    sum((y.view(K, T, -1) * w).sum() for y, w in zip(ours, weights, strict=True)).backward()

    again = x.detach().clone().requires_grad_()
    factors = [[t.detach().clone().requires_grad_() for t in (layer.A_KRD, layer.B_KDR)] for layer in layers]
    expected = [plain(layer, again.view(K, T, -1), *f, p) for layer, f in zip(layers, factors, strict=True)]
    sum((y * w).sum() for y, w in zip(expected, weights, strict=True)).backward()

    def same(a: Tensor | None, b: Tensor | None) -> None:
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b.view_as(a), rtol=0, atol=1e-9)

    same(x.grad, again.grad)
    for layer, y, z, (A, B) in zip(layers, ours, expected, factors, strict=True):
        same(y, z)
        same(layer.A_KRD.grad, A.grad)
        same(layer.B_KDR.grad, B.grad)


def test_only_the_active_candidates_get_gradients() -> None:
    layers = group(3, 4)
    layers[0].switch.active = slice(1, 2)
    x = torch.randn(1, 5, D_IN).double()
    sum(layer(x).sum() for layer in layers).backward()
    for layer in layers:
        for gradient in (layer.A_KRD.grad, layer.B_KDR.grad):
            assert gradient is not None
            assert gradient[1].any()
            assert not gradient[[0, 2]].any()


class Odd(nn.Linear):
    """Not a plain layer: it brings its own autograd, as a quantised one does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sin()


@pytest.mark.parametrize("make", [Conv1D, lambda out, into: Odd(into, out)])
def test_other_bases(make: type) -> None:
    layers = group(2, 3, [make(d, D_IN) for d in D_OUTS])
    x = torch.randn(2, 4, D_IN).double().requires_grad_()
    sum((layer(x) ** 2).sum() for layer in layers).backward()
    again = x.detach().clone().requires_grad_()
    sum(
        (plain(layer, again, layer.A_KRD.detach(), layer.B_KDR.detach(), 0.0) ** 2).sum() for layer in layers
    ).backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=0, atol=1e-9)


def test_siblings_called_with_other_tensors_or_not_at_all() -> None:
    """In any order, each with what it was called with; what nobody asked for has no gradient."""
    first, second, third = group(2, 4)
    alone = group(2, 4, together=False)
    xs = [torch.randn(2, 3, D_IN).double() for _ in range(3)]
    calls = [(second, 0), (first, 1), (second, 1), (second, 1), (first, 2), (second, 0)]
    for layer, i in calls:
        torch.testing.assert_close(layer(xs[i]), alone[layer.index](xs[i]), rtol=0, atol=1e-12)
    kept = first(xs[0])
    xs[0].mul_(2)  # the very same tensor, with other values
    torch.testing.assert_close(second(xs[0]), alone[1](xs[0]), rtol=0, atol=1e-12)
    third_gradient = third.B_KDR.grad
    assert third_gradient is not None
    third_gradient.zero_()
    first(xs[1]).sum().backward()
    assert not third_gradient.any()
    assert kept.shape == (2, 3, D_OUTS[0])


def test_a_group_as_one_operation() -> None:
    """As compiled code calls it: the first computes for all, and the gradients are those of the eager way."""

    def run(compiled: bool) -> list[Tensor]:
        layers = group(2, 4)
        x = torch.linspace(-1, 1, 6 * D_IN).double().view(1, 6, D_IN).requires_grad_()
        opaque = Opaque(layers[0].siblings)
        calls = (opaque.lead, opaque.follow, opaque.follow) if compiled else layers
        ys = [call(x) for call in calls]
        assert len(layers[0].siblings.kept) == int(compiled), "until the backward"
        sum((y.sin()).sum() for y in ys).backward()
        assert not layers[0].siblings.kept
        with torch.no_grad():
            opaque.lead(x)
        assert not layers[0].siblings.kept, "no backward will come"
        return [
            *ys,
            *(grad for p in (x, *(f for m in layers for f in (m.A_KRD, m.B_KDR))) if (grad := p.grad) is not None),
        ]

    ours, expected = run(True), run(False)
    assert len(ours) == 3 + 1 + 6
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_what_no_backward_came_for_is_let_go() -> None:
    siblings = group(2, 4)[0].siblings
    Opaque(siblings).lead(torch.randn(1, 6, D_IN).double())
    assert siblings.kept
    siblings.forget()
    assert not siblings.kept


def test_a_layer_with_an_autograd_of_its_own_is_no_operation() -> None:
    assert can_be_opaque(group(2, 3)[0].siblings)
    assert not can_be_opaque(group(2, 3, [Odd(D_IN, d) for d in D_OUTS])[0].siblings)


FOUND = {
    "llama": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "qwen3": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "gemma3": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "gpt2": set(),
    "llama-classification": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "bert-classification": {"query key value"},
    "roberta-classification": {"query key value"},
}


def prepared(family: str, ranks: tuple[int, ...], dropout: float = 0.0) -> tuple[PackedModel, list[Encoded]]:
    classes = 3 if family in CLASSIFYING else 0
    model = tiny(family)
    bank = Bank(model, dropout=dropout)
    packed = PackedModel(model, bank, "classification" if classes else "causal", chunk=5)
    bank.start(ranks, [16.0 / r for r in ranks])
    torch.manual_seed(1)
    for layer in bank.layers.values():
        for k, r in enumerate(ranks):
            layer.B_KDR.data[k, :, :r].normal_(std=0.1)
    return packed, examples(8, seed=2, classes=classes)


def run(model: PackedModel, rows: list[Encoded], indices: Sequence[int]) -> list[Tensor]:
    """Losses [K] and all gradients of a training pass."""
    bank = model.bank
    bank.loaded.gradients.all_KP.zero_()
    K = len(bank.candidates.ranks)
    with bank.training(2, 1):
        loss_K = Eager(model).run(model.pack(rows, indices), slice(0, K), torch.tensor(0.1, dtype=torch.float64))
    return [loss_K, bank.loaded.gradients.all_KP.clone()]


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFYING])
def test_models_with_and_without_groups(family: str) -> None:
    model, rows = prepared(family, (4, 2))
    groups = {" ".join(n.rpartition(".")[2] for n in names) for names in model.bank.siblings if len(names) > 1}
    assert groups == FOUND[family]
    together = run(model, rows, range(8))
    model.bank.find_siblings(lambda: None)
    assert all(len(names) == 1 for names in model.bank.siblings)
    for a, b in zip(together, run(model, rows, range(8)), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("K", range(1, 9))
def test_each_of_k_candidates_is_as_if_alone(K: int) -> None:
    ranks = tuple(1 + 2 * k for k in range(K))
    model, rows = prepared("llama", ranks, dropout=0.2)
    losses_K, _ = run(model, rows, range(3))
    everything, together = model.bank.candidates, model.bank.loaded.gradients.views
    for k in range(K):
        model.bank.load(everything.keep([k]))
        loss_1, _ = run(model, rows, range(3))
        torch.testing.assert_close(loss_1[0], losses_K[k], rtol=0, atol=1e-9)
        for name, alone in model.bank.loaded.gradients.views.items():
            cut = tuple(slice(0, n) for n in alone.shape[1:])
            torch.testing.assert_close(alone[0], together[name][k][cut], rtol=0, atol=1e-9)
            assert alone.any()


def test_a_row_without_targets_has_no_gradient() -> None:
    model, rows = prepared("llama", (4, 2))
    silent = [
        Encoded(input_ids=e.input_ids, supervised=e.supervised & False, label=-1, group=0, row=e.row) for e in rows
    ]
    loss_K, gradients = run(model, silent, range(4))
    assert loss_K.tolist() == [0.0, 0.0]
    assert not gradients.any()


def test_a_row_of_one_token() -> None:
    model, rows = prepared("llama-classification", (4, 2))
    one = Encoded(input_ids=rows[0].input_ids[:1], supervised=rows[0].supervised[:1], label=1, group=0, row=0)
    alone = run(model, [one], [0])
    beside = run(model, [one, rows[1]], [0, 1])
    other = run(model, [one, rows[1]], [1])
    for a, b, c in zip(alone, other, beside, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a + b, c, rtol=0, atol=1e-9)
