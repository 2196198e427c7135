"""Batched greedy generation, whatever is trained on the model.

Shapes: N prompts of a batch, T tokens of a packed row, A tokens of an answer at most.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankrace.data.encoded import NO_LABEL, Encoded
from rankrace.data.pack import pack, validation_batches
from rankrace.evaluate.cache import NAME, Cache, Filling
from rankrace.training import attention
from rankrace.training.model import PackedModel

MOST_PROMPTS = 1024
"""Of a batch: each needs a row of logits."""
MEMORY_SHARE, CPU_BYTES = 0.4, 2**30
"""What keys and values may take: a share of a GPU's free memory; on a CPU so many bytes."""
LOOK_EVERY = {"cuda": 16, "cpu": 1}
"""Steps between looks whether all answers have ended; on a GPU a look waits for it."""


@torch.no_grad()
def generate(
    model: PackedModel[Any],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    micro_tokens: int,
) -> list[str]:
    """The most likely continuation of each prompt, token by token, up to the tokenizer's EOS.

    Args:
        prompts: token ids.
        micro_tokens: of one packed row of prompts.
    """
    answers = [""] * len(prompts)
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    model.bank.refresh()
    with remembering(model.model):
        for chosen in batches([len(p) for p in prompts], max_new_tokens, cells(model.model)):
            out_NA = answer([prompts[i] for i in chosen], model, eos, max_new_tokens, micro_tokens).tolist()
            written = [row[: [*row, eos].index(eos)] for row in out_NA]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    return answers


@contextmanager
def remembering(model: PreTrainedModel) -> Iterator[None]:
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)


def answer(
    prompts: Sequence[np.ndarray], model: PackedModel[Any], eos: int, max_new_tokens: int, micro_tokens: int
) -> Tensor:
    """[N, A] tokens; what follows an EOS means nothing."""
    device, N = model.model.device, len(prompts)
    lengths_N = torch.tensor([len(p) for p in prompts], device=device)
    cache = Cache(prompts=N, cells=int(lengths_N.max()) + max_new_tokens, position_N=lengths_N.clone())
    token_N = first_tokens(prompts, model, cache, micro_tokens)
    out_NA = torch.full((N, max_new_tokens), eos, device=device)
    out_NA[:, 0] = token_N
    written = torch.ones(1, dtype=torch.long, device=device)

    def step() -> None:
        """Each token in hand → the next one. Nothing here depends on what is computed, and no memory is new."""
        inputs: dict[str, Any] = {"input_ids": token_N[None]}
        inputs["position_ids"] = cache.position_N[None] + model.position_offset
        h_1ND = model.trunk(**inputs, use_cache=False, layout=cache).last_hidden_state
        token_N.copy_(model.token_logits(h_1ND[0]).argmax(-1))
        cache.position_N.add_(1)
        out_NA.index_copy_(1, written, token_N[:, None])
        written.add_(1)

    take = step
    for count in range(1, max_new_tokens):
        if count % LOOK_EVERY[device.type] == 0 and bool((out_NA[:, :count] == eos).any(1).all()):
            break
        if device.type == "cuda" and count == 2:  # the first step took all memory that stays
            take = captured(step)
        take()
    return out_NA


def first_tokens(prompts: Sequence[np.ndarray], model: PackedModel[Any], cache: Cache, micro_tokens: int) -> Tensor:
    """[N]: what follows each prompt; the cache then knows the prompts."""
    examples = [
        Encoded(input_ids=p, supervised=np.zeros(len(p), dtype=bool), label=NO_LABEL, group=0, row=n)
        for n, p in enumerate(prompts)
    ]
    token_N = torch.empty(len(prompts), dtype=torch.long, device=model.model.device)
    for indices in validation_batches([len(p) for p in prompts], micro_tokens):
        row = pack(examples, indices, "causal").to(model.model.device)
        of_N = torch.tensor(indices, device=token_N.device)
        length_N = torch.tensor(row.lengths_N, device=token_N.device)
        filling = Filling(
            cache=cache,
            layout=model.layout(row, 1),
            place_T=of_N.repeat_interleave(length_N) * cache.cells + row.position_ids_T,
        )
        h_TD = model.run(row, 1, filling)[0]
        token_N[of_N] = model.token_logits(h_TD[length_N.cumsum(0) - 1]).argmax(-1)
    return token_N


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """As a CUDA graph: a step for a few tokens takes longer to launch than to compute."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def cells(model: PreTrainedModel) -> int:
    """How many tokens' keys and values there is room for."""
    shape = model.config.get_text_config()
    heads = shape.to_dict().get("num_key_value_heads") or shape.num_attention_heads
    width = shape.to_dict().get("head_dim") or shape.hidden_size // shape.num_attention_heads
    size = 2 * shape.num_hidden_layers * heads * width * model.dtype.itemsize
    gpu = model.device.type == "cuda"
    room = MEMORY_SHARE * torch.cuda.mem_get_info(model.device)[0] if gpu else CPU_BYTES
    return int(room / size)


def batches(lengths: Sequence[int], extra: int, cells: int) -> Iterator[list[int]]:
    """Prompts of like lengths, the longest first, within the budget of cells (or one by one)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        size = max(1, min(MOST_PROMPTS, cells // (lengths[order[start]] + extra)))
        yield order[start : start + size]
        start += size
