"""An average of what is trained, over the later part of its steps.

At a high learning rate the values wander about what they have learnt, and the loss with them; the end of the schedule
takes that away. An average shows early on what would be left: with it a comparison after a tenth or two of the
training puts learning rates in the order of their ends, where the values themselves put the smaller one first
(docs/selection.md). And where rows come back, the average of what the winner was is often better than what it
has become at the end (select/ending.py).

Shapes: K candidates, P trainable values of one candidate.
"""

from collections.abc import Sequence

import torch

from rankrace.bank.flat import Flat

LATENESS = 3
AT_ONCE = 2**22


class Average:
    """m_t = m_{t-1} + (η+1)/(t+η)·(x_t − m_{t-1}), so that step i of t weighs as i^η (Shamir & Zhang 2013).

    With η = 3 the last half of the steps has 15/16 of the weight, at any time and without a window to choose.

    Args:
        values: what is averaged, [K, P].
    """

    def __init__(self, values: Flat) -> None:
        self.values = values
        self.steps = 0
        self.mean = Flat.like(values.views)

    @torch.no_grad()
    def add(self) -> None:
        """Takes in the present values, after a step."""
        self.steps += 1
        self.mean.all_KP.lerp_(self.values.all_KP, (LATENESS + 1) / (self.steps + LATENESS))

    @torch.no_grad()
    def swap(self) -> None:
        """The values and their average change places, some at a time: there is no third of them in between."""
        for values, mean in zip(
            self.values.all_KP.split(AT_ONCE, 1), self.mean.all_KP.split(AT_ONCE, 1), strict=True
        ):
            kept = values.clone()
            values.copy_(mean)
            mean.copy_(kept)

    def keep(self, values: Flat, indices: Sequence[int]) -> "Average":
        """That of the candidates that stay, whose (re-padded) values are given."""
        new = Average(values)
        new.steps, new.mean = self.steps, self.mean.kept(indices, values)
        return new
