"""Batched greedy generation, whatever is trained on the model.

Shapes: N prompts of a batch, T tokens of a packed row, A tokens of an answer at most.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankrace.data.encoded import NO_LABEL, Encoded
from rankrace.data.pack import pack, validation_batches
from rankrace.errors import RankraceError
from rankrace.evaluate.cache import NAME, Cache, Filling
from rankrace.training import attention
from rankrace.training.model import PackedModel
from rankrace.training.passes import captured

MOST_PROMPTS = 1024
"""Of a batch: each needs a row of logits."""
MEMORY_SHARE, CPU_BYTES = 0.4, 2**30
"""What keys and values may take: a share of a GPU's free memory; on a CPU so many bytes."""
LOOK_EVERY = {"cuda": 16, "cpu": 1}
"""Steps between looks at which answers have ended; on a GPU a look waits for it."""
LEAST_REACH = 64
"""Cells beyond the longest prompt that the first steps attend to."""


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
        prompts: token ids. What has no room before the answer is cut as in training: from the start, BOS stays.
        micro_tokens: of one packed row of prompts.

    Raises:
        RankraceError: the model has no positions beside those of the answers.
    """
    answers = [""] * len(prompts)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert isinstance(eos, int)
    assert isinstance(bos, int | None)
    room = room_for_prompts(model.model, max_new_tokens)
    prompts = [fitting(prompt, room, bos) for prompt in prompts]
    model.bank.refresh()
    with remembering(model.model):
        for chosen in batches([len(p) for p in prompts], max_new_tokens, cells(model.model)):
            out_NA = answer([prompts[i] for i in chosen], model, eos, max_new_tokens, micro_tokens).tolist()
            written = [row[: [*row, eos].index(eos)] for row in out_NA]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    return answers


def room_for_prompts(model: PreTrainedModel, max_new_tokens: int) -> int:
    """Tokens. Learnt positions end, and turned ones were never trained beyond.

    Raises:
        RankraceError: there is none.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return sys.maxsize
    if positions - max_new_tokens < 2:
        raise RankraceError(
            f"an answer of up to {max_new_tokens} tokens leaves no room for a prompt",
            why=f"the model has {positions} positions for both",
            fix="use a model with a longer context, or another task",
        )
    return positions - max_new_tokens


def fitting(prompt: np.ndarray, room: int, bos: int | None) -> np.ndarray:
    """The end of a prompt that is too long, behind its BOS if it has one."""
    if len(prompt) <= room:
        return prompt
    lead = int(prompt[0] == bos)
    return np.concatenate([prompt[:lead], prompt[len(prompt) - room + lead :]])


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
    longest = int(lengths_N.max())
    cache = Cache(prompts=N, cells=longest + max_new_tokens, reach=longest, position_N=lengths_N)
    token_N = first_tokens(prompts, model, cache, micro_tokens)
    out_NA = torch.full((N, max_new_tokens), eos, device=device)
    out_NA[:, 0] = token_N
    writing = Writing(
        model=model, cache=cache, token_N=token_N, out_NA=out_NA, place_N=torch.arange(N, device=device)
    )
    all_NA, look_every = out_NA.clone(), LOOK_EVERY[device.type]
    for count in range(1, max_new_tokens):
        if count % look_every == 0:
            ended_N = (writing.out_NA[:, :count] == eos).any(1)
            if bool(ended_N.all()):
                break
            if 2 * int(ended_N.sum()) >= len(ended_N):
                all_NA[writing.place_N] = writing.out_NA
                writing.keep((~ended_N).nonzero()[:, 0])
        # Room for all steps until the next look, and twice as much each time: the memory of a step is fixed.
        if min(longest + count + look_every, cache.cells) > cache.reach:
            writing.see(longest + max(LEAST_REACH, 2 * (cache.reach - longest)))
        writing.take()
    all_NA[writing.place_N] = writing.out_NA
    return all_NA


@dataclass(kw_only=True)
class Writing:
    """Answers in the making: those of the batch that have not ended, or had not when it was last looked."""

    model: PackedModel[Any]
    cache: Cache
    token_N: Tensor
    """In hand: written, but not yet read by the model."""
    out_NA: Tensor
    place_N: Tensor
    """Which answers of the batch they are."""
    steps: int = 0
    """Since anything changed its size."""
    replay: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.written = torch.ones(1, dtype=torch.long, device=self.token_N.device)

    def take(self) -> None:
        """A step; from the second of a size on as a CUDA graph, where there are such: the first has taken all memory
        that stays."""
        if self.steps == 1 and self.token_N.is_cuda:
            self.replay = as_graph(self.step)
        (self.replay or self.step)()
        self.steps += 1

    def step(self) -> None:
        """Each token in hand → the next one. Nothing here depends on what is computed, and no memory is new."""
        model, cache = self.model, self.cache
        inputs: dict[str, Any] = {"input_ids": self.token_N[None]}
        inputs["position_ids"] = cache.position_N[None] + model.position_offset
        h_1ND = model.trunk(**inputs, use_cache=False, layout=cache).last_hidden_state
        self.token_N.copy_(model.token_logits(h_1ND[0]).argmax(-1))
        cache.position_N.add_(1)
        self.out_NA.index_copy_(1, self.written, self.token_N[:, None])
        self.written.add_(1)

    def keep(self, indices: Tensor) -> None:
        """Goes on with these answers alone: every step costs what it costs for all that are there."""
        self.replay, self.steps = None, 0
        self.cache.keep(indices)
        self.token_N, self.out_NA, self.place_N = (x[indices] for x in (self.token_N, self.out_NA, self.place_N))

    def see(self, reach: int) -> None:
        """From now on attends to the first `reach` cells of each."""
        self.replay, self.steps = None, 0
        self.cache.reach = min(-(-reach // 16) * 16, self.cache.cells)  # attention kernels like even masks


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


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    """As a CUDA graph: a step for a few tokens takes longer to launch than to compute."""
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
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
