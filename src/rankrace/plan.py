"""What a run decides before its first step: sizes, looks, how passes are launched."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from rankrace.bank import Bank
from rankrace.bank.attach import padded
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.select.build import widest
from rankrace.select.learning_rate import default_lr, rates_tried
from rankrace.select.race import HEATS, PROBE
from rankrace.select.shrink import PLANS
from rankrace.train.loop import Trainer
from rankrace.train.memory import PassCost, free_bytes, free_caches, out_of_memory, probe
from rankrace.train.model import PackedModel
from rankrace.train.recompute import recomputing

LOOK_SHARE, FRESH_SHARE = 0.10, 0.05
"""What the looks, and the first and last figures, may cost, as shares of the training's own work."""
LOOK_ENOUGH = 64
"""Examples that a look measures at least, if there are as many; a short training gets fewer looks instead."""
GPU_OPERATIONS = 4e14
"""Matrix products a second, in bfloat16, of the usual chip."""
LAUNCH_SECONDS = 2.5e-4
"""What launching the kernels of one adapted layer and its surroundings takes from Python, both ways."""
HOST_TOKENS = 4096
"""Of a pass on a CPU: longer ones are not faster there."""
LEAST_TOKENS, MOST_TOKENS = 512, 32768
"""Of a pass on a GPU, whatever fits."""
FULL_TOKENS = 2048
"""Of a pass on a GPU: products of fewer do not keep all of it busy."""
LAUNCHES_HIDDEN = 2.0
"""The products of a pass take so many times its launches: then the host runs ahead, and the chip never waits."""
GRAPH_LAUNCHES = 0.2
"""Of a CUDA graph, against those from Python."""
FREE_SHARE = 0.85
"""Of the free memory is planned with: the rest is for gaps between blocks, and for what a probe does not see."""
REFINEMENTS = 4
"""Ranks that a refined choice measures beside its curve, about."""
COMPILE_WORTH = 120.0
"""Seconds of work from which 20 seconds of compiling are repaid."""


def resolved(config: RunConfig, data: Data, packed: PackedModel[Bank], task: Task) -> RunConfig:
    """The configuration with every default made explicit."""
    bank, model = packed.bank, packed.model
    width = shape_of(model).hidden_size
    fitting = Fitting.of(config, data, packed)
    micro_tokens = config.micro_tokens or fitting.tokens(graphs=False)
    compile_, graphs = launching(config, data, bank, micro_tokens)
    if (graphs if config.cuda_graphs == "auto" else config.cuda_graphs) == "on":
        micro_tokens = config.micro_tokens or fitting.tokens(graphs=True)
    return config.model_copy(
        update={
            "task": task,
            "lr": config.lr or default_lr(width),
            "micro_tokens": micro_tokens,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "compile": compile_ if config.compile == "auto" else config.compile,
            "cuda_graphs": graphs if config.cuda_graphs == "auto" else config.cuda_graphs,
            "recompute": "on" if fitting.recompute else "off",
        }
    )


