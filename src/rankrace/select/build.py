"""From a configuration to a strategy."""

from collections.abc import Sequence

from rankrace.bank import Bank
from rankrace.config import RunConfig
from rankrace.select.grid import Grid
from rankrace.select.objective import Objective, Penalty, linear_penalty, log2_penalty
from rankrace.select.opening import Opening
from rankrace.select.race import Race
from rankrace.select.shrink import Shrink
from rankrace.select.strategy import Strategy

SHARES = {"quality": 0.01, "balanced": 0.04, "small": 0.08}
"""What part of what rank buys a smaller rank may lose. 4% finds planted ranks; with 2% the pick is often too large,
with 8% too small, and one standard error alone mostly takes the largest (docs/planted.md)."""


def make_strategy(
    config: RunConfig, total: int, bank: Bank, fractions: Sequence[float], penalty: Penalty
) -> Strategy:
    """Args:
    total: steps of the training.
    fractions: when shrink looks, as shares of it.
    """
    objective = Objective(penalty=penalty, rule=config.rule, share=SHARES[config.prefer])
    ranks = tuple(sorted(set(config.ranks)))
    wide = min(2 * ranks[-1], bank.largest_rank)
    if config.strategy == "grid":
        at = max(1, round(config.search_fraction * total))
        return Grid(ranks=ranks, look_step=at, refine=config.refine, objective=objective)
    if config.strategy == "race":
        strategy: Strategy = Race(
            total_steps=total, wide=wide, ranks=ranks, refine=config.refine, objective=objective
        )
    else:
        strategy = Shrink(
            total_steps=total,
            wide=wide,
            largest=ranks[-1],
            refine=config.refine,
            objective=objective,
            fractions=tuple(fractions),
            layers=config.layer_ranks == "pooled",
        )
    scales = tuple(sorted({1.0, *config.lr_scales}))
    if len(scales) == 1 and not config.twin:
        return strategy
    first = strategy.next_look([])
    assert first is not None
    return Opening(inner=strategy, scales=scales, twin=config.twin, look_step=first, objective=objective)


def penalty_of(config: RunConfig, bank: Bank) -> Penalty:
    """What the configuration charges for a rank."""
    match config.penalty:
        case "log2":
            return log2_penalty(config.kappa)
        case "parameters":
            return linear_penalty(
                config.penalty_weight, lambda r: bank.trainable_parameters(r) / bank.base_parameters
            )
        case "bytes":
            size = bank.dtype.itemsize  # as the adapter is written
            return linear_penalty(config.penalty_weight, lambda r: bank.trainable_parameters(r) * size)
