"""What a run decides before its first step: sizes, looks, how passes are launched."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from rankrace.bank import Bank
from rankrace.bank.candidates import padded
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import FEW_DOCUMENTS, Task
from rankrace.select.build import opens, widest
from rankrace.select.learning_rate import default_lr, rates_tried
from rankrace.select.race import HEATS, PROBE
from rankrace.select.shrink import PLANS, ladder
from rankrace.training.attention import cannot_capture, refuse_capture
from rankrace.training.loop import Trainer
from rankrace.training.memory import PassCost, free_bytes, free_caches, held_bytes, out_of_memory, probe
from rankrace.training.model import PackedModel
from rankrace.training.recompute import recomputing
from rankrace.training.schedule import steps_of
from rankrace.words import counted

Switch = Literal["on", "off"]

LOOK_SHARE, FRESH_SHARE = 0.10, 0.05
"""What the looks, and the first and last figures, may cost, as shares of the training's own work."""
DEAR = 2.0
"""Times that share, from which it is said."""
LOOK_ENOUGH = 64
"""Examples that a look measures at least, if there are as many; a short training gets fewer looks instead."""
HOST_TOKENS = 4096
"""Of a pass on a CPU: longer ones are not faster there."""
LEAST_TOKENS, MOST_TOKENS = 512, 32768
"""Of a pass on a GPU, whatever fits."""
FULL_TOKENS = 3200
"""Of a pass on a GPU: products of fewer do not keep all of it busy."""
AMPLE_TOKENS, AMPLE_SHARE = 8192, 2 / 5
"""Of a pass as a CUDA graph where memory is plenty: so much of the device holds all that a run takes. At 7B twice the
tokens take a twelfth less time, and 11 GB more."""
LAUNCHES_HIDDEN, LAUNCHES_SMALL = 2.0, 10.0
"""The products of a pass take so many times its launches. From Python: then the host runs ahead, and the chip never
waits. In a CUDA graph nothing runs ahead, and what starting its kernels takes comes on top: a tenth at most."""
LONGER = 4.0
"""Times a pass that trains may one be that measures: what it keeps is a small part of what a backward wants, but a
graph's memory lies beside it."""
GRAPHS_WORTH = 1 / 3
"""Of the time of its products: a pass that takes more to launch is launched as a CUDA graph."""
FREE_SHARE = 0.85
"""Of the free memory is planned with: the rest is for gaps between blocks, and for what a probe does not see."""
REFINEMENTS = 4
"""Ranks that a refined choice measures beside its curve, about."""
COMPILE_WORTH = 120.0
"""Seconds of work from which 20 seconds of compiling are repaid."""


@dataclass(frozen=True)
class Way:
    """To run a pass on a GPU, as measured on an H100 in bfloat16: docs/performance.md."""

    launch_s: float
    """Seconds until the kernels of one adapted layer and its surroundings are launched, forward and backward."""
    operations: float
    """Of matrix products a second, with the time of all other kernels in it."""


EAGER, COMPILED, GRAPHS = Way(0.65e-3, 4e14), Way(0.7e-3, 5.4e14), Way(0.07e-3, 4e14)
"""Compiling saves work of the chip, not of the host, and a CUDA graph that of the host."""


def resolved(config: RunConfig, data: Data, packed: PackedModel[Bank], task: Task) -> RunConfig:
    """The configuration with every default made explicit."""
    bank, model = packed.bank, packed.model
    width = shape_of(model).hidden_size
    # In this order, none knows of the next: compiling, the pass that Python launches, graphs, the pass that is taken.
    compiled = compiling(config, data, bank) if config.compile == "auto" else config.compile
    fitting = Fitting.of(config, data, packed, compiled)
    graphs = config.cuda_graphs
    longest = max(int(part.lengths.max()) for part in (data.train, data.validation))
    if graphs == "on":
        refuse_capture(model, longest)
    elif graphs == "auto" and cannot_capture(model, longest) is not None:
        graphs = "off"
    elif graphs == "auto":
        graphs = graphs_worth(data, config.batch_size, bank, fitting.plain, compiled)
    return config.model_copy(
        update={
            "task": task,
            "lr": config.lr or default_lr(width, config.scaling),
            "micro_tokens": fitting.with_graphs if graphs == "on" else fitting.plain,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "compile": compiled,
            "cuda_graphs": graphs,
            "recompute": "on" if fitting.recompute else "off",
        }
    )


