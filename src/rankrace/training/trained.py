"""What a loop trains: K candidates of trainable values on one model.

`Bank` is one such thing, with K adapters side by side; `methods.Parameters`, the ordinary parameters of a model, is
another, with K = 1. The loop, its passes and its optimiser know no more of either than this.

Shapes: K candidates, P trainable values of one candidate.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from rankrace.bank.flat import Flat


class Trained(Protocol):
    """Trainable values, and how a pass with them runs."""

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of values and gradients: float32, or float64 on a float64 model."""
        ...

    @property
    def dropout(self) -> float: ...

    @property
    def values(self) -> Flat:
        """[K, P]"""
        ...

    @property
    def gradients(self) -> Flat:
        """[K, P]; a pass adds to them. Other memory here means other candidates."""
        ...

    @property
    def running(self) -> int:
        """How many candidates the next pass runs; the base alone counts as one."""
        ...

    def find_siblings(self, run: Callable[[], Any]) -> None:
        """Told once how to run a pass of the base, so that layers which read one tensor can share its products."""
        ...

    def refresh(self) -> None:
        """Brings what the products use up to date with the values; called before each pass."""
        ...

    def only(self, active: slice) -> AbstractContextManager[None]:
        """Runs these candidates alone."""
        ...

    def off(self) -> AbstractContextManager[None]:
        """Runs the base as it came, as one candidate."""
        ...

    def training(self, step: int, micro: int) -> AbstractContextManager[None]:
        """Dropout on, with the masks of this step and micro-batch."""
        ...


B = TypeVar("B", bound=Trained)
