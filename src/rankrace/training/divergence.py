"""A training that has diverged is stopped."""

from collections.abc import Sequence

from rankrace.errors import RankraceError


def alarm_if_diverged(losses: Sequence[float], step: int) -> None:
    """Raises RankraceError if no candidate has a finite loss any more."""
    if all(loss != loss or abs(loss) == float("inf") for loss in losses):
        raise RankraceError(
            f"the training diverged: at step {step} no loss is a finite number",
            why="nothing that follows could be of use",
            fix="lower --lr (in another --out)",
        )