def compiling(config: RunConfig, data: Data, bank: Bank) -> Switch:
    """Whether compiling is repaid: by the whole training's products, or its launches as one graph a step.

    The products are 4 operations a token and weight, forward and backward.
    """
    if bank.device.type != "cuda":
        return "off"
    products = products_seconds(bank, float(data.train.lengths.mean()) * config.batch_size, EAGER)
    _, steps = steps_of(len(data.train), config.batch_size, config.epochs, config.max_steps)
    return "on" if steps * max(products, GRAPHS.launch_s * len(bank.layers)) > COMPILE_WORTH else "off"


def graphs_worth(data: Data, batch_size: int, bank: Bank, micro_tokens: int, compiled: Switch) -> Switch:
    """Whether launching from Python would take too much of a pass.

    Args:
        micro_tokens: of the longest pass without graphs. Those with graphs may well be shorter.
    """
    step_tokens = float(data.train.lengths.mean()) * batch_size
    return "on" if graph_worth(bank, step_tokens / math.ceil(step_tokens / micro_tokens), compiled) else "off"


def graph_worth(bank: Bank, tokens: float, compiled: Switch) -> bool:
    """The same of a pass of so many tokens, over all candidates in it."""
    way = way_of(compiled, "off")
    launches = way.launch_s * len(bank.layers)
    return bank.device.type == "cuda" and launches > GRAPHS_WORTH * products_seconds(bank, tokens, way)


def products_seconds(bank: Bank, tokens: float, way: Way) -> float:
    """Of all layers' products with the frozen weights, forward and backward."""
    return 4 * sum(layer.d_in * layer.d_out for layer in bank.layers.values()) * tokens / way.operations


