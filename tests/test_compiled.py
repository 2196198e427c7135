"""Compiled blocks give the numbers of the eager path, are compiled once, and can be taken off again.

Traced as always but run by a backend without code generation; that of GPUs is tested in test_gpu.py.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import flash
from examples import examples
from models import tiny
from onepass import prepared
from rankrace.bank import Bank
from rankrace.choose import lent
from rankrace.training import attention
from rankrace.training.compiled import blocks, compile_blocks, uncompile
from rankrace.training.model import PackedModel
from rankrace.training.passes import Eager

# torch's own, as it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

CASES = [
    (range(3), slice(0, 3)), (range(3, 8), slice(0, 3)), (range(8, 12), slice(0, 2)), (range(5, 7), slice(1, 3)),
    (range(12), slice(0, 3)), (range(4), slice(2, 3)), (range(7, 12), slice(0, 1)),
]  # fmt: skip
"""Token counts, layouts and numbers of candidates; the first one warms up."""


def same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def compiled_is_eager(family: str, backend: str, pieces: int) -> None:
    model, run = prepared(family)
    expected = [run(*case) for case in CASES]
    compile_blocks(model.bank, backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    same(run(*CASES[0]), expected[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == pieces
    with torch._dynamo.config.patch(error_on_recompile=True):
        for case, wanted in zip(CASES, expected, strict=True):
            same(run(*case), wanted)
    uncompile(model.bank)
    torch._dynamo.utils.counters.clear()
    same(run(*CASES[0]), expected[0])
    assert not torch._dynamo.utils.counters["stats"], "the eager path again"


def test_llama() -> None:
    """All before the padded attention, and what follows it in each of the functions around. Blocks share them but for
    the last one's own function, which goes on only where its output is read."""
    compiled_is_eager("llama", "eager", pieces=6)


def test_bert() -> None:
    compiled_is_eager("bert-classification", "eager", pieces=6)


class SwappedAttention(LlamaAttention):
    """Calls v before k, though it has k before v; as OPT calls q first and has it last."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, *_: Any, **options: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        v, q, k = (
            layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.v_proj, self.q_proj, self.k_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        x, weights = attend(self, q, k, v, options.pop("attention_mask"), scaling=self.scaling, **options)
        return self.o_proj(x.reshape(*shape[:-2], -1)), weights


def test_layers_called_in_another_order_than_they_are_defined_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its own output, not that of the one in its place."""
    expected = prepared("llama")[1](*CASES[0])
    monkeypatch.setattr(modeling_llama, "LlamaAttention", SwappedAttention)
    model, run = prepared("llama")
    same(run(*CASES[0]), expected)
    compile_blocks(model.bank, "eager")
    torch._dynamo.reset()
    same(run(*CASES[0]), expected)
    uncompile(model.bank)


def test_opt() -> None:
    """Defines k, v, q and calls q first."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                       max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0)  # fmt: skip
    bank = Bank(OPTForCausalLM(config).double().eval())
    model, rows = PackedModel(bank.model, bank, "causal", chunk=5), examples(8)
    model.verify_on(rows)
    bank.start((4, 2), (1.0, 1.0))
    for layer in bank.layers.values():
        layer.B_KDR.data.normal_(std=0.1)

    def run() -> list[Tensor]:
        bank.gradients.all_KP.zero_()
        loss = Eager(model).run(model.pack(rows, range(4)), slice(0, 2), torch.tensor(0.1, dtype=torch.float64))
        return [loss.clone(), bank.gradients.all_KP.clone()]

    expected = run()
    compile_blocks(bank, "eager")
    torch._dynamo.reset()
    same(run(), expected)
    uncompile(bank)


def test_flash_attention_is_compiled_with_what_surrounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a block is one graph, the last one another, and tokens are outermost all the way (the stand-in
    asserts it)."""
    monkeypatch.setattr(attention, "varlen_attn", flash.varlen_attn)
    monkeypatch.setattr(attention, "has_flash", lambda device, dtype: True)
    compiled_is_eager("llama", "aot_eager", pieces=2)


def test_little_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block gate and up, not what down reads; x, the attention's output and the sum of both, not their norms."""
    monkeypatch.setattr(attention, "varlen_attn", flash.varlen_attn)
    monkeypatch.setattr(attention, "has_flash", lambda device, dtype: True)
    model, run = prepared("llama")
    expected = run(*CASES[0])
    compile_blocks(model.bank, "aot_eager_decomp_partition")
    same(run(*CASES[0]), expected)
    kept: dict[int, torch.Size] = {}
    tokens = model.pack(examples(12), CASES[0][0]).size.tokens

    def keep(x: Tensor) -> Tensor:
        if x.dim() == 3 and x.shape[:2] == (1, 3 * tokens):
            kept[x.untyped_storage().data_ptr()] = x.shape
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run(*CASES[0])
    counts = Counter(shape[2] for shape in kept.values())
    assert (counts[48], counts[32]) == (2, 3 + 2), "one block, and of the last one what comes before its MLP"


def test_the_stand_in_for_flash_attention_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = prepared("llama")
    expected = run(range(8))
    monkeypatch.setattr(attention, "varlen_attn", flash.varlen_attn)
    monkeypatch.setattr(attention, "has_flash", lambda device, dtype: True)
    same(run(range(8)), expected)


def test_dropout_and_the_plain_base() -> None:
    model, run = prepared("llama", dropout=0.3)
    row = model.pack(examples(12), range(5))
    expected = [run(range(4)), run(range(4, 9))]
    with model.bank.off(), torch.no_grad():
        base = model.losses(row).loss_KS
    compile_blocks(model.bank, "eager")
    same(run(range(4)), expected[0])
    same(run(range(4, 9)), expected[1])
    with model.bank.off(), torch.no_grad():
        torch.testing.assert_close(model.losses(row).loss_KS, base, rtol=0, atol=1e-9)


def test_a_lent_model_comes_back_uncompiled() -> None:
    model = tiny("llama")

    def own(*args: object, **kwargs: object) -> object:
        return type(model.model.norm).forward(model.model.norm, *args, **kwargs)

    model.model.norm.forward = own
    with lent(model):
        bank = Bank(model)
        PackedModel(model, bank, "causal")
        compile_blocks(bank, "eager")
        assert all("forward" in vars(block) for block in blocks(bank))
    changed = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert changed == {"model.norm"}
    assert model.model.norm.forward is own
