"""The records of the studies of the rank, of all ages, as one kind of thing each.

Shapes: K arms of one training (ranks × learning rates), N fresh examples.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path("results/selection")
GRID = (2, 4, 8, 16, 32)
"""Ranks that `grid` and `race` start with by default."""
SHRINKS = ("shrink", "shrink-quality", "shrink-one", "shrink-two", "shrink-lr")
"""Arms of benchmarks.adaptive that train one wide candidate and cut it once."""

BEFORE = {"shrink-two": "shrink"} | {name: f"{name}-one" for name in ("shrink", "shrink-lr", "race", "grid")}
"""What arms are called whose record does not say the rule: all but shrink-two went by one_se, then the default."""

Way = Literal["alone", "cut", "own"]
"""Trained at its rank from the start, whoever ran beside it; cut from a wide candidate; any other way."""

Unit = tuple[str, int]
"""Task and seed."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Several arms measured on the same examples."""

    loss_K: np.ndarray
    se_KK: np.ndarray
    """Of all paired differences."""

    def only(self, arms: Sequence[int]) -> "Curve":
        return Curve(loss_K=self.loss_K[arms], se_KK=self.se_KK[np.ix_(arms, arms)])


@dataclass(frozen=True, kw_only=True)
class Look:
    share: float
    """Of the training."""
    direct: Curve
    averaged: Curve | None
    truncated: Mapping[float, Curve]
    """Multiple of the learning rate → its widest arm at all smaller ranks, from the smallest."""


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """The examples that chose nothing."""

    tokens_N: np.ndarray
    cluster_N: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Arms that trained side by side to the end."""

    unit: Unit
    data: str
    warmup: float
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    looks: tuple[Look, ...]
    loss_K: np.ndarray
    """At the end, on fresh examples."""
    loss_KN: np.ndarray | None
    """Nats summed over each of them; the oldest records lack it."""
    fresh: Fresh | None
    passes: float
    """Over the training rows; NaN where the record does not say."""

    def at(self, rate: float) -> list[int]:
        """The arms of one learning rate, by rising rank."""
        return sorted((i for i, x in enumerate(self.rates) if x == rate), key=lambda i: self.ranks[i])


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A whole adaptive run."""

    rank: int
    scale: float
    """Of the learning rate."""
    way: Way
    step: int
    """Of the decision."""
    candidate_steps: float
    """Steps × candidates over the steps of one training."""
    measured: int
    """Arms measured for the choice, summed over its looks, each on `looked` examples."""
    looked: int
    loss_N: np.ndarray
    """What was delivered; of fixed the last step, as people train it."""
    ends: "Ends | None" = None

    @property
    def last_N(self) -> np.ndarray:
        return self.ends.last_N if self.ends else self.loss_N

    @property
    def chosen_N(self) -> np.ndarray:
        """As the examples that chose have it, of fixed too."""
        return self.ends.average_N if self.ends and self.ends.averaged else self.last_N


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The last step and the average since the choice, on fresh examples; records before 27 November lack them."""

    last_N: np.ndarray
    average_N: np.ndarray
    averaged: bool
    """The examples that chose the rank were for the average."""


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    unit: Unit
    data: str
    warmup: float
    examples: int
    """Of all training steps."""
    quantize: str
    arms: Mapping[str, Arm]
    fresh: Fresh

    @property
    def made(self) -> tuple[object, ...]:
        """What runs share that may be compared."""
        return self.data, self.warmup, self.examples, self.quantize, tuple(self.fresh.tokens_N)


def read(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, record) of each file, by name."""
    for file in sorted(folder.glob("*.json")):
        yield file.name, json.loads(file.read_text(encoding="utf-8"))


def unit_of(record: Mapping[str, Any]) -> Unit:
    task = record["task"]
    return "sst2" if task == "SST-2" else task, record["seed"]


def curve_of(described: Mapping[str, Any]) -> Curve:
    """From the lower triangle of standard errors that is kept."""
    loss_K = np.array(described["loss"], dtype=float)
    se_KK = np.zeros((len(loss_K), len(loss_K)))
    for i, row in enumerate(described["se"]):
        se_KK[i, :i] = se_KK[:i, i] = row
    return Curve(loss_K=loss_K, se_KK=se_KK)


def fresh_of(record: Mapping[str, Any]) -> Fresh:
    return Fresh(tokens_N=np.array(record["fresh_tokens"]), cluster_N=np.array(record["fresh_cluster"]))


def sweep_of(record: Mapping[str, Any]) -> Sweep:
    """Of `benchmarks.sweep`, or of the former `benchmarks.early_looks`, whose records lack what was the default."""
    ranks = tuple(record["ranks"])
    rates = tuple(record["rates"]) if "rates" in record else (record["lr_scale"],) * len(ranks)
    each = tuple(dict.fromkeys(rates))
    looks = []
    for look in record["looks"]:
        # early_looks averaged over the last half of the steps, and cut the widest of its only learning rate.
        averaged = look.get("averaged", look.get("half"))
        names = ("truncated",) if "truncated" in look else [f"truncated-{i}" for i in range(len(each))]
        cuts = {x: curve_of(look[name]) for x, name in zip(each, names, strict=False) if name in look}
        looks.append(
            Look(
                share=look["share"],
                direct=curve_of(look["direct"]),
                averaged=None if averaged is None else curve_of(averaged),
                truncated=cuts,
            )
        )
    end = record["fresh"]
    kept = "per_example" in end
    return Sweep(
        unit=unit_of(record),
        data=record["data_sha256"],
        warmup=record.get("warmup", 0.03),
        ranks=ranks,
        rates=rates,
        looks=tuple(looks),
        loss_K=np.array(end["loss"], dtype=float),
        loss_KN=np.array(end["per_example"], dtype=float) if kept else None,
        fresh=fresh_of(record) if kept else None,
        passes=record["steps"] * record["batch_size"] / record["train_examples"] if "steps" in record else math.nan,
    )


