"""A Transformers model that runs on packed rows, split into trunk and head.

Shapes: K candidates, T tokens of a packed row, S targets in it, D model width, C classes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rankrace.bank import check_quantize, quantize
from rankrace.bank.base.fp8 import Fp8Linear
from rankrace.config import Quantize
from rankrace.data.encoded import NO_LABEL, Encoded, Task
from rankrace.data.pack import Packed, pack
from rankrace.errors import RankraceError
from rankrace.training import attention
from rankrace.training.lastblock import read_only
from rankrace.training.loss import chunked_cross_entropy
from rankrace.training.trained import B


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """What one pass over a packed row says of each target."""

    loss_KS: Tensor
    """Nats."""
    correct_KS: Tensor
    """bool: the target was the most likely one."""


class PackedModel(Generic[B]):
    """Runs a bank's candidates over packed rows and returns the loss of every target.

    Args:
        bank: what is trained.
        chunk: rows of logits that may exist at once.
    """

    def __init__(self, model: PreTrainedModel, bank: B, task: Task, chunk: int = 256) -> None:
        self.model, self.bank, self.chunk = model, bank, chunk
        self.task: Task = task
        self.trunk: nn.Module = model.base_model
        self.reads_only = read_only(self.trunk)
        self.position_offset = first_position(model)
        softcap = model.config.get_text_config().to_dict().get("final_logit_softcapping")
        self.softcap: float | None = softcap
        # The base's own dropout stays off: candidates are compared on equal terms, and the adapters have theirs.
        model.eval()
        model.set_attn_implementation(attention.NAME)
        bank.find_siblings(lambda: self.hidden(one_token().to(model.device), 1))

    def pack(self, examples: Sequence[Encoded], indices: Sequence[int]) -> Packed:
        """These examples as one packed row, on the host."""
        # Encoders read the class off the first token, causal models off the last.
        pooled = "last" if "score" in dict(self.model.named_children()) else "first"
        return pack(examples, indices, self.task, pooled)

    def losses(self, packed: Packed) -> TokenLosses:
        """One pass with the bank's active candidates (or the plain base, as one candidate)."""
        packed = packed.to(self.model.device)
        K = self.bank.running
        self.bank.refresh()
        h_KSD = self.hidden_read(packed, K)
        if self.task == "classification":
            logits_KSC = self.class_logits(h_KSD)
            logits_KSC = logits_KSC if logits_KSC.dtype == torch.float64 else logits_KSC.float()
            targets_KS = packed.targets_S.expand(K, -1)
            loss_KS = cross_entropy(logits_KSC.transpose(1, 2), targets_KS, reduction="none")
            return TokenLosses(loss_KS=loss_KS, correct_KS=logits_KSC.argmax(-1) == targets_KS)
        S = packed.targets_S.shape[0]
        loss_M, correct_M = chunked_cross_entropy(
            h_KSD.flatten(0, 1), packed.targets_S.repeat(K), self.token_logits, self.chunk, self.trained_head()
        )
        return TokenLosses(loss_KS=loss_M.view(K, S), correct_KS=correct_M.view(K, S))

    def hidden_read(self, packed: Packed, K: int) -> Tensor:
        """The trunk's output at the targets' positions [K, S, D]."""
        layout, read_S = self.layout(packed, K), packed.target_positions_S
        if not self.reads_only:
            return self.run(packed, K, layout).index_select(1, read_S)
        # Two at least: what is compiled for several rows is not for one or none.
        S = len(read_S)
        layout.read_R = layout.copies(pad(read_S, (0, max(0, 2 - S))), layout.tokens).clone()
        return self.run(packed, K, layout)[:, :S]

    def hidden(self, packed: Packed, K: int) -> Tensor:
        """The trunk's output [K, T, D]."""
        return self.run(packed, K, self.layout(packed, K))

    def layout(self, packed: Packed, K: int) -> attention.Layout:
        """Where K copies of the row's examples lie."""
        return attention.Layout(
            cu_seqlens=packed.cu_seqlens,
            lengths_N=packed.lengths_N,
            tokens=packed.input_ids_T.shape[0],
            longest=packed.max_seqlen,
            candidates=K,
        )

    def run(self, packed: Packed, K: int, layout: Any) -> Tensor:
        """The trunk's output [K, T, D], or what the layout says is read of it; the attention goes by the layout."""
        # One row of K·T tokens, not K rows: what is compiled then knows nothing of K.
        inputs: dict[str, Any] = {"input_ids": packed.input_ids_T.repeat(1, K)}
        inputs["position_ids"] = (packed.position_ids_T + self.position_offset).repeat(1, K)
        if packed.token_types_T is not None:
            inputs["token_type_ids"] = packed.token_types_T.repeat(1, K)
        with without_pooler(self.trunk):
            h_1MD = self.trunk(**inputs, use_cache=False, layout=layout).last_hidden_state
        return h_1MD.view(K, -1, h_1MD.shape[-1])

    def token_logits(self, h_MD: Tensor) -> Tensor:
        """Hidden states [M, D] → logits [M, V]."""
        head = self.model.get_output_embeddings()
        assert head is not None
        logits_MV = head(h_MD)
        return logits_MV if self.softcap is None else torch.tanh(logits_MV / self.softcap) * self.softcap

    def trained_head(self) -> tuple[Tensor, ...]:
        """The head's parameters, where they train too."""
        head = self.model.get_output_embeddings()
        return () if head is None else tuple(p for p in head.parameters() if p.requires_grad)

    def class_logits(self, h_KND: Tensor) -> Tensor:
        """Pooled hidden states [K, N, D] → logits [K, N, C]. Candidates stay outermost throughout."""
        K, N, D = h_KND.shape
        children = dict(self.model.named_children())
        first_token = h_KND.reshape(K * N, 1, D)  # as a row whose first token is the pooled one
        if "score" in children:
            logits = children["score"](first_token)[:, 0]
        elif self.model.base_model_prefix in ("bert", "electra") and "pooler" in dict(self.trunk.named_children()):
            logits = children["classifier"](self.trunk.get_submodule("pooler")(first_token))
        elif "classifier" in children and isinstance(children["classifier"], nn.Module):
            logits = children["classifier"](first_token)
        else:
            raise RankraceError(
                f"{type(self.model).__name__} has a classification head that rankrace does not know",
                why="the head has to be applied to one pooled position of each packed example",
                fix="use a LLaMA-like, GPT-2, BERT or RoBERTa model, or --task causal",
            )
        return logits.reshape(K, N, -1)

    def verify_on(self, examples: Sequence[Encoded]) -> None:
        """`verify` with the two shortest of these."""
        shortest = sorted(range(len(examples)), key=lambda i: len(examples[i]))[:2]
        self.verify(self.pack(examples, shortest))

    @torch.no_grad()
    def verify(self, packed: Packed) -> None:
        """Compares this packed path with the model's own forward on each example alone, adapters off.

        Raises:
            RankraceError: they differ, so the model does something with positions, masks or logits that packing
                does not reproduce.
        """
        packed = packed.to(self.model.device)
        with self.bank.off():
            ours_S = self.losses(packed).loss_KS[0]
            self.model.set_attn_implementation("eager")
            own_S = torch.cat([self.own_losses(packed, n) for n in range(len(packed.lengths_N))])
            self.model.set_attn_implementation(attention.NAME)
        # Rounding to 8 bits turns a difference in the last bit into one of 1/16.
        exact = not any(isinstance(module, Fp8Linear) for module in self.model.modules())
        tolerance = {torch.float64: 1e-5, torch.float32: 2e-3}.get(self.model.dtype, 0.15) if exact else 0.15
        worst = (ours_S - own_S).abs().max().item()
        if not worst <= tolerance * max(1.0, own_S.abs().max().item()):
            raise RankraceError(
                f"{type(self.model).__name__} gives other losses on packed rows (off by {worst:.3g} nats)",
                why="it treats positions, attention or logits in a way that packing does not reproduce; "
                "training would silently optimise something else",
                fix="use another model, and please report this one",
            )

    def own_losses(self, packed: Packed, n: int) -> Tensor:
        """The losses of example n's targets by the model's own forward, unpacked."""
        start = sum(packed.lengths_N[:n])
        here = slice(start, start + packed.lengths_N[n])
        inputs: dict[str, Any] = {"input_ids": packed.input_ids_T[None, here]}
        if packed.token_types_T is not None:
            inputs["token_type_ids"] = packed.token_types_T[None, here]
        mine = packed.example_S == n
        logits = self.model(**inputs).logits
        if self.task == "causal":
            logits = logits[0, packed.target_positions_S[mine] - start]
        return cross_entropy(logits if logits.dtype == torch.float64 else logits.float(),
                             packed.targets_S[mine], reduction="none")  # fmt: skip


