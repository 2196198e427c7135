"""Full fine-tuning: every parameter of the model trains."""

from transformers import PreTrainedModel

from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.methods.fixed import Fixed
from rankrace.methods.method import Anywhere, Running
from rankrace.methods.parameters import Parameters
from rankrace.select.learning_rate import default_lr

OF_LORA = 0.1
"""The best learning rate of full fine-tuning is a tenth of LoRA's ("LoRA Without Regret", 2025)."""


class Full(Anywhere):
    name = "full"

    def default_lr(self, width: int, config: RunConfig) -> float:
        return OF_LORA * default_lr(width)

    def prepare(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> Running:
        return Fixed(config, data, Parameters(model, dict(model.named_parameters())), task)