def launching(config: RunConfig, data: Data, bank: Bank, micro_tokens: int) -> tuple[str, str]:
    """Whether compiling and CUDA graphs are worth their preparation: "on" or "off" each.

    From the matrix products alone: 4 operations a token and weight, forward and backward.
    """
    if bank.device.type != "cuda":
        return "off", "off"
    weights = sum(layer.d_in * layer.d_out for layer in bank.layers.values())
    step_tokens = float(data.train.lengths.mean()) * config.batch_size
    passes = math.ceil(step_tokens / micro_tokens)
    products = 4 * weights * step_tokens / passes / GPU_OPERATIONS
    launches = LAUNCH_SECONDS * len(bank.layers)
    steps = config.epochs * len(data.train) / config.batch_size
    steps = steps if config.max_steps is None else min(steps, config.max_steps)
    whole = steps * passes * max(products, GRAPH_LAUNCHES * launches)
    return "on" if whole > COMPILE_WORTH else "off", "on" if products < launches else "off"


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The passes to take: as long as is worth while, or the longest that fit, by a probe. On a CPU, and where they
    are given, without one."""

    plain: int
    with_graphs: int
    """A graph keeps the memory of its passes beside that of the eager ones."""
    recompute: bool

    def tokens(self, *, graphs: bool) -> int:
        return self.with_graphs if graphs else self.plain

    @staticmethod
    def of(config: RunConfig, data: Data, packed: PackedModel[Bank]) -> "Fitting":
        bank, chosen = packed.bank, config.micro_tokens
        decided = config.recompute != "auto"
        if bank.device.type != "cuda" or (decided and chosen is not None):
            tokens = chosen or HOST_TOKENS
            return Fitting(plain=tokens, with_graphs=tokens, recompute=config.recompute == "on")
        K, R = starting(config, bank)
        bank.start((R,), (1.0,))
        room = FREE_SHARE * free_bytes(bank.device) - candidate_bytes(bank, K, R)
        recompute, cost = probed(config, data, packed, room)
        shape = shape_of(packed.model)

        def within(room: float, *, graphs: bool) -> int:
            tokens = cost.tokens_in(room, padding_of(data))
            return chosen or max(LEAST_TOKENS, min(worthwhile_tokens(shape, graphs=graphs), tokens // 512 * 512))

        return Fitting(
            plain=within(room, graphs=False), with_graphs=within(room / 2, graphs=True), recompute=recompute
        )


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


def worthwhile_tokens(shape: PreTrainedConfig, *, graphs: bool) -> int:
    """Of a pass on a GPU: longer ones are hardly faster, and take more memory.

    4·D_in·D_out operations a token and layer have to hide the layer's launches. So wide models want few tokens, small
    ones as many as there are.
    """
    D = shape.hidden_size
    weights = D * (4 * D + 3 * inner_width(shape)) / 7  # the mean of a block's seven layers, or about that
    launches = LAUNCH_SECONDS * (GRAPH_LAUNCHES if graphs else 1.0)
    tokens = LAUNCHES_HIDDEN * launches * GPU_OPERATIONS / (4 * weights)
    return min(MOST_TOKENS, max(FULL_TOKENS, -(-int(tokens) // 512) * 512))


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


def candidate_bytes(bank: Bank, K: int, R: int, flats: int = 4) -> int:
    """Of K candidates padded to rank R: values, gradients and two moments, and what the products use.

    Args:
        flats: how many of the four there are.
    """
    per_value = flats * bank.dtype.itemsize + bank.model.dtype.itemsize
    return K * bank.trainable_parameters(padded(R)) * per_value


def ranks_looked_at(config: RunConfig) -> int:
    """At each look, about."""
    return len(config.ranks) + 1


def ranks_measured(config: RunConfig, looks: int) -> int:
    """At all looks together, the refinement of the choice included, about."""
    return looks * ranks_looked_at(config) + (REFINEMENTS if config.refine else 0)


def padding_of(data: Data) -> float:
    """Cells for each token, where rows are padded to their longest example: at most so many."""
    return float(data.train.lengths.max() / data.train.lengths.mean())


def default_micro_tokens(model: PreTrainedModel, *, graphs: bool = False) -> int:
    """Of a pass where nothing is probed: 4096 on a CPU; on a GPU what is worth while, if 60% of the free memory
    holds it."""
    if model.device.type != "cuda":
        return HOST_TOKENS
    free, _ = torch.cuda.mem_get_info(model.device)
    shape = shape_of(model)
    values = shape.num_hidden_layers * (16 * shape.hidden_size + 6 * inner_width(shape))
    tokens = int(0.6 * free / (values * model.dtype.itemsize))
    return max(LEAST_TOKENS, min(worthwhile_tokens(shape, graphs=graphs), tokens // 512 * 512))


@dataclass(frozen=True, kw_only=True)
class LookPlan:
    """How much of the training's own work goes into measuring."""

    fractions: tuple[float, ...]
    """When to look, as shares of the training."""
    looked: int
    """Examples that a look measures."""
    fresh: int
    """Examples that the first and last figures are measured on."""

    @staticmethod
    def of(config: RunConfig, data: Data, trainer: Trainer) -> "LookPlan":
        """As many looks as LOOK_SHARE of the training's work pays for at LOOK_ENOUGH examples each.

        Training costs a token two forwards (LoRA needs no gradient of the frozen weights), measuring one.
        """
        length = float(data.validation.lengths.mean())
        training = 2 * float(data.train.lengths.sum()) * trainer.total / trainer.per_epoch / length
        plans = {
            "shrink": PLANS,
            "race": ((PROBE, *(PROBE + heat for heat in HEATS)),),
            "grid": ((config.search_fraction,),),
        }[config.strategy]
        affordable = [int(LOOK_SHARE * training / ranks_measured(config, len(plan))) for plan in plans]
        chosen = next((i for i, looked in enumerate(affordable) if looked >= LOOK_ENOUGH), len(plans) - 1)
        return LookPlan(
            fractions=plans[chosen],
            looked=max(affordable[chosen], LOOK_ENOUGH),
            fresh=max(int(FRESH_SHARE * training / 2), LOOK_ENOUGH),
        )