def way_of(compiled: Switch, graphs: Switch) -> Way:
    if graphs == "on":
        return GRAPHS
    return COMPILED if compiled == "on" else EAGER


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The passes to take: as long as is worth while, or the longest that fit, by a probe. On a CPU, and where they
    are given, without one."""

    plain: int
    """Tokens of a pass that Python launches."""
    with_graphs: int
    """Of one that runs as a CUDA graph, which keeps its memory while passes measure."""
    recompute: bool

    @staticmethod
    def of(config: RunConfig, data: Data, packed: PackedModel[Bank], compiled: Switch) -> "Fitting":
        bank, chosen = packed.bank, config.micro_tokens
        decided = config.recompute != "auto"
        if bank.device.type != "cuda" or (decided and chosen is not None):
            tokens = chosen or HOST_TOKENS
            return Fitting(plain=tokens, with_graphs=tokens, recompute=config.recompute == "on")
        K, R = starting(config, bank)
        bank.start((R,), (1.0,))
        candidates = candidate_bytes(bank, K, R, flats_of(config))
        held, free = held_bytes(bank.device), free_bytes(bank.device)
        room, ample = FREE_SHARE * free - candidates, AMPLE_SHARE * (held + free) - held - candidates
        recompute, cost = probed(config, data, packed, room)
        shape, padding = shape_of(packed.model), padding_of(data)
        plain = pass_tokens(worthwhile_tokens(shape, way_of(compiled, "off")), cost.tokens_in(room, padding))
        with_graphs = plain
        for _ in range(2):  # how much longer those are that measure hangs on how long these are
            apart = cost.apart(measures_longer(packed.model, with_graphs))
            with_graphs = pass_tokens(graph_tokens(shape, apart, ample, padding), apart.tokens_in(room, padding))
        return Fitting(plain=chosen or plain, with_graphs=chosen or with_graphs, recompute=recompute)


def pass_tokens(wanted: int, fitting: int) -> int:
    """Of a pass: as many as are wanted, or as fit."""
    return max(LEAST_TOKENS, min(wanted, fitting // 512 * 512))


def probed(config: RunConfig, data: Data, packed: PackedModel[Bank], room: float) -> tuple[bool, PassCost]:
    """Whether blocks are to be recomputed, and what a pass then takes of so many bytes."""
    longest = int(data.train.lengths.max())
    if config.recompute != "on":
        try:
            cost = probe(packed, data.train.examples)
        except RuntimeError as error:
            if config.recompute == "off" or not out_of_memory(error):
                raise
        else:
            if config.recompute == "off" or cost.tokens_in(room, 1.0) >= longest:
                return False, cost
    free_caches()
    with recomputing(packed.bank):
        return True, probe(packed, data.train.examples)


def worthwhile_tokens(shape: PreTrainedConfig, way: Way) -> int:
    """Of a pass on a GPU: longer ones are hardly faster, and take more memory.

    4·D_in·D_out operations a token and layer have to hide the layer's launches, or to dwarf them. So wide models want
    few tokens, small ones as many as there are; and a CUDA graph fewer than Python.
    """
    times = LAUNCHES_SMALL if way is GRAPHS else LAUNCHES_HIDDEN
    tokens = -(-int(times * launched_tokens(shape, way)) // 512) * 512
    return min(MOST_TOKENS, max(FULL_TOKENS, tokens))


def graph_tokens(shape: PreTrainedConfig, cost: PassCost, ample: float, padding: float) -> int:
    """The same of a CUDA graph, of more tokens where passes may take so many bytes."""
    return max(worthwhile_tokens(shape, GRAPHS), min(AMPLE_TOKENS, cost.tokens_in(ample, padding) // 512 * 512))


def launched_tokens(shape: PreTrainedConfig, way: Way) -> float:
    """Of the pass whose products take as long as its launches."""
    D = shape.hidden_size
    weights = D * (4 * D + 3 * inner_width(shape)) / 7  # the mean of a block's seven layers, or about that
    return way.launch_s * way.operations / (4 * weights)


def measures_longer(model: PreTrainedModel, micro_tokens: int) -> float:
    """How many times as long as one that trains a pass may be that measures: until its products take as long as its
    launches, for Python launches it. (Both are half of what they are with a backward.)"""
    if model.device.type != "cuda":
        return 1.0
    return min(LONGER, max(1.0, launched_tokens(shape_of(model), EAGER) / micro_tokens))


def shape_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Of its language part."""
    return model.config.get_text_config()


def inner_width(shape: PreTrainedConfig) -> int:
    """Of the MLPs."""
    return shape.to_dict().get("intermediate_size", 4 * shape.hidden_size)


def starting(config: RunConfig, bank: Bank) -> tuple[int, int]:
    """How many candidates a run begins with, and the largest of their ranks."""
    largest = max(config.ranks)
    if config.strategy == "grid":
        return len(set(config.ranks)), largest
    return len(rates_tried(config.lr_scales)) + config.twin, widest(largest, bank)


def flats_of(config: RunConfig) -> int:
    """Numbers kept for each trainable value: itself, its gradient and two moments, and while learning rates are
    compared its average. That of the winner takes more than the start did only where it began alone, at its rank."""
    alone = config.strategy == "grid" and len(set(config.ranks)) == 1 and config.average == "on"
    return 5 if opens(config) or alone else 4


def candidate_bytes(bank: Bank, K: int, R: int, flats: int = 4) -> int:
    """Of K candidates padded to rank R, and of what the products use.

    Args:
        flats: numbers for each trainable value.
    """
    per_value = flats * bank.dtype.itemsize + bank.model.dtype.itemsize
    return K * bank.trainable_parameters(padded(R)) * per_value


