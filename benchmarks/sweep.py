"""The truth about ranks and learning rates, and whether an early look tells it: all of them side by side, to the end.

    python -m benchmarks.sweep --model SMOLLM2_FOLDER --data DATA --units gsm8k:0,squad2:0

For each task and seed every rank, each at several learning rates, trains from the start to the end: the same batches,
nested initial factors, the same held-out examples. At each look all of these arms are measured as they are (direct)
and as the average of their values so far (train/average.py: what `--lr-scales` compares), and the largest rank of
each learning rate as it is cut to the smaller ones (truncated: what `shrink` reads).

One JSON file a unit (benchmarks/study.py). Shapes: K arms.
"""

from typing import Any

from benchmarks.study import Study, arguments, described, ended, multipliers, run_units
from rankrace.bank import Bank, Candidates
from rankrace.training.loop import Trainer

RANKS = (1, 2, 4, 8, 12, 16, 32, 64)
WIDE = len(RANKS) - 1
RATES = {"gsm8k": (1.0, 2.0, 4.0), "squad2": (1.0, 2.0, 4.0), "scitldr": (1.0, 2.0, 4.0)}
"""Multiples of the default; the tasks of generated text like higher ones (results/selection/first/*-rates.json)."""
OTHER_RATES = (0.5, 1.0, 2.0)
LOOKS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


def run(study: Study) -> dict[str, Any]:
    rates = RATES.get(study.name, OTHER_RATES)
    arms = [(r, x) for x in rates for r in RANKS]
    ranks = [r for r, _ in arms]
    trainer = study.trainer()
    bank = trainer.bank
    with bank.off():
        base = trainer.measure(study.looked)
    bank.start(ranks, multipliers(ranks))
    trainer.begin([study.lr * x for _, x in arms])
    trainer.follow()
    looks = []
    for share in LOOKS:
        for _ in trainer.run(max(1, round(share * trainer.total))):
            pass
        looks.append({"share": share, "step": trainer.step, **look(study, trainer, len(rates))})
    fresh = trainer.measure(study.fresh)
    return {
        **study.record(fresh.tokens_N),
        "ranks": ranks,
        "rates": [x for _, x in arms],
        "base_loss": float(base.mean_K[0]),
        "looks": looks,
        "fresh": ended(fresh),
        "training_s": trainer.seconds,
    }


def look(study: Study, trainer: Trainer[Bank], rates: int) -> dict[str, Any]:
    """All arms, as they are, averaged, and cut."""
    bank = trainer.bank
    found = {"direct": described(trainer.measure(study.looked), study.cluster_N)}
    with trainer.averaged():
        found["averaged"] = described(trainer.measure(study.looked), study.cluster_N)
    for i in range(rates):
        with bank.borrowed(cuts(bank, i * len(RANKS) + WIDE)):
            found[f"truncated-{i}"] = described(trainer.measure(study.looked), study.cluster_N)
    return found


def cuts(bank: Bank, index: int) -> Candidates:
    """One of the widest arms at all smaller ranks."""
    return bank.candidates.truncations(index, RANKS[:WIDE], multipliers(RANKS[:WIDE]))


def main() -> None:
    run_units(arguments(__doc__, "results/selection/sweep").parse_args(), "benchmarks.sweep", run)


if __name__ == "__main__":
    main()