def sweeps(root: Path = ROOT) -> list[Sweep]:
    return [sweep_of(record) for _, record in read(root / "sweep")]


def first_ranks(root: Path = ROOT) -> list[Sweep]:
    """All ranks at the default learning rate; of each unit the latest record."""
    found = [sweep_of(record) for name, record in read(root / "first") if "-lr1" in name]
    return list({s.unit: s for s in sorted(found, key=lambda s: s.loss_KN is not None)}.values())


def first_rates(root: Path = ROOT) -> list[Sweep]:
    """A few ranks at several learning rates, with averages."""
    return [sweep_of(record) for name, record in read(root / "first") if "-rates-" in name]


def newest(found: Sequence[Sweep], older: Sequence[Sweep]) -> list[Sweep]:
    """All of the first and, of units that these lack, the older ones; by task and seed."""
    there = {s.unit for s in found}
    return sorted([*found, *(s for s in older if s.unit not in there)], key=lambda s: s.unit)


def arm_of(name: str, arm: Mapping[str, Any], lr: float) -> Arm:
    rank = arm["rank"]
    source = next(source for r, _, _, source in arm["curve"] if r == rank)
    way: Way = "cut" if name in SHRINKS else "own"
    if name in ("fixed", "grid") and source == "direct":
        way = "alone"
    measured = arm["measured"] if "measured" in arm else len(arm["curve"]) + earlier(name, arm)
    return Arm(
        rank=rank,
        scale=round(arm["lr"] / lr, 6),
        way=way,
        step=arm["decision"]["step"],
        candidate_steps=arm["candidate_steps"],
        measured=measured,
        looked=arm["looked"],
        loss_N=losses_of(arm["fresh"]),
        ends=both_ends_of(arm) if "ending" in arm else None,
    )


def called(name: str, arm: Mapping[str, Any]) -> str:
    """As benchmarks.adaptive calls its arms now."""
    return name if "rule" in arm else BEFORE.get(name, name)


def losses_of(end: Mapping[str, Any]) -> np.ndarray:
    """Of each fresh example, of the one candidate that was measured."""
    return np.array(end["per_example"][0], dtype=float)


def both_ends_of(arm: Mapping[str, Any]) -> Ends:
    last, average = losses_of(arm["last"]), losses_of(arm["average"])
    return Ends(last_N=last, average_N=average, averaged=arm["ending"]["averaged"])


def earlier(name: str, arm: Mapping[str, Any]) -> int:
    """What was measured before the last look, in records that do not say it: there `shrink` looked once."""
    if name == "shrink-lr":
        return 3
    probed = arm["decision"]["fraction"] > 0.1
    return len(GRID) + 1 if name == "race" and probed else 0


def adaptive_of(record: Mapping[str, Any]) -> Adaptive:
    return Adaptive(
        unit=unit_of(record),
        data=record["data_sha256"],
        warmup=record["warmup"],
        examples=record["steps"] * record["batch_size"],
        quantize=record.get("quantize", "none"),
        arms={called(name, arm): arm_of(name, arm, record["lr"]) for name, arm in record["arms"].items()},
        fresh=fresh_of(record),
    )


def adaptives(root: Path = ROOT, folders: Sequence[str] = ("adaptive",)) -> list[Adaptive]:
    """Each unit's arms on each base from all folders: of an arm that is in several, the first."""
    found: dict[tuple[Unit, str], Adaptive] = {}
    for run in (adaptive_of(record) for folder in folders for _, record in read(root / folder)):
        key = run.unit, run.quantize
        before = found.get(key, run)
        if before.made != run.made:
            raise ValueError(f"{run.unit}: runs in {', '.join(folders)} differ in rows, length or warm-up")
        missing = {name: arm for name, arm in run.arms.items() if name not in before.arms}
        found[key] = replace(before, arms={**before.arms, **missing})
    return [found[key] for key in sorted(found)]


def choices(root: Path = ROOT, folders: Sequence[str] = ("adaptive",)) -> dict[tuple[str, str], dict[int, int]]:
    """(task, strategy) → seed → rank, from those that ended with the choice and from whole runs of other seeds."""
    found: dict[tuple[str, str], dict[int, int]] = {}
    for folder in (*sorted(root.glob("choices*")), *(root / name for name in folders)):
        for _, record in read(folder):
            for name, arm in record["arms"].items():
                found.setdefault((record["task"], called(name, arm)), {}).setdefault(record["seed"], arm["rank"])
    return found


def after_cuts(root: Path = ROOT, folder: str = "after_cut") -> list[dict[str, Any]]:
    return [record for _, record in read(root / folder)]