@contextmanager
def without_pooler(trunk: nn.Module) -> Iterator[None]:
    """BERT would pool the packed row's first token, of the first candidate; see `class_logits` for the right ones."""
    pooler = dict(trunk.named_children()).get("pooler")
    if pooler is None:
        yield
        return
    trunk.register_module("pooler", None)
    try:
        yield
    finally:
        trunk.register_module("pooler", pooler)


def one_token() -> Packed:
    """The smallest row there is."""
    ids = np.zeros(1, dtype=np.int32)
    example = Encoded(input_ids=ids, supervised=ids == 1, label=NO_LABEL, group=0, row=0)
    return pack([example], [0], "causal")


def first_position(model: PreTrainedModel) -> int:
    """RoBERTa counts positions from its padding index + 1; the others from 0."""
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.num_embeddings


def is_encoder(name: str) -> bool:
    """Whether a model is made for classification (BERT and kin) rather than for generation.

    Raises:
        RankraceError: there is no such model.
    """
    config = readable(name, lambda: AutoConfig.from_pretrained(name))
    generates = any(a.endswith(("CausalLM", "LMHeadModel")) for a in config.architectures or ())
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not generates


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return readable(name, lambda: AutoTokenizer.from_pretrained(name))


def load_model(
    name: str,
    task: Task,
    labels: tuple[str, ...] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    quantize_to: Quantize = "none",
) -> PreTrainedModel:
    """The base model on its device; a fresh classifier is drawn from the seed.

    Args:
        quantize_to: RunConfig.quantize. The device never holds more of the model than what stays, and one layer.
    """
    check_quantize(quantize_to, device, dtype)
    torch.manual_seed(seed)
    if task == "causal":
        model = readable(name, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=dtype))
    else:
        assert labels is not None
        model = readable(
            name,
            lambda: AutoModelForSequenceClassification.from_pretrained(
                name,
                dtype=dtype,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
            ),
        )
    quantize(model, quantize_to, device)
    return model.to(device)


def readable(name: str, load: Any) -> Any:
    """Turns Transformers' many ways of not finding a model into one clear error."""
    try:
        return load()
    except (OSError, ValueError, SafetensorError) as error:
        local = os.path.exists(name)
        raise RankraceError(
            f"cannot load the model {name!r}: {str(error).strip().splitlines()[0]}",
            why="the folder does not hold a readable Transformers model"
            if local
            else "there is no such folder, and no such model could be fetched from the hub (is there a network?)",
            fix="give a folder with config.json, weights and tokenizer, or the hub name of a model you can reach",
        ) from error
