"""From a configuration to a strategy."""

from collections.abc import Sequence

from rankrace.bank import Bank
from rankrace.config import Rule, RunConfig
from rankrace.select import opening, race
from rankrace.select.grid import Grid
from rankrace.select.learning_rate import rates_tried
from rankrace.select.objective import Objective, Penalty, linear_penalty, log2_penalty
from rankrace.select.race import Race
from rankrace.select.shrink import Shrink
from rankrace.select.strategy import Strategy

SHARES = {"quality": 0.01, "balanced": 0.04, "small": 0.08}
"""What part of what rank buys a smaller rank may lose. 4% finds planted ranks; with 2% the pick is often too large,
with 8% too small, and one standard error alone mostly takes the largest (docs/planted.md)."""


def rule_of(config: RunConfig) -> Rule:
    """What auto stands for.

    The lowest of ten noisy points is ahead of most others by one error as a rule. So one error takes ranks twice as
    large as two do, and they end no better (docs/selection.md).
    """
    if config.rule != "auto":
        return config.rule
    return "one_se" if config.prefer == "quality" else "two_se"


def make_strategy(
    config: RunConfig, total: int, bank: Bank, fractions: Sequence[float], penalty: Penalty
) -> Strategy:
    """Args:
    total: steps of the training.
    fractions: when shrink looks, as shares of it.
    """
    objective = Objective(penalty=penalty, rule=rule_of(config), share=SHARES[config.prefer])
    ranks = tuple(sorted(set(config.ranks)))
    wide = widest(ranks[-1], bank)
    if config.strategy == "grid":
        at = max(1, round(config.search_fraction * total))
        return Grid(ranks=ranks, look_step=at, refine=config.refine, objective=objective)
    opened = opens(config)
    earliest = opening.SHARE if opened else 0.0
    strategy: Strategy
    if config.strategy == "race":
        strategy = Race(
            total_steps=total,
            wide=wide,
            ranks=ranks,
            refine=config.refine,
            objective=objective,
            probe_share=max(race.PROBE, earliest),
        )
    else:
        strategy = Shrink(
            total_steps=total,
            wide=wide,
            largest=ranks[-1],
            refine=config.refine,
            objective=objective,
            fractions=tuple(f for f in fractions if f >= earliest),
            layers=config.layer_ranks == "pooled",
        )
    if not opened:
        return strategy
    first = strategy.next_look([])
    assert first is not None
    step = min(first, max(1, round(opening.SHARE * total)))
    scales = rates_tried(config.lr_scales)
    return opening.Opening(
        inner=strategy, scales=scales, twin=config.twin, look_step=step, total_steps=total, objective=objective
    )


def opens(config: RunConfig) -> bool:
    """Whether several candidates of one rank begin, of which an opening keeps one."""
    return config.strategy != "grid" and (len(rates_tried(config.lr_scales)) > 1 or config.twin)


def widest(largest: int, bank: Bank) -> int:
    """The rank from which others are cut: twice the largest that may be picked, where there is such a rank."""
    return min(2 * largest, bank.largest_rank)


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
