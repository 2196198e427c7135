"""AdaLoRA (Zhang et al. 2023) as PEFT implements it: singular values are masked until the budget is met."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import AdaLoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankrace.bank.flat import Flat
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.methods.fixed import Fixed
from rankrace.methods.method import PlainLoad, Running
from rankrace.methods.parameters import Parameters
from rankrace.methods.peft_lora import shared, trainable, wrapped
from rankrace.select.learning_rate import default_lr
from rankrace.training.loop import Trainer
from rankrace.training.optimizer import Optimizer

WARM, TAIL = 0.1, 0.3
"""The shares of the steps before the first and after the last change of the budget."""
EVERY = 100
"""Changes of the budget in a run, at most one a step."""


class AdaLora(PlainLoad):
    """Starts at 1.5 times the rank that its budget comes to, PEFT's own ratio."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = f"adalora-r{rank}"

    def default_lr(self, width: int, config: RunConfig) -> float:
        return default_lr(width)

    def prepare(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> Running:
        per_epoch = -(-len(data.train) // config.batch_size)
        total = max(1, round(config.epochs * per_epoch))
        total = total if config.max_steps is None else min(total, config.max_steps)
        settings = AdaLoraConfig(
            init_r=self.rank * 3 // 2,
            target_r=self.rank,
            total_step=total,
            tinit=round(WARM * total),
            tfinal=max(1, round(TAIL * total)),
            deltaT=max(1, total // EVERY),
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            **shared(config, model, task),
        )
        peft_model = wrapped(model, settings, config.seed)
        trained = Parameters(model, trainable(peft_model))

        def allocating(own: Optimizer, trainer: Trainer[Parameters]) -> Optimizer:
            return Allocating(own, trained, peft_model.base_model)

        return Fixed(config, data, trained, task, rank=self.rank, optimizer=allocating,
                     delivered=lambda: in_use(trained))  # fmt: skip


class Allocating:
    """An optimiser that adds the penalty on factors that are not orthogonal, and masks singular values after a step.

    Args:
        tuner: PEFT's AdaLoraModel.
    """

    def __init__(self, own: Optimizer, trained: Parameters, tuner: Any) -> None:
        self.own, self.trained, self.tuner = own, trained, tuner
        self.weight = tuner.peft_config["default"].orth_reg_weight
        self.kept = Flat.like(trained.gradients.views)
        self.steps = 0
        # In place of PEFT's own, which it makes at its first step: a checkpoint has them from the start.
        allocator = tuner.rankallocator
        for store in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
            store |= {n: torch.zeros_like(p) for n, p in self.adapters().items()}

    def adapters(self) -> dict[str, nn.Parameter]:
        """A, B and E of each layer, under the names by which PEFT's allocator knows them."""
        return {n: p for n, p in self.tuner.model.named_parameters() if ".lora_" in n and p.requires_grad}

    def penalty(self) -> Tensor:
        """weight · mean over factors of ‖P Pᵀ − I‖_F, as in PEFT's own forward, which this loop does not call."""
        norms = []
        for name, p in self.adapters().items():
            if ".lora_E" not in name:
                grams = p @ p.T if ".lora_A" in name else p.T @ p
                norms.append(torch.linalg.matrix_norm(grams - torch.eye(len(grams), out=torch.empty_like(grams))))
        return self.weight * torch.stack(norms).mean()

    def step(self, lr_K: Sequence[float]) -> Tensor:
        self.trained.refresh()
        self.penalty().backward()
        self.kept.all_KP.copy_(self.trained.gradients.all_KP)
        norm_K = self.own.step(lr_K)
        self.trained.refresh()
        for name, p in self.trained.trained.items():
            p.grad = self.kept.views[name][0].to(p.dtype)
        self.steps += 1
        self.tuner.update_and_allocate(self.steps)
        for name, p in self.trained.trained.items():
            p.grad = None
            if ".lora_E" in name:
                self.trained.values.views[name][0].masked_fill_(p == 0, 0)
        return norm_K

    def state(self) -> dict[str, Tensor]:
        allocator = self.tuner.rankallocator
        importance = {f"importance.{n}": t for n, t in allocator.exp_avg_ipt.items()}
        uncertainty = {f"uncertainty.{n}": t for n, t in allocator.exp_avg_unc.items()}
        return {**self.own.state(), **importance, **uncertainty, "steps": torch.tensor(self.steps)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.own.load_state(state)
        self.steps = int(state["steps"])
        allocator, device = self.tuner.rankallocator, self.trained.device
        for kind, averages in (("importance.", allocator.exp_avg_ipt), ("uncertainty.", allocator.exp_avg_unc)):
            averages.clear()  # PEFT has forgotten them once the budget is met
            averages |= {n[len(kind) :]: t.to(device) for n, t in state.items() if n.startswith(kind)}
        # The last mask, which PEFT applies again and again near the end.
        self.tuner.peft_config["default"].rank_pattern = {
            n: (p != 0).view(-1).tolist() for n, p in self.adapters().items() if ".lora_E" in n
        }


def in_use(trained: Parameters) -> int:
    """Values of the triplets that are not masked, and of a classifier."""
    count = 0
    for name, value in trained.values.views.items():
        if ".lora_" not in name:
            count += value.numel()
        elif ".lora_E" in name:
            A, B = (trained.values.views[name.replace("lora_E", ab)] for ab in ("lora_A", "lora_B"))
            count += int((value != 0).sum()) * (A.shape[2] + B.shape[1] + 1)
    return count
