"""Every fast path against the plain one where shapes are odd: one to eight candidates, ranks that are no multiple of
eight, an example of one token, rows without a target. Float64, on a CPU; flash attention and graphs have stand-ins.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

import flash
from examples import examples
from models import tiny
from rankrace.bank import Bank
from rankrace.data.encoded import NO_LABEL, Encoded
from rankrace.data.pack import size_buckets
from rankrace.training import attention
from rankrace.training.compiled import compile_blocks, uncompile
from rankrace.training.model import PackedModel
from rankrace.training.passes import Eager
from rankrace.training.recompute import recomputing

# torch's own, as it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

RANKS = (1, 2, 3, 5, 7, 8, 9, 12)
USUAL = 8


def unsupervised(tokens: int, row: int) -> Encoded:
    ids = np.arange(5, 5 + tokens, dtype=np.int32)
    return Encoded(input_ids=ids, supervised=np.zeros(tokens, dtype=bool), label=NO_LABEL, group=row, row=row)


ROWS = [*examples(USUAL, seed=6), unsupervised(1, USUAL), unsupervised(5, USUAL + 1)]
ONE_TOKEN, NO_TARGET = USUAL, USUAL + 1
CASES: list[tuple[Sequence[int], slice]] = [
    (range(len(ROWS)), slice(0, 8)),
    *((range(K % 5, K % 5 + 4), slice(8 - K, 8)) for K in range(1, 8)),
    ([ONE_TOKEN, 2], slice(0, 3)),
    ([3, NO_TARGET, ONE_TOKEN], slice(1, 2)),
]
WITHOUT_TARGETS: list[tuple[Sequence[int], slice]] = [
    ([ONE_TOKEN], slice(0, 8)), ([NO_TARGET, ONE_TOKEN], slice(2, 5)),
]  # fmt: skip


class Pass:
    """Losses [K] and all gradients of one pass."""

    def __init__(self, family: str) -> None:
        self.bank = Bank(tiny(family))
        self.model = PackedModel(self.bank.model, self.bank, "causal", chunk=5)
        self.bank.start(RANKS, [16.0 / r for r in RANKS])
        torch.manual_seed(1)
        for layer in self.bank.layers.values():
            for k, r in enumerate(RANKS):
                layer.B_KDR.data[k, :, :r].normal_(std=0.1)
        self.padded = False

    def __call__(self, indices: Sequence[int], active: slice) -> list[Tensor]:
        gradients = self.bank.loaded.gradients.all_KP.zero_()
        row = self.model.pack(ROWS, indices)
        if self.padded:  # as a graph has it
            row = row.padded(size_buckets([row.size], 1)[0])
        share = torch.tensor(0.1, dtype=torch.float64)
        return [Eager(self.model).run(row, active, share).clone(), gradients.clone()]


@contextmanager
def compiled(run: Pass) -> Iterator[None]:
    torch._dynamo.reset()
    compile_blocks(run.bank, "eager")
    yield
    uncompile(run.bank)


@contextmanager
def compiled_with_flash(run: Pass) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", flash.varlen_attn)
        patch.setattr(attention, "has_flash", lambda device, dtype: True)
        torch._dynamo.reset()
        compile_blocks(run.bank, "aot_eager")
        yield
        uncompile(run.bank)


@contextmanager
def padded(run: Pass) -> Iterator[None]:
    run.padded = True
    yield


FAST = {
    "last-block": lambda run: nullcontext(),  # the plain path below does without
    "compiled": compiled,
    "compiled-flash": compiled_with_flash,
    "recomputed": lambda run: recomputing(run.bank),
    "padded": padded,
}


@pytest.mark.parametrize("path", FAST)
def test_against_the_plain_path(path: str) -> None:
    run = Pass("llama")
    assert run.model.reads_only
    run.model.reads_only = False
    expected = [run(*case) for case in CASES]
    run.model.reads_only = True
    with FAST[path](run):
        found, nothing = [run(*case) for case in CASES], [run(*case) for case in WITHOUT_TARGETS]
    for ours, plain, (_, active) in zip(found, expected, CASES, strict=True):
        for a, b in zip(ours, plain, strict=True):
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        idle = [k for k in range(len(RANKS)) if not active.start <= k < active.stop]
        assert not ours[1][idle].any(), "a candidate that did not run has a gradient"
    for losses, gradients in nothing:
        assert not losses.any()
        assert not gradients.any()
