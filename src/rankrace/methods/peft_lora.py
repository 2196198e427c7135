"""LoRA and its relatives as PEFT implements them, trained by rankrace's loop."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankrace.bank.targets import find_targets
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Encoded, Task
from rankrace.errors import RankraceError
from rankrace.methods.fixed import Fixed
from rankrace.methods.method import Anywhere, Running
from rankrace.methods.parameters import Parameters
from rankrace.select.learning_rate import default_lr, lr_for

EVA_EXAMPLES, EVA_INPUTS = 64, 2048
"""EVA reads its initial factors off the inputs of the adapted layers: so many training examples, of their tokens at
most so many. One batch: with several, PEFT goes round and round for minutes until no component moves any more."""
COMPARED = 8
"""Inputs by which PEFT is to see that layers share them, as queries, keys and values do."""


@dataclass(frozen=True, kw_only=True)
class PeftLora(Anywhere):
    """One row of the table of methods. α and the target modules are those of the configuration.

    The learning rate follows the repository's rule (select/learning_rate.py): with α/√r (rsLoRA) it is r^-1/4 of
    LoRA's.
    """

    name: str
    rank: int
    rslora: bool = False
    dora: bool = False
    eva: bool = False
    average: bool = False
    """Its end may be the average of its values."""

    def default_lr(self, width: int, config: RunConfig) -> float:
        scaling = "rslora" if self.rslora else "lora"
        return lr_for(self.rank, default_lr(width, scaling), config.alpha, scaling, {})

    def prepare(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> Running:
        lora = LoraConfig(
            r=self.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights="eva" if self.eva else True,
            eva_config=EvaConfig() if self.eva else None,
            **shared(config, model, task),
        )
        peft_model = wrapped(model, lora, config.seed)
        if self.eva:
            initialise_by_data(peft_model, model, data.train.examples, task)
        trained = Parameters(model, trainable(peft_model))
        return Fixed(config, data, trained, task, rank=self.rank, average=self.average)


def shared(config: RunConfig, model: PreTrainedModel, task: Task) -> dict[str, Any]:
    """PEFT's arguments that all its methods have in common."""
    targets = find_targets(model, config.target_modules)
    return {
        "target_modules": list(targets),
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in targets.values()),
        "task_type": "SEQ_CLS" if task == "classification" else "CAUSAL_LM",
    }


def wrapped(model: PreTrainedModel, config: Any, seed: int) -> PeftModel:
    """The model with PEFT's layers in it, in the model's type: the masters are `Parameters`'."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False")
        found = get_peft_model(model, config, autocast_adapter_dtype=False)
    assert isinstance(found, PeftModel)
    return found


def trainable(peft_model: PeftModel) -> dict[str, nn.Parameter]:
    """Without the number by which AdaLoRA divides, which PEFT leaves trainable by mistake."""
    return {n: p for n, p in peft_model.named_parameters() if p.requires_grad and ".ranknum." not in n}


def initialise_by_data(
    peft_model: PeftModel, model: PreTrainedModel, examples: Sequence[Encoded], task: Task
) -> None:
    """EVA (Paischer et al. 2024): the first training examples' inputs to each layer give its A and its rank."""
    chosen = examples[:EVA_EXAMPLES]
    if task == "classification" and len(chosen) < EVA_EXAMPLES:
        raise RankraceError(
            f"EVA needs {EVA_EXAMPLES} training examples, and there are {len(chosen)}",
            why="a pooler sees one vector an example, and PEFT would go through them for ever",
            fix="give more rows, or leave the method out",
        )

    compared: set[str] = set()

    def layer_inputs(inputs: Any, places: Tensor, name: str) -> Tensor:
        """The rows of real tokens; a pooler's input has none but such."""
        x = inputs if isinstance(inputs, Tensor) else inputs[0]
        rows = x if x.dim() == 2 else x[places.T.unbind()]
        # PEFT's first pass only compares layers, by the hash of a tuple of all numbers: seconds on any device.
        most = EVA_INPUTS if name in compared else COMPARED
        compared.add(name)
        return rows[:: -(-len(rows) // most)].contiguous()

    initialize_lora_eva_weights(
        peft_model,
        [padded(chosen)],
        forward_fn=lambda _, batch: model.base_model(**batch),  # the head has no adapter
        prepare_layer_inputs_fn=layer_inputs,
        show_progress_bar=False,
    )
    for p in trainable(peft_model).values():
        p.data = p.data.to(model.dtype)


def padded(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """Examples as Transformers' own inputs, padded on the right."""

    def grid(rows: list[Any], filler: int) -> Tensor:
        return pad_sequence([torch.as_tensor(row).long() for row in rows], batch_first=True, padding_value=filler)

    batch = {
        "input_ids": grid([e.input_ids for e in examples], 0),
        "attention_mask": grid([[1] * len(e) for e in examples], 0),
    }
    if all(e.token_types is not None for e in examples):
        batch["token_type_ids"] = grid([e.token_types for e in examples], 0)
    return batch