def ranks_looked_at(config: RunConfig) -> int:
    """At a look, the first one of a race."""
    ranks = {"shrink": ladder(max(config.ranks)), "race": [1, *config.ranks], "grid": config.ranks}
    return len(set(ranks[config.strategy]))


def ranks_measured(config: RunConfig, looks: int) -> int:
    """At all looks together, the refinement of the choice included, about."""
    return looks * ranks_looked_at(config) + (REFINEMENTS if config.refine else 0)


def padding_of(data: Data) -> float:
    """Cells for each token, where rows are padded to their longest example: at most so many."""
    return float(data.train.lengths.max() / data.train.lengths.mean())


def default_micro_tokens(model: PreTrainedModel, graphs: Switch = "off") -> int:
    """Of a pass where nothing is probed or compiled: 4096 on a CPU; on a GPU what is worth while, if 60% of the free
    memory holds it."""
    if model.device.type != "cuda":
        return HOST_TOKENS
    free, _ = torch.cuda.mem_get_info(model.device)
    shape = shape_of(model)
    values = shape.num_hidden_layers * (16 * shape.hidden_size + 6 * inner_width(shape))
    tokens = int(0.6 * free / (values * model.dtype.itemsize))
    return pass_tokens(worthwhile_tokens(shape, way_of("off", graphs)), tokens)


@dataclass(frozen=True, kw_only=True)
class LookPlan:
    """How much of the training's own work goes into measuring."""

    fractions: tuple[float, ...]
    """When to look, as shares of the training."""
    most: int
    """Looks at most."""
    looked: int
    """Examples that a look measures."""
    fresh: int
    """Examples that the first and last figures are measured on."""
    example_share: float = 0.0
    """What all looks take for each example, the refined choice and a second look at LATER among them, as a share of
    the training's own work."""

    def warnings(self, looked: int) -> list[str]:
        """What a person should know of looks at so many examples: in a short training even the fewest are dear."""
        share = looked * self.example_share
        if share <= DEAR * LOOK_SHARE:
            return []
        return [
            f"A short training: its looks measure {counted(looked, 'example')}, hardly fewer than a choice wants, "
            f"and may take up to {share:.0%} of its own work; those of a longer one take {LOOK_SHARE:.0%}. With "
            "--no-refine or a smaller largest rank in --ranks they take less."
        ]

    @staticmethod
    def of(config: RunConfig, data: Data, trainer: Trainer) -> "LookPlan":
        """As many looks as LOOK_SHARE of the training's work pays for at LOOK_ENOUGH examples each; or at so many of
        each document, or half of all there are, where documents are few: an error comes from their means.

        Training costs a token two forwards (LoRA needs no gradient of the frozen weights), measuring one.
        """
        length = float(data.validation.lengths.mean())
        training = 2 * float(data.train.lengths.sum()) * trainer.total / trainer.per_epoch / length
        plans = {
            "shrink": PLANS,
            "race": ((PROBE, *(PROBE + heat for heat in HEATS)),),
            "grid": ((config.search_fraction,),),
        }[config.strategy]
        later = int(config.strategy != "grid")  # the look at LATER, if ranks cannot be told apart before
        measured = [ranks_measured(config, len(plan) + later) for plan in plans]
        affordable = [int(LOOK_SHARE * training / ranks) for ranks in measured]
        least = LOOK_ENOUGH
        if (documents := data.validation.documents) < FEW_DOCUMENTS:
            least = max(least, min(len(data.validation) // 2, documents * LOOK_ENOUGH))
        chosen = next((i for i, looked in enumerate(affordable) if looked >= least), len(plans) - 1)
        return LookPlan(
            fractions=plans[chosen],
            most=len(plans[chosen]) + later + opens(config),
            looked=max(affordable[chosen], least),
            fresh=max(int(FRESH_SHARE * training / 2), least),
            example_share=measured[chosen] / training,
        )
