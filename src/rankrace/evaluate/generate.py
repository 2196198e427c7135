"""Batched greedy generation by Transformers' own `generate`, whatever is trained on the model.

Shapes: N prompts of a batch, L tokens of the longest of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rankrace.train import attention

CELLS = {"cuda": 160_000, "cpu": 8_000}
"""Prompts times tokens (prompt and answer) of a batch."""


@contextmanager
def ordinary_attention(model: PreTrainedModel) -> Iterator[None]:
    """Padded batches with a mask, in place of packed rows."""
    before = model.generation_config
    model.set_attn_implementation("sdpa")
    # Its own settings (temperature, several EOS tokens) would be mixed into ours.
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)
        model.generation_config = before


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
) -> list[str]:
    """The most likely continuation of each prompt, token by token, up to the tokenizer's EOS.

    Args:
        prompts: token ids; batches are padded on the left, so that all answers begin in one column.
    """
    eos = tokenizer.eos_token_id
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    answers = [""] * len(prompts)
    with ordinary_attention(model):
        for chosen in batches([len(p) for p in prompts], max_new_tokens, CELLS[model.device.type]):
            L = max(len(prompts[i]) for i in chosen)
            ids_NL = np.full((len(chosen), L), eos, dtype=np.int64)
            mask_NL = np.zeros((len(chosen), L), dtype=np.int64)
            for n, i in enumerate(chosen):
                ids_NL[n, L - len(prompts[i]) :] = prompts[i]
                mask_NL[n, L - len(prompts[i]) :] = 1
            ids, mask = (torch.from_numpy(x).to(model.device) for x in (ids_NL, mask_NL))
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
            assert isinstance(out, torch.Tensor)
            texts = tokenizer.batch_decode(out[:, L:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    return answers


def batches(lengths: Sequence[int], extra: int, cells: int) -> Iterator[list[int]]:
    """Prompts of like lengths, the longest first, within the budget of cells (or one by one)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        size = max(1, cells // (lengths[order[start]] + extra))
        yield order[start : start + size]
        start += size
