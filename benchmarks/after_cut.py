"""What a cut of the rank does to the training that follows, and which part of it is the learning rate.

    python -m benchmarks.after_cut --model SMOLLM2_FOLDER --data DATA --tasks gsm8k,squad2 --seeds 0 --lrs 1,2

One wide candidate trains to CUT of the training. From there all arms train on side by side, on the same batches, and
are measured on the same held-out examples at each look:

- kept: the wide one as it is; balanced: the same update in balanced factors (a cut to its own rank);
- cut-r: the best rank-r approximation, multiplier α/r, Adam's moments carried over;
- same-r: the same with the learning rate times √(r/wide), so that a step changes ΔW as much as before the cut: with
  balanced factors a step of size η moves ΔW by s·η·√(S/s) = η·√(s·S), and s = α/r;
- fast-r: the balanced wide one with the learning rate times √(wide/r), the gain in speed of a cut without the cut;
- pooled-r: the singular values of all layers in one pool, the largest kept within the budget of rank r;
  weighted-r: the same, each value weighted by the size of its layer's inputs.

A unit is one JSON file; units that are there already are skipped. Each fresh example's own loss is kept.

Shapes: K arms.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from benchmarks.early_looks import ALPHA, Study, described, ended
from rankrace.bank import Candidates, Spectrum, carried
from rankrace.config import RunConfig

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


def arms(study: Study, whole: Mapping[str, Spectrum]) -> list[Arm]:
    weights = input_sizes(study)
    plain = dict.fromkeys(weights, 1.0)
    return [
        Arm(name="balanced", rank=WIDE),
        *(Arm(name=f"cut-{r}", rank=r) for r in (1, 2, 4, 8, 16, 32)),
        *(Arm(name=f"same-{r}", rank=r, rate=(r / WIDE) ** 0.5) for r in (4, 16)),
        Arm(name="fast-4", rank=WIDE, rate=(WIDE / 4) ** 0.5),
        *(Arm(name=f"pooled-{r}", rank=r, allocation=pooled(study, whole, plain, r)) for r in (4, 16)),
        Arm(name="weighted-4", rank=4, allocation=pooled(study, whole, weights, 4)),
    ]


def input_sizes(study: Study) -> dict[str, float]:
    """E‖x‖²/D of each adapted layer's input, on some training examples, base model."""
    sizes: dict[str, float] = {}

    def reader(name: str) -> Any:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes[name] = args[0].float().square().mean().item()

        return read

    model, bank = study.trainer.model, study.bank
    hooks = [layer.register_forward_pre_hook(reader(name)) for name, layer in bank.layers.items()]
    with torch.no_grad(), bank.off():
        model.losses(model.pack(study.trainer.train, range(16)))
    for hook in hooks:
        hook.remove()
    return sizes


def pooled(study: Study, whole: Mapping[str, Spectrum], weights: Mapping[str, float], rank: int) -> dict[str, int]:
    """The largest weight·S² per parameter of all layers, as many as rank `rank` everywhere has parameters."""
    cost = {n: layer.d_in + layer.d_out for n, layer in study.bank.layers.items()}
    values = [(weights[n] * s**2 / cost[n], n) for n in whole for s in whole[n].S_R.tolist()]
    left, ranks = rank * sum(cost.values()), dict.fromkeys(whole, 0)
    for _, name in sorted(values, reverse=True):
        if cost[name] > left:
            break
        left -= cost[name]
        ranks[name] += 1
    return ranks


def cut(study: Study, wide: Candidates, whole: Mapping[str, Spectrum], arm: Arm) -> tuple[Candidates, Any, Any]:
    """The arm's candidate and its moments, padded to the wide rank."""
    optimizer = study.trainer.optimizer
    kept = arm.rank if arm.allocation is None else max(arm.allocation.values())
    c = wide.truncations(0, [kept], [ALPHA / arm.rank], whole)
    mean, square = carried(wide, 0, whole, c, optimizer.mean.views, optimizer.square.views)
    if arm.allocation is not None:
        for name, r in arm.allocation.items():
            for tensors in (c.tensors(), mean, square):
                tensors[f"{name}.A"][:, r:] = 0
                tensors[f"{name}.B"][:, :, r:] = 0
    return c, mean, square


