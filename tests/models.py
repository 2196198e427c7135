"""Tiny random models of the supported families, for exactness tests."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}


def leaky(model: PreTrainedModel) -> PreTrainedModel:
    """Made to look across the examples of a packed row."""
    norm = model.base_model.get_submodule("norm")
    norm.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    return model


def tiny(family: str, dtype: torch.dtype = torch.float64, times: int = 1) -> PreTrainedModel:
    """A model of this family with random weights, the same at each call; so many times as wide."""
    torch.manual_seed(0)
    widths = {name: times * GROUPED[name] for name in ("hidden_size", "intermediate_size", "head_dim")}
    grouped = {**GROUPED, **widths}
    shape = {name: grouped[name] for name in SHAPE}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**grouped))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**grouped))
        case "gemma3":
            model = Gemma3ForCausalLM(Gemma3TextConfig(**grouped, sliding_window=4))
        case "gpt2":
            config = GPT2Config(vocab_size=VOCABULARY, n_embd=32 * times, n_layer=2, n_head=4, n_positions=64,
                                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
            model = GPT2LMHeadModel(config)
        case "llama-classification":
            model = LlamaForSequenceClassification(LlamaConfig(**grouped, num_labels=3))
        case "bert-classification":
            model = BertForSequenceClassification(BertConfig(**shape, **no_dropout, num_labels=3))
        case "roberta-classification":
            model = RobertaForSequenceClassification(
                RobertaConfig(**shape, **no_dropout, num_labels=3, pad_token_id=1)
            )
        case _:
            raise ValueError(family)
    return model.to(dtype).eval()


CAUSAL = ("llama", "qwen3", "gemma3", "gpt2")
CLASSIFYING = ("llama-classification", "bert-classification", "roberta-classification")
