"""A teacher is a tiny random LLaMA plus an update of known rank in every linear layer; it writes the data.

Shapes: N examples, L tokens of each, D_in / D_out the widths of a layer, r its planted rank.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rankrace.bank.targets import find_targets
from rankrace.data.encoded import NO_LABEL, Encoded

Kind = Literal["flat", "power", "layers"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LARGEST, WIDE = 16, 32
"""The largest rank that may be picked, and the rank that shrink starts at."""


@dataclass(frozen=True, kw_only=True)
class Regime:
    """What model, how much of an update, and how long the student trains."""

    width: int = 64
    inner: int = 96
    layers: int = 2
    vocabulary: int = 64
    logits: float = 2.5
    """Standard deviation of the logits: a larger one makes a more certain teacher, and each token tell more."""
    update: float = 0.45
    """Norm of a layer's update as a share of the norm of its weight, whatever the rank: ‖ΔW‖ / √D_out."""
    length: int = 32
    """Tokens of an example; all but the first are targets."""
    steps: int = 1000
    batch_size: int = 32
    """Every step sees fresh examples."""
    lr: float = 7e-3
    alpha: float = 32.0
    held: int = 256
    """Examples that choose; as many again only report."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """The student's base model, its data, and what the teacher itself makes of them."""

    base: LlamaForCausalLM
    layer_ranks: dict[str, int]
    train: list[Encoded]
    looked: list[Encoded]
    """The held-out examples that choose."""
    fresh: list[Encoded]
    """Those that only report."""
    teacher_looked: float
    """Loss of the teacher on them, nats per target: what no student is expected to beat."""
    teacher_fresh: float
    kl: float
    """KL(teacher ‖ base) in nats per target: what there is to learn."""
    entropy: float
    """Of the teacher, nats per target."""


def singular_values(kind: Kind, rank: int, norm: float) -> Tensor:
    """[r], of this Frobenius norm: all equal, or falling as 1/i ("power")."""
    ones_r = torch.ones(rank)
    S_r = ones_r / torch.arange(1, rank + 1) if kind == "power" else ones_r
    return S_r * norm / S_r.norm()


def ranks_by_layer(kind: Kind, rank: int, names: list[str], generator: torch.Generator) -> dict[str, int]:
    """The same in all layers, or ("layers") spread evenly over r/2 … 3r/2 and shuffled: the mean is still r."""
    if kind != "layers":
        return dict.fromkeys(names, rank)
    spread = torch.linspace(0.5 * rank, 1.5 * rank, len(names)).round().long()
    order = torch.randperm(len(names), generator=generator)
    return {name: int(spread[i]) for name, i in zip(names, order.tolist(), strict=True)}


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q


def random_llama(regime: Regime, generator: torch.Generator) -> LlamaForCausalLM:
    """Weights of variance 1 / D_in, so that each layer keeps the size of what it gets; all drawn here."""
    config = LlamaConfig(
        vocab_size=regime.vocabulary,
        hidden_size=regime.width,
        intermediate_size=regime.inner,
        num_hidden_layers=regime.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=regime.length,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        embedding.mul_(regime.width**0.5)
        head.mul_(regime.logits)
    return model


@torch.no_grad()
def sampled(teacher: LlamaForCausalLM, count: int, length: int, generator: torch.Generator) -> Tensor:
    """[N, L]: a random first token, the others by the teacher's own probabilities."""
    ids_NL = token_N1 = torch.randint(teacher.config.vocab_size, (count, 1), generator=generator)
    past = None
    for _ in range(length - 1):
        out = teacher(input_ids=token_N1, past_key_values=past, use_cache=True)
        past = out.past_key_values
        token_N1 = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        ids_NL = torch.cat([ids_NL, token_N1], 1)
    return ids_NL


def encoded(ids_NL: Tensor) -> list[Encoded]:
    supervised = np.arange(ids_NL.shape[1]) > 0
    rows = ids_NL.numpy().astype(np.int32)
    return [
        Encoded(input_ids=row, supervised=supervised, label=NO_LABEL, group=i, row=i) for i, row in enumerate(rows)
    ]


def plant(kind: Kind, rank: int, seed: int, regime: Regime) -> Planted:
    """All of it is a function of the arguments."""
    generator = torch.Generator().manual_seed(seed)
    model = random_llama(regime, generator)
    targets = find_targets(model, "all-linear")
    layer_ranks = ranks_by_layer(kind, rank, list(targets), generator)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name, layer in targets.items():
            D_out, D_in = layer.weight.shape
            S_r = singular_values(kind, layer_ranks[name], regime.update * D_out**0.5)
            U_Dr, V_Dr = (orthonormal(D, len(S_r), generator) for D in (D_out, D_in))
            layer.weight.add_(U_Dr * S_r @ V_Dr.T)
    count = regime.steps * regime.batch_size
    held = 2 * regime.held
    parts = [
        sampled(model, min(512, count + held - at), regime.length, generator) for at in range(0, count + held, 512)
    ]
    ids_NL = torch.cat(parts)
    held_NL = ids_NL[count:]
    with torch.no_grad():
        teacher_NLV = model(input_ids=held_NL).logits.log_softmax(-1)[:, :-1]
        model.load_state_dict(before)
        base_NLV = model(input_ids=held_NL).logits.log_softmax(-1)[:, :-1]
    loss_NL = -teacher_NLV.gather(-1, held_NL[:, 1:, None])[..., 0]
    return Planted(
        base=model,
        layer_ranks=layer_ranks,
        train=encoded(ids_NL[:count]),
        looked=encoded(held_NL[: regime.held]),
        fresh=encoded(held_NL[regime.held :]),
        teacher_looked=loss_NL[: regime.held].mean().item(),
        teacher_fresh=loss_NL[regime.held :].mean().item(),
        kl=(teacher_NLV.exp() * (teacher_NLV - base_NLV)).sum(-1).mean().item(),
        entropy=-(teacher_NLV.exp() * teacher_NLV).sum(-1).mean().item(),
    )
