"""AdaLoRA (Zhang et al. 2023) as PEFT implements it: singular values are masked until the budget is met."""

from collections.abc import Sequence

import torch
from peft import AdaLoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from rankrace.bank.flat import Flat
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Task
from rankrace.methods.fixed import Fixed
from rankrace.methods.method import Anywhere, Running
from rankrace.methods.parameters import Parameters
from rankrace.methods.peft_lora import shared, trainable, wrapped
from rankrace.select.learning_rate import default_lr
from rankrace.training.loop import Trainer
from rankrace.training.optimizer import Optimizer
from rankrace.training.schedule import steps_of

WARM, TAIL = 0.1, 0.3
"""The shares of the steps before the first and after the last change of the budget."""
EVERY = 100
"""Changes of the budget in a run, at most one a step."""


class AdaLora(Anywhere):
    """Starts at 1.5 times the rank that its budget comes to, PEFT's own ratio."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = f"adalora-r{rank}"

    def default_lr(self, width: int, config: RunConfig) -> float:
        return default_lr(width)

    def prepare(self, config: RunConfig, data: Data, model: PreTrainedModel, task: Task) -> Running:
        _, total = steps_of(len(data.train), config.batch_size, config.epochs, config.max_steps)
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
        trained = Parameters(model, trainable(wrapped(model, settings, config.seed)))

        def allocating(own: Optimizer, trainer: Trainer[Parameters]) -> Optimizer:
            return Allocating(own, trained, settings)

        return Fixed(config, data, trained, task, rank=self.rank, optimizer=allocating,
                     delivered=lambda: in_use(trained))  # fmt: skip


class Alike:
    """Factors of one shape in L of the layers: A [R, D], or B [D, R] turned over."""

    def __init__(self, names: Sequence[str], layers: Tensor, transposed: bool) -> None:
        self.names, self.layers_L, self.transposed = names, layers, transposed

    def of(self, flat: Flat) -> Tensor:
        """[L, R, D]"""
        stacked = torch.stack([flat.views[name][0] for name in self.names])
        return stacked.mT if self.transposed else stacked

    def add(self, flat: Flat, x_LRD: Tensor) -> None:
        x = x_LRD.mT.contiguous() if self.transposed else x_LRD
        views = [flat.views[name][0] for name in self.names]
        torch._foreach_add_(views, list(x.unbind()))  # pyright: ignore[reportPrivateImportUsage]


class Allocating:
    """An optimiser that adds the penalty on factors that are not orthogonal, and masks singular values after a step.

    As PEFT's AdaLoraModel and RankAllocator do it, which are not called: they go from layer to layer, in thousands of
    kernels and with hundreds of words to the host a step. Here all layers are one tensor, or one a shape. All is done
    on the masters, in full precision: in bfloat16 some scores are equal, and more is masked than the budget says.

    Shapes: L layers, R singular values of each at the start, P trained values.
    """

    def __init__(self, own: Optimizer, trained: Parameters, settings: AdaLoraConfig) -> None:
        self.own, self.trained, self.settings = own, trained, settings
        assert settings.total_step is not None
        self.last = settings.total_step - settings.tfinal
        """The step from which no singular value comes back."""
        values = trained.values
        self.kept, self.importance, self.uncertainty = (Flat.like(values.views) for _ in range(3))
        self.steps = 0
        self.E = [name for name in values.views if ".lora_E" in name]
        self.alike = [*self.of_one_shape("lora_A"), *self.of_one_shape("lora_B")]
        first = values.all_KP.storage_offset()
        starts_L = torch.tensor([values.views[name].storage_offset() - first for name in self.E])
        L, R = len(self.E), values.views[self.E[0]].shape[1]
        self.place_LR = (starts_L[:, None] + torch.arange(R)).to(trained.device)
        """Where the singular values are among all P."""
        self.masked_LR = torch.zeros(L, R, dtype=torch.bool, device=trained.device)

    def of_one_shape(self, which: str) -> list[Alike]:
        found: dict[torch.Size, list[int]] = {}
        names = [name.replace("lora_E", which) for name in self.E]
        for i, name in enumerate(names):
            found.setdefault(self.trained.values.views[name].shape, []).append(i)
        device = self.trained.device
        return [
            Alike([names[i] for i in layers], torch.tensor(layers, device=device), which == "lora_B")
            for layers in found.values()
        ]

    def add_penalty(self) -> None:
        """The gradient of weight · mean over factors of ‖P Pᵀ − I‖_F: 2·weight/n · (P Pᵀ − I) P / ‖P Pᵀ − I‖_F."""
        scale = 2 * self.settings.orth_reg_weight / (2 * len(self.E))
        for alike in self.alike:
            P_LRD = alike.of(self.trained.values)
            off_LRR = P_LRD @ P_LRD.mT - torch.eye(P_LRD.shape[1], dtype=P_LRD.dtype, device=P_LRD.device)
            norm_L = torch.linalg.matrix_norm(off_LRR).clamp_(min=torch.finfo(P_LRD.dtype).tiny)
            off_LRR *= (scale / norm_L)[:, None, None]
            alike.add(self.trained.gradients, off_LRR @ P_LRD)

    @torch.no_grad()
    def step(self, lr_K: Sequence[float]) -> Tensor:
        self.add_penalty()
        self.kept.all_KP.copy_(self.trained.gradients.all_KP)
        norm_K = self.own.step(lr_K)
        self.steps += 1
        s, last = self.settings, self.last
        if self.steps < last:
            self.weigh()
        changes = self.steps == last or (s.tinit < self.steps < last and self.steps % s.deltaT == 0)
        if changes:
            self.masked_LR = self.least(self.over_budget())
        if changes or self.steps > last:
            self.mask()
        return norm_K

    def weigh(self) -> None:
        """Importance |p·∂p|, smoothed, and how much it changes."""
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        now, mean, change = (self.trained.values.all_KP * self.kept.all_KP).abs_(), *self.averages()
        mean.mul_(beta1).add_(now * (1 - beta1))
        change.mul_(beta2).add_((now - mean).abs_() * (1 - beta2))

    def averages(self) -> tuple[Tensor, Tensor]:
        return self.importance.all_KP, self.uncertainty.all_KP

    def over_budget(self) -> int:
        """How many singular values are too many after this step; the budget falls with the cube of what is left."""
        s, (L, R) = self.settings, self.masked_LR.shape
        left = 1 - (self.steps - s.tinit) / (self.last - s.tinit)
        return L * R - int((L * R - s.target_r * L) * left**3 + s.target_r * L)

    def least(self, count: int) -> Tensor:
        """[L, R] bool: those triplets of A, E and B whose mean importance times change is the least."""
        if count == 0:
            return torch.zeros_like(self.masked_LR)
        score = Flat.like(self.trained.values.views)
        torch.mul(*self.averages(), out=score.all_KP)
        score_LR = score.all_KP.new_zeros(self.place_LR.shape)
        for alike in self.alike:
            score_LR.index_add_(0, alike.layers_L, alike.of(score).mean(2))
        score_LR += score.all_KP[0][self.place_LR]
        return score_LR <= score_LR.flatten().kthvalue(count).values

    def mask(self) -> None:
        values_P = self.trained.values.all_KP[0]
        values_P[self.place_LR] = values_P[self.place_LR].masked_fill(self.masked_LR, 0)

    def state(self) -> dict[str, Tensor]:
        importance, uncertainty = self.averages()
        return {**self.own.state(), "importance": importance, "uncertainty": uncertainty, "masked": self.masked_LR,
                "steps": torch.tensor(self.steps)}  # fmt: skip

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.own.load_state(state)
        self.steps = int(state["steps"])
        for tensor, name in zip(self.averages(), ("importance", "uncertainty"), strict=True):
            tensor.copy_(state[name])
        self.masked_LR.copy_(state["masked"])


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
