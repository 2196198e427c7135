"""The chunked cross-entropy and its own gradient, against torch's and autograd.

Shapes: M rows, D model width, V vocabulary.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rankrace.data.pack import IGNORED
from rankrace.training.loss import chunked_cross_entropy

M, D, V = 11, 6, 17


def capped(logits_MV: Tensor) -> Tensor:
    """As Gemma caps them."""
    return torch.tanh(logits_MV / 3) * 3


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    h_MD, W_VD = torch.randn(M, D, dtype=dtype) * 2, torch.randn(V, D, dtype=dtype)
    targets_M = torch.randint(V, (M,))
    targets_M[[2, 7, 10]] = IGNORED
    return h_MD.requires_grad_(), W_VD.requires_grad_(), targets_M


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("shape", [lambda x: x, capped], ids=["plain", "capped"])
@pytest.mark.parametrize("trained", [False, True])
def test_it_is_cross_entropy_and_its_gradient(chunk: int, shape: Callable[[Tensor], Tensor], trained: bool) -> None:
    h_MD, W_VD, targets_M = inputs()
    weights = (W_VD,) if trained else ()
    loss_M, correct_M = chunked_cross_entropy(h_MD, targets_M, lambda h: shape(h @ W_VD.T), chunk, weights)
    share_M = torch.full((M,), 0.3).double() if trained else torch.rand(M).double()
    ours = torch.autograd.grad((loss_M * share_M).sum(), (h_MD, *weights))

    logits_MV = shape(h_MD @ W_VD.T)
    plain_M = cross_entropy(logits_MV, targets_M, reduction="none")
    plain = torch.autograd.grad((plain_M * share_M).sum(), (h_MD, *weights))
    torch.testing.assert_close(loss_M, plain_M, rtol=1e-12, atol=1e-12)
    assert torch.equal(correct_M, logits_MV.argmax(-1) == targets_M)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_the_softmax_is_that_of_float32() -> None:
    h_MD, W_VD, targets_M = inputs(torch.bfloat16)
    loss_M, _ = chunked_cross_entropy(h_MD, targets_M, lambda h: h @ W_VD.T, 4)
    (ours,) = torch.autograd.grad(loss_M.sum(), h_MD)
    plain_M = cross_entropy((h_MD @ W_VD.T).float(), targets_M, reduction="none")
    (plain,) = torch.autograd.grad(plain_M.sum(), h_MD)
    torch.testing.assert_close(loss_M, plain_M)
    assert loss_M.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=2**-7, atol=2**-7)


def test_a_diverged_row_is_its_own_affair() -> None:
    h_MD, W_VD, targets_M = inputs()
    bad_MD = h_MD.detach().clone().index_fill_(0, torch.tensor([4]), float("nan")).requires_grad_()
    others = [i for i in range(M) if i != 4]
    found = []
    for rows_MD in (h_MD, bad_MD):
        loss_M, _ = chunked_cross_entropy(rows_MD, targets_M, lambda h: h @ W_VD.T, 4)
        (grad_MD,) = torch.autograd.grad(loss_M.sum(), rows_MD)
        found.append((loss_M[others], grad_MD[others]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_head_whose_result_autograd_keeps_is_an_error_and_no_wrong_gradient() -> None:
    h_MD, W_VD, targets_M = inputs()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chunked_cross_entropy(h_MD, targets_M, lambda h: torch.tanh(h @ W_VD.T), 4)
