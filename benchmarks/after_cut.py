"""What a cut of the rank does to the training that follows, and which part of it is the learning rate.

    python -m benchmarks.after_cut --model SMOLLM2_FOLDER --data DATA --units gsm8k:0,squad2:0 --lr-scale 2
    python -m benchmarks.after_cut … --arms rates --out results/selection/after_cut_rates
    python -m benchmarks.after_cut … --arms ways --out results/selection/after_cut_ways

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

`--arms ways`, to ranks 4 and 16: cut-r; warm-r: the learning rate rises anew from 0 over WARM of the training;
fresh-r: that, and without Adam's moments; late-r: cut at LATE of the training instead; stages-4: to 16, and to 4 at
LATE.

One JSON file a unit and learning rate (benchmarks/study.py).

Shapes: K arms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.study import ALPHA, Study, arguments, described, ended, run_units
from rankrace.bank import Bank, Candidates, Spectrum, allocate, carried
from rankrace.training.loop import Trainer
from rankrace.training.optimizer import BankAdamW

WIDE = 64
CUT, LATE = 0.15, 0.30
WARM = 0.05
LOOKS = (0.15, 0.1625, 0.175, 0.2, 0.25, LATE, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Arm:
    name: str
    rank: int
    """Whose multiplier, and for pooled ones whose budget, it has."""
    rate: float = 1.0
    allocation: Mapping[str, int] | None = None
    forgets: bool = False
    """Adam's moments are zero after the cut, its count of updates is not: small steps first, a warm-up of its own."""
    warms: bool = False
    """The learning rate rises anew after the cut."""
    later: int | None = None
    """The rank that it is cut to at LATE, the first time or again."""

    @property
    def whole(self) -> bool:
        """It is not cut at CUT."""
        return self.name == "kept" or self.name.startswith("late")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One arm's candidate, and Adam's moments of it."""

    candidate: Candidates
    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]


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


def ways(trainer: Trainer[Bank], whole: Mapping[str, Spectrum]) -> list[Arm]:
    """Those of `--arms ways`."""
    return [
        *(Arm(name=f"cut-{r}", rank=r) for r in (4, 16)),
        *(Arm(name=f"warm-{r}", rank=r, warms=True) for r in (4, 16)),
        *(Arm(name=f"fresh-{r}", rank=r, warms=True, forgets=True) for r in (4, 16)),
        *(Arm(name=f"late-{r}", rank=WIDE, later=r) for r in (4, 16)),
        Arm(name="stages-4", rank=16, later=4),
    ]


ARMS = {"cuts": arms, "rates": rates, "ways": ways}


def parts(trainer: Trainer[Bank], index: int, all_cuts: Sequence[Arm | None]) -> list[Part]:
    """One present candidate, once as it is for each None and once cut for each arm.

    The arm's rank is that of the cut: see `again`.
    """
    present, optimizer = trainer.bank.candidates, trainer.optimizer
    assert isinstance(optimizer, BankAdamW)
    moments = optimizer.mean.views, optimizer.square.views
    whole = present.spectra(index) if any(arm is not None for arm in all_cuts) else {}
    found = []
    for arm in all_cuts:
        if arm is None:
            mean, square = ({n: t[[index]].clone() for n, t in each.items()} for each in moments)
            found.append(Part(candidate=present.keep([index]), mean=mean, square=square))
            continue
        cut = present.truncations(index, [arm.rank], [ALPHA / arm.rank], whole, [arm.allocation])
        mean, square = carried(present, index, whole, cut, *moments)
        if arm.forgets:
            mean, square = ({name: torch.zeros_like(t) for name, t in each.items()} for each in (mean, square))
        found.append(Part(candidate=cut, mean=mean, square=square))
    return found


def side_by_side(trainer: Trainer[Bank], all_parts: Sequence[Part], lr_K: Sequence[float]) -> None:
    """Lets them train on, with the present count of updates."""
    before, first = trainer.optimizer, all_parts[0].candidate
    assert isinstance(before, BankAdamW)
    like = first.tensors()
    values, means, squares = (
        stack([widened(tensors, like) for tensors in each])
        for each in zip(*((p.candidate.tensors(), p.mean, p.square) for p in all_parts), strict=True)
    )
    candidates = Candidates(
        ranks=(WIDE,) * len(all_parts),  # of the memory; padding beyond an arm's own rank stays zero
        multipliers=tuple(p.candidate.multipliers[0] for p in all_parts),
        factors=first.factors,
        heads={},
    ).with_tensors(values)
    trainer.start(candidates, lr_K)
    assert isinstance(trainer.optimizer, BankAdamW)
    trainer.optimizer.resume(means, squares, updates=before.updates)


def again(trainer: Trainer[Bank], all_arms: Sequence[Arm]) -> None:
    """At LATE: the arms with a later rank are cut to it, the others go on as they are."""
    cuts = [None if a.later is None else replace(a, rank=a.later, allocation=None, forgets=False) for a in all_arms]
    found = [part for k, arm in enumerate(cuts) for part in parts(trainer, k, [arm])]
    side_by_side(trainer, found, trainer.lr_K)


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
    whole = bank.candidates.spectra(0)
    all_arms = [Arm(name="kept", rank=WIDE), *ARMS[chosen](trainer, whole)]
    singular_values = {n: [round(float(x), 5) for x in s.S_R] for n, s in whole.items()}
    del whole  # of factors that train on
    lr_K = [lr * a.rate for a in all_arms]
    side_by_side(trainer, parts(trainer, 0, [None if a.whole else a for a in all_arms]), lr_K)
    looks, cut_at, warm = [], trainer.step, round(WARM * trainer.total)
    for share in LOOKS:
        until = round(share * trainer.total)
        while trainer.step < until:
            risen = min(1.0, (trainer.step - cut_at + 1) / max(1, warm))
            trainer.lr_K = tuple(x * (risen if a.warms else 1.0) for x, a in zip(lr_K, all_arms, strict=True))
            for _ in trainer.run(trainer.step + 1):
                pass
        if share == LATE and any(a.later for a in all_arms):
            again(trainer, all_arms)
        direct = described(trainer.measure(study.looked), study.cluster_N)
        looks.append({"share": share, "step": trainer.step, "direct": direct})
    fresh = trainer.measure(study.fresh)
    return {
        **study.record(fresh.tokens_N),
        "lr": lr,
        "lr_scale": scale,
        "cut_at": CUT,
        "arms": [a.name for a in all_arms],
        "allocations": {a.name: a.allocation for a in all_arms if a.allocation is not None},
        "spectra": singular_values,
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
    )


if __name__ == "__main__":
    main()
