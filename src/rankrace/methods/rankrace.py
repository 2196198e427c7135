"""rankrace's own strategies as methods: the rank is chosen on validation examples within the run."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.methods.method import AVERAGE, Anywhere, Described, Running
from rankrace.record import reason_of
from rankrace.select.learning_rate import default_lr
from rankrace.session import Session, prepare
from rankrace.training.loop import Trainer


class Rankrace(Anywhere):
    """Args:
    strategy: a value of RunConfig.strategy.
    average: its end may be the average of its values, as `rankrace train` has it; else it is the last step, as
        every method's.
    """

    chooses = True

    def __init__(self, strategy: str, *, average: bool = False) -> None:
        self.name = strategy + (AVERAGE if average else "")
        self.options = {"strategy": strategy, "average": "on" if average else "off"}

    def default_lr(self, width: int, config: RunConfig) -> float:
        return default_lr(width, config.scaling)

    def prepare(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> Running:
        return Choosing(prepare(config.model_copy(update=self.options), data, model, task))


class Choosing:
    """A session, seen as any other method at work."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def trainer(self) -> Trainer[Bank]:
        return self.session.trainer

    def run(self) -> Iterator[Tensor]:
        yield from self.session.search.run()
        self.session.end()

    def tensors(self) -> dict[str, Tensor]:
        return self.session.tensors()

    def state(self) -> dict[str, Any]:
        return self.session.state()

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.session.restore(tensors, state)

    def described(self) -> Described:
        search, bank = self.session.search, self.trainer.bank
        rank = bank.candidates.ranks[0]
        return Described(
            parameters=bank.trainable_parameters(bank.candidates.ranks_of(0)),
            learning_rate=search.setting(rank).lr,
            rank=rank,
            search_s=search.state.look_seconds + search.state.loser_seconds,
            reason=reason_of(self.session),
        )
