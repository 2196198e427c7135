"""Tiny models with random weights and a real tokenizer, as folders that the command line can be pointed at."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def tiny_llama(folder: Path, tokenizer_of: Path) -> Path:
    """A LlamaForCausalLM (grouped-query attention) with the tokenizer found in another model's folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE,
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


def tiny_bert(folder: Path, tokenizer_of: Path, labels: int = 2) -> Path:
    """A BertForSequenceClassification with the tokenizer found in another model's folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, vocab_size=len(tokenizer), num_labels=labels, initializer_range=0.2)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
