"""Ordinary parameters of a model as the loop's only candidate.

Shapes: P trainable values.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankrace.bank.flat import Flat


class Parameters:
    """K = 1: the parameters given train, with masters in full precision; all others are frozen.

    The model computes with its own parameters, in its own type, as it does under a bank. Their gradients are moved to
    the masters' as soon as autograd has them, so that several passes add up in full precision.

    Args:
        model: the one that runs; adapters and the like are part of it already.
        parameters: of the model, by name.
    """

    dropout = 0.0
    running = 1

    def __init__(self, model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model = model
        self.trained = dict(parameters)
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        shapes = {name: p.shape for name, p in self.trained.items()}
        self.values, self.gradients = (Flat(shapes, 1, dtype=self.dtype, device=self.device) for _ in range(2))
        model.requires_grad_(False)
        for name, p in self.trained.items():
            master = self.values.views[name][0]
            master.copy_(p.detach())
            if p.dtype == self.dtype:
                p.data = master
            p.requires_grad_(True)
            p.register_post_accumulate_grad_hook(self._mover(self.gradients.views[name][0]))

    @staticmethod
    def _mover(total: Tensor) -> Callable[[Tensor], None]:
        def move(p: Tensor) -> None:
            assert p.grad is not None
            total.add_(p.grad)
            p.grad = None

        return move

    @property
    def device(self) -> torch.device:
        return self.model.device

    def find_siblings(self, run: Callable[[], Any]) -> None:
        """The model's own layers, PEFT's too, compute each by itself."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Masters → what the model computes with, where that is another tensor."""
        pairs = [(p, self.values.views[n][0]) for n, p in self.trained.items() if p.dtype != self.dtype]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [x for _, x in pairs])  # pyright: ignore[reportPrivateImportUsage]

    def load(self, values: Tensor) -> None:
        """Trained values [1, P] of a checkpoint."""
        self.values.all_KP.copy_(values)
        self.refresh()

    @contextmanager
    def only(self, active: slice) -> Iterator[None]:
        assert active == slice(0, 1)
        yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Nothing is switched off: before the first step the trained model is the base."""
        yield

    @contextmanager
    def training(self, step: int, micro: int) -> Iterator[None]:
        """No dropout, for any method."""
        yield
