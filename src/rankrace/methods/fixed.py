"""A method whose shape does not change in training: given parameters, one learning rate, to the end."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.errors import RankraceError
from rankrace.methods.method import Described
from rankrace.methods.parameters import Parameters
from rankrace.plan import default_micro_tokens
from rankrace.select.ending import end
from rankrace.session import recipe_of
from rankrace.training.attention import refuse_capture
from rankrace.training.loop import Trainer
from rankrace.training.model import PackedModel
from rankrace.training.optimizer import Optimizer


class Fixed:
    """Args:
    config: its lr is the peak learning rate.
    rank: of a LoRA adapter.
    optimizer: what to make of the loop's own one.
    delivered: how many of the trained values are needed to use the model; None: all.
    average: the end may be the average of the values, chosen on all validation examples (a strategy of rankrace's:
        on those that chose its rank).
    """

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        trained: Parameters,
        task: Task,
        *,
        rank: int | None = None,
        optimizer: Callable[[Optimizer, Trainer[Parameters]], Optimizer] = lambda own, trainer: own,
        delivered: Callable[[], int] | None = None,
        average: bool = False,
    ) -> None:
        refuse_unshared(config)
        assert config.lr is not None
        model = PackedModel(trained.model, trained, task)
        model.verify_on(data.train.examples)
        graphs = "on" if config.cuda_graphs == "on" else "off"
        if graphs == "on":
            refuse_capture(trained.model, int(data.train.lengths.max()))
        micro_tokens = config.micro_tokens or default_micro_tokens(trained.model, graphs)
        self.trainer = Trainer(model, data.train.examples, recipe_of(config, trained.model, micro_tokens))
        self.trainer.begin([config.lr])
        self.trainer.optimizer = optimizer(self.trainer.optimizer, self.trainer)
        self.rank, self.delivered, self.validation = rank, delivered, data.validation.examples
        if average and self.trainer.repeats:
            self.trainer.follow()

    def run(self) -> Iterator[Tensor]:
        yield from self.trainer.run(self.trainer.total)
        end(self.trainer, self.validation, np.array([e.group for e in self.validation]))

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.trainer.bank.values.all_KP, **self.trainer.tensors()}

    def state(self) -> dict[str, Any]:
        return self.trainer.state()

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.trainer.bank.load(tensors["values"])
        self.trainer.restore(tensors, state)

    def described(self) -> Described:
        everything = self.trainer.bank.values.all_KP.numel()
        return Described(
            parameters=everything if self.delivered is None else self.delivered(),
            learning_rate=self.trainer.lr_K[0],
            rank=self.rank,
        )


def refuse_unshared(config: RunConfig) -> None:
    """Raises RankraceError for options that only a bank has: the methods would not be compared on equal terms."""
    for option, shared in (("dropout", config.dropout == 0), ("compile", config.compile != "on"),
                           ("recompute", config.recompute != "on")):  # fmt: skip
        if not shared:
            raise RankraceError(
                f"--{option} is an option of rankrace's own methods",
                why="the other methods would be compared with them on unequal terms",
                fix=f"leave {option} out of the experiment",
            )
