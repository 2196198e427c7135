"""The last block, only where its output is read: what follows its attention sees one token at a time.

A causal model is read at the tokens before its targets, a classifier at one token an example. There alone runs the
MLP of the last block, and in models such as BERT the layer behind its attention.

Shapes: M = K·T tokens of a packed row of all candidates, R of them read, D model width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rankrace.training.attention import Layout


def like_llama(block: Any, x_1MD: Tensor, read_R: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    attended_1MD, _ = block.self_attn(*args, hidden_states=block.input_layernorm(x_1MD), **kwargs)
    h_1RD = x_1MD.index_select(1, read_R) + attended_1MD.index_select(1, read_R)
    return h_1RD + block.mlp(block.post_attention_layernorm(h_1RD))


def like_bert(block: Any, x_1MD: Tensor, read_R: Tensor, mask: None = None, *args: Any, **kwargs: Any) -> Tensor:
    attention = block.attention
    attended_1MD, _ = attention.self(x_1MD, attention_mask=mask, **kwargs)
    h_1RD = attention.output(attended_1MD.index_select(1, read_R), x_1MD.index_select(1, read_R))
    return block.feed_forward_chunk(h_1RD)


WAYS: dict[str, Callable[..., Tensor]] = {
    "LlamaDecoderLayer": like_llama,
    "MistralDecoderLayer": like_llama,
    "Qwen2DecoderLayer": like_llama,
    "Qwen3DecoderLayer": like_llama,
    "GemmaDecoderLayer": like_llama,
    "BertLayer": like_bert,
    "RobertaLayer": like_bert,
}
"""By the class of a block. `PackedModel.verify` compares each model with its own forward."""


class OnlyWhereRead(nn.Module):
    """What the last block becomes, beside what it is."""


def read_only(trunk: nn.Module) -> bool:
    """Makes the last block ready for it, by another class: compiling and recomputing exchange its forward as usual.

    Returns:
        Whether it is; False: a block of a kind that is not known here.
    """
    lists = [m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m)]
    last = lists[0][-1] if lists else trunk
    kind = type(last)
    if issubclass(kind, OnlyWhereRead):
        return True
    if kind.__name__ not in WAYS:
        return False
    way = WAYS[kind.__name__]

    def forward(self: nn.Module, x_1MD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layout = kwargs.get("layout")
        if not isinstance(layout, Layout) or layout.read_R is None:  # generation, or not our pass
            return kind.forward(self, x_1MD, *args, **kwargs)
        return way(self, x_1MD, layout.read_R, *args, **kwargs)

    last.__class__ = type(kind.__name__, (OnlyWhereRead, kind), {"forward": forward})
    return True
