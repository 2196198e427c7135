"""Houlsby adapters: a bottleneck behind attention and one behind the MLP of each block (Houlsby et al. 2019).

A module of our own: the library `adapters` (1.3) wants Transformers 4.57.

Shapes: D model width, M bottleneck.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from rankrace.bank.linear import linear_shape
from rankrace.bank.targets import HEAD_NAMES, matches
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.errors import RankraceError
from rankrace.methods.fixed import Fixed
from rankrace.methods.method import Anywhere, Running
from rankrace.methods.parameters import Parameters
from rankrace.select.learning_rate import default_lr

LAST_LAYERS = (
    ("self_attn.o_proj", "mlp.down_proj"),  # LLaMA, Mistral, Qwen, Gemma
    ("attention.output.dense", "output.dense"),  # BERT, RoBERTa; the second ends with the first, too
    ("attn.c_proj", "mlp.c_proj"),  # GPT-2
    ("self_attn.out_proj", "fc2"),  # OPT
)
"""The last layer of attention and of the MLP, by family."""


class Bottleneck(nn.Module):
    """h + W_up gelu(W_down h + b_down) + b_up on the output h of a layer: 2·M·D + D + M parameters.

    W_up starts at 0, so that the model starts as it was.
    """

    def __init__(
        self, base: nn.Module, width: int, bottleneck: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(width, bottleneck, dtype=dtype, device=device)
        self.up = nn.Linear(bottleneck, width, dtype=dtype, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        return h + self.up(gelu(self.down(h)))


class Houlsby(Anywhere):
    """Args:
    bottleneck: M; 64 is the middle of the sizes that the paper tries (8 to 256).
    """

    name = "houlsby"

    def __init__(self, bottleneck: int = 64) -> None:
        self.bottleneck = bottleneck

    def default_lr(self, width: int, config: RunConfig) -> float:
        return default_lr(width)

    def prepare(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> Running:
        torch.manual_seed(config.seed)
        added = add_bottlenecks(model, self.bottleneck)
        trained = {n: p for n, p in model.named_parameters() if n.split(".")[0] in HEAD_NAMES}
        for name, module in added.items():
            trained |= {f"{name}.{n}": p for n, p in module.named_parameters() if not n.startswith("base.")}
        return Fixed(config, data, Parameters(model, trained), task)


def add_bottlenecks(model: PreTrainedModel, bottleneck: int) -> dict[str, Bottleneck]:
    """Puts one behind each last layer, and returns them by that layer's name.

    Raises:
        RankraceError: a model of none of the known families.
    """
    names = [name for name, _ in model.named_modules()]
    for endings in LAST_LAYERS:
        if all(any(matches(name, ending) for name in names) for ending in endings):
            chosen = [name for name in names if any(matches(name, ending) for ending in endings)]
            break
    else:
        known = ", ".join(" and ".join(endings) for endings in LAST_LAYERS)
        raise RankraceError(
            f"houlsby does not know where the blocks of {type(model).__name__} end",
            why=f"its adapters sit behind layers named {known}",
            fix="leave the method out for this model",
        )
    added = {}
    for name in chosen:
        layer = model.get_submodule(name)
        added[name] = Bottleneck(layer, linear_shape(layer)[1], bottleneck, model.dtype, model.device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, added[name])
    return added
