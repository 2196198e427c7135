"""What a cut of the rank does to the training that follows, and which part of it is the learning rate.

    python -m benchmarks.after_cut --model SMOLLM2_FOLDER --data DATA --units gsm8k:0,squad2:0 --lr-scale 2
    python -m benchmarks.after_cut … --arms rates --out results/selection/after_cut_rates

One wide candidate trains to CUT of the training. From there all arms train on side by side, on the same batches, and
are measured on the same held-out examples at each look:

- kept: the wide one as it is; balanced: the same update in balanced factors (a cut to its own rank);
- cut-r: the best rank-r approximation, multiplier α/r, Adam's moments carried over;
- same-r: the same with the learning rate times √(r/wide), so that a step changes ΔW as much as before the cut: with
  balanced factors a step of size η moves ΔW by s·η·√(S/s) = η·√(s·S), and s = α/r;
- fast-r: the balanced wide one with the learning rate times √(wide/r), the gain in speed of a cut without the cut;
- pooled-r: the singular values of all layers in one pool, the largest kept within the budget of rank r;
  weighted-r: the same, each value weighted by the size of its layer's inputs.

`--arms rates`: cuts alone, and each with the learning rate times (r/16)^¼ (cool-r) or √(r/16) (cold-r), since small
ranks stand less of a rate than large ones; forgot-r: without Adam's moments.

One JSON file a unit and learning rate (benchmarks/study.py).

Shapes: K arms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.study import ALPHA, Study, arguments, described, ended, run_units
from rankrace.bank import Bank, Candidates, Spectrum, allocate, carried
from rankrace.training.loop import Trainer

WIDE = 64
CUT = 0.15
LOOKS = (0.15, 0.1625, 0.175, 0.2, 0.25, 0.3, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Arm:
    name: str
    rank: int
    """Whose multiplier, and for pooled ones whose budget, it has."""
    rate: float = 1.0
    allocation: Mapping[str, int] | None = None
    forgets: bool = False
    """Adam's moments are zero after the cut, its count of updates is not: small steps first, a warm-up of its own."""


def arms(trainer: Trainer[Bank], whole: Mapping[str, Spectrum]) -> list[Arm]:
    """Those of `--arms cuts`."""
    model, bank = trainer.model, trainer.bank
    weights = bank.input_sizes(lambda: model.losses(model.pack(trainer.train, range(16))))
    costs, all_of_one = bank.costs, sum(bank.costs.values())
    return [
        Arm(name="balanced", rank=WIDE),
        *(Arm(name=f"cut-{r}", rank=r) for r in (1, 2, 4, 8, 16, 32)),
        *(Arm(name=f"same-{r}", rank=r, rate=(r / WIDE) ** 0.5) for r in (4, 16)),
        Arm(name="fast-4", rank=WIDE, rate=(WIDE / 4) ** 0.5),
        *(Arm(name=f"pooled-{r}", rank=r, allocation=allocate(whole, costs, r * all_of_one)) for r in (4, 16)),
        Arm(name="weighted-4", rank=4, allocation=allocate(whole, costs, 4 * all_of_one, weights)),
    ]


def rates(trainer: Trainer[Bank], whole: Mapping[str, Spectrum]) -> list[Arm]:
    """Those of `--arms rates`."""
    small = (1, 2, 4, 8)
    return [
        *(Arm(name=f"cut-{r}", rank=r) for r in (*small, 16)),
        *(Arm(name=f"cool-{r}", rank=r, rate=(r / 16) ** 0.25) for r in small),
        *(Arm(name=f"cold-{r}", rank=r, rate=(r / 16) ** 0.5) for r in small),
        *(Arm(name=f"forgot-{r}", rank=r, forgets=True) for r in (4, 16)),
    ]


ARMS = {"cuts": arms, "rates": rates}


def cut(
    trainer: Trainer[Bank], wide: Candidates, whole: Mapping[str, Spectrum], arm: Arm
) -> tuple[Candidates, Any, Any]:
    """The arm's candidate and its moments."""
    optimizer = trainer.optimizer
    c = wide.truncations(0, [arm.rank], [ALPHA / arm.rank], whole, [arm.allocation])
    mean, square = carried(wide, 0, whole, c, optimizer.mean.views, optimizer.square.views)
    if arm.forgets:
        mean, square = ({name: torch.zeros_like(t) for name, t in each.items()} for each in (mean, square))
    return c, mean, square


def widened(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with zeros up to the shapes of `like`."""
    new = {n: torch.zeros_like(like[n][:1]) for n in tensors}
    for n, t in tensors.items():
        new[n][:, : t.shape[1], : t.shape[2]] = t
    return new


def stack(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}


def run(study: Study, scale: float, chosen: str) -> dict[str, Any]:
    trainer, lr = study.trainer(), study.lr * scale
    bank = trainer.bank
    bank.start([WIDE], [ALPHA / WIDE])
    trainer.start(bank.candidates, [lr])
    for _ in trainer.run(round(CUT * trainer.total)):
        pass
    wide, optimizer = bank.candidates.keep([0]), trainer.optimizer
    whole = wide.spectra(0)
    cuts = ARMS[chosen](trainer, whole)
    parts = [(wide, optimizer.mean.views, optimizer.square.views), *(cut(trainer, wide, whole, a) for a in cuts)]
    values, means, squares = zip(*((c.tensors(), m, s) for c, m, s in parts), strict=True)
    like = wide.tensors()
    all_arms = [Arm(name="kept", rank=WIDE), *cuts]
    candidates = Candidates(
        ranks=(WIDE,) * len(all_arms),  # of the memory; padding beyond an arm's own rank stays zero
        multipliers=tuple(ALPHA / a.rank for a in all_arms),
        factors=wide.factors,
        heads={},
    ).with_tensors(stack([widened(v, like) for v in values]))
    updates = optimizer.updates
    moments = [stack([widened(m, like) for m in each]) for each in (means, squares)]
    trainer.start(candidates, [lr * a.rate for a in all_arms])
    trainer.optimizer.resume(*moments, updates=updates)
    looks = []
    for share in LOOKS:
        for _ in trainer.run(round(share * trainer.total)):
            pass
        direct = described(trainer.measure(study.looked), study.cluster_N)
        looks.append({"share": share, "step": trainer.step, "direct": direct})
    fresh = trainer.measure(study.fresh)
    return {
        **study.record(fresh.tokens_N),
        "lr": lr,
        "lr_scale": scale,
        "cut_at": CUT,
        "arms": [a.name for a in all_arms],
        "allocations": {a.name: a.allocation for a in cuts if a.allocation is not None},
        "spectra": {n: [round(float(x), 5) for x in s.S_R] for n, s in whole.items()},
        "looks": looks,
        "fresh": ended(fresh),
    }


def main() -> None:
    parser = arguments(__doc__, "results/selection/after_cut")
    parser.add_argument("--lr-scale", type=float, default=1.0, help="times the default learning rate")
    parser.add_argument("--arms", choices=ARMS, default="cuts")
    given = parser.parse_args()
    scale, chosen = given.lr_scale, given.arms
    run_units(
        given,
        "benchmarks.after_cut",
        lambda study: run(study, scale, chosen),
        kind=f"-lr{scale:g}",
        options=f" --lr-scale {scale:g} --arms {chosen}",
    )


if __name__ == "__main__":
    main()