def widened(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with zeros up to the shapes of `like`."""
    new = {n: torch.zeros_like(like[n][:1]) for n in tensors}
    for n, t in tensors.items():
        new[n][:, : t.shape[1], : t.shape[2]] = t
    return new


def stack(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}


def run(study: Study) -> dict[str, Any]:
    began = time.perf_counter()
    trainer, bank = study.trainer, study.bank
    bank.start([WIDE], [ALPHA / WIDE])
    trainer.start(bank.candidates, [study.lr])
    for _ in trainer.run(round(CUT * trainer.total)):
        pass
    wide, optimizer = bank.candidates.keep([0]), trainer.optimizer
    whole = wide.spectra(0)
    cuts = arms(study, whole)
    parts = [(wide, optimizer.mean.views, optimizer.square.views), *(cut(study, wide, whole, a) for a in cuts)]
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
    trainer.start(candidates, [study.lr * a.rate for a in all_arms])
    trainer.optimizer.resume(*moments, updates=updates)
    looks = []
    for share in LOOKS:
        for _ in trainer.run(round(share * trainer.total)):
            pass
        direct = described(trainer.measure(study.looked), study.cluster_N)
        looks.append({"share": share, "step": trainer.step, "direct": direct})
    return {
        "task": study.name,
        "seed": study.config.seed,
        "lr": study.lr,
        "lr_scale": study.scale,
        "alpha": ALPHA,
        "steps": trainer.total,
        "cut_at": CUT,
        "arms": [a.name for a in all_arms],
        "allocations": {a.name: a.allocation for a in cuts if a.allocation is not None},
        "spectra": {n: [round(float(x), 5) for x in s.S_R] for n, s in whole.items()},
        "looks": looks,
        "fresh": ended(trainer.measure(study.fresh)),
        "fresh_tokens": [int(n) for n in trainer.measure(study.fresh).tokens_N],
        "fresh_cluster": [int(e.group) for e in study.fresh],
        "data_sha256": study.data.sha256,
        "seconds": time.perf_counter() - began,
        "device": torch.cuda.get_device_name() if study.config.device == "cuda" else "cpu",
        "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path, help="the folder with all tasks' files")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--lrs", default="1", help="multiples of the default learning rate")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train-max", type=int, default=6400)
    parser.add_argument("--micro-tokens", type=int, default=20480)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds after which no new unit starts")
    parser.add_argument("--out", type=Path, default=Path("results/selection/after_cut"))
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    units = [
        (s, lr, n) for s in given.seeds.split(",") for lr in given.lrs.split(",") for n in given.tasks.split(",")
    ]
    for seed, lr, name in units:
        file = given.out / f"{name}-seed{seed}-lr{float(lr):g}.json"
        if file.exists():
            continue
        if time.perf_counter() - began > given.stop_after:
            return
        config = RunConfig(
            model=given.model,
            data=name,
            seed=int(seed),
            max_steps=given.steps,
            epochs=100,
            train_max=given.train_max,
            validation_max=768,
            micro_tokens=given.micro_tokens,
            device=given.device,
        )
        study = Study(name, given.data, config, float(lr), not given.no_compile)
        done = run(study)
        done["command"] = (
            f"python -m benchmarks.after_cut --tasks {name} --seeds {seed} --lrs {lr} --steps {given.steps} "
            f"--train-max {given.train_max}"
        )
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(done) + "\n")
        partial.rename(file)
        curve = ", ".join(f"{a} {x:.4f}" for a, x in zip(done["arms"], done["fresh"]["loss"], strict=True))
        print(f"{file.name}: {done['seconds']:.0f} s, {curve}", flush=True)
        del study


if __name__ == "__main__":
    main()
