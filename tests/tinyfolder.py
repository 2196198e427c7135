"""Tiny models with random weights and a real tokenizer, as folders that the command line can be pointed at."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SMALLEST_LAYER = 16
"""Outputs of the keys' and values' projections of `tiny_llama`: two heads of 8."""
SUMS = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}"} for a in range(6) for b in range(6)]
"""Rows for `tiny_llama`."""
PARITIES = [{"text": f"{a} and {b}", "label": "odd" if (a + b) % 2 else "even"} for a in range(6) for b in range(6)]
"""Rows for `tiny_bert`."""
SHORT = ("--ranks", "2,4", "--max-steps", "8", "--batch-size", "8")
"""Options of a run of a second or two."""


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_llama(folder: Path, tokenizer_of: Path, times: int = 1) -> Path:
    """A LlamaForCausalLM (grouped-query attention), so many times as wide, with another model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    torch.manual_seed(0)
    config = LlamaConfig(
        **wider(times),
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # so that the untrained model is sure of something, and wrong
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wider(times: int) -> dict[str, Any]:
    return {**SHAPE, **{name: times * SHAPE[name] for name in ("hidden_size", "intermediate_size")}}


def tiny_bert(folder: Path, tokenizer_of: Path, labels: int = 2, times: int = 1) -> Path:
    """A BertForSequenceClassification with the tokenizer found in another model's folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    torch.manual_seed(0)
    shape = {**wider(times), "num_labels": labels}
    config = BertConfig(**shape, vocab_size=len(tokenizer), initializer_range=0.2)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
