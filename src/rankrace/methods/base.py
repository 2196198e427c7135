"""The base model as it is: the row below which no method should fall."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.methods.method import Anywhere, Described, Running
from rankrace.methods.parameters import Parameters
from rankrace.plan import default_micro_tokens
from rankrace.session import recipe_of
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel


class Base(Anywhere):
    name = "base"

    def default_lr(self, width: int, config: RunConfig) -> float:
        return 0.0

    def prepare(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> Running:
        return Untrained(config, data, model, task)


class Untrained:
    """Takes no step."""

    def __init__(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> None:
        packed = PackedModel(model, Parameters(model, {}), task)
        packed.verify_on(data.train.examples)
        recipe = recipe_of(config, model, config.micro_tokens or default_micro_tokens(model))
        self.trainer = Trainer(packed, data.train.examples, recipe)

    def run(self) -> Iterator[Tensor]:
        return iter(())

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None: ...

    def described(self) -> Described:
        return Described(parameters=0, learning_rate=0.0)
