"""QLoRA: LoRA on a base whose linear layers are kept in 4 bits (NF4; Dettmers et al. 2023). GPU only."""

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from rankrace.config import Quantize, RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.errors import RankraceError
from rankrace.methods.fixed import Fixed
from rankrace.methods.method import Running
from rankrace.methods.parameters import Parameters
from rankrace.methods.peft_lora import shared, trainable, wrapped
from rankrace.select.learning_rate import default_lr


class QLora:
    gpu_only = True
    quantize: Quantize = "nf4"
    chooses = False

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = f"qlora-r{rank}"

    def default_lr(self, width: int, config: RunConfig) -> float:
        return default_lr(width)

    def check(self, device: torch.device, task: Task) -> None:
        if device.type != "cuda":
            raise RankraceError(
                f"{self.name} needs a GPU",
                why="its 4-bit products are CUDA kernels of the package bitsandbytes",
                fix="run it with --device cuda on a machine that has one, or leave the method out",
            )
        if task == "classification":
            raise RankraceError(
                f"{self.name} is for causal language models",
                why="the encoders that classify are small, and nobody keeps them in 4 bits",
                fix="leave the method out for this model",
            )

    def prepare(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> Running:
        model.is_loaded_in_4bit = True  # type: ignore  # as Transformers has it; PEFT asks
        lora = LoraConfig(
            r=self.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            **shared(config, model, task),
        )
        peft_model = wrapped(model, lora, config.seed)
        return Fixed(config, data, Parameters(model, trainable(peft_model)), task, rank=self.rank)
