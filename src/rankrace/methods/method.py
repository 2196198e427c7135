"""What a method is: a way to train a model on given examples, through the one loop.

    running = find_method("lora-r8").prepare(config, data, model, task)
    for loss_K in running.run(): ...

Every method gets the same examples in the same order and the same token budget, has no dropout and no early
stopping, ends with its last step (but for those named -average), and has its learning rate from the same rule: a
default of its own times the same few scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankrace.config import Quantize, RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.training.loop import Trainer

AVERAGE = "-average"
"""Ends the names of methods that deliver the average of their values where validation examples say it is better."""


class Running(Protocol):
    """A method at work on one model."""

    @property
    def trainer(self) -> Trainer[Any]: ...

    def run(self) -> Iterator[Tensor]:
        """Trains from where it is to the end; yields the losses after each step."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        ...

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what is no tensor."""
        ...

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None: ...

    def described(self) -> "Described":
        """At the end of the training."""
        ...


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a finished training delivers."""

    parameters: int
    """Trained values that are needed to use the model."""
    learning_rate: float
    rank: int | None = None
    """Of a LoRA adapter."""
    search_s: float = 0.0
    """Of the training's time: what only the choice of the rank needed."""
    reason: str = ""


class Method(Protocol):
    """Abstract; each concrete method is final."""

    @property
    def name(self) -> str: ...

    @property
    def gpu_only(self) -> bool: ...

    @property
    def quantize(self) -> Quantize:
        """How the base is kept."""
        ...

    @property
    def chooses(self) -> bool:
        """Whether it chooses the rank, by the options that say how; else it reads none of them."""
        ...

    def default_lr(self, width: int, config: RunConfig) -> float:
        """Peak learning rate for a model of this width, which the tuning scales."""
        ...

    def check(self, device: torch.device, task: Task) -> None:
        """Before anything is loaded. Raises RankraceError: the method cannot work there."""
        ...

    def prepare(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> Running:
        """Puts on the model what the method adds, and readies the loop. The learning rate is config.lr."""
        ...


class Anywhere:
    """Works on any device and model; the base is as it is."""

    gpu_only = False
    quantize: Quantize = "none"
    chooses = False

    def check(self, device: torch.device, task: Task) -> None: ...
