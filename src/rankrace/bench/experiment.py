"""An experiment is a short file of differences from the defaults; here it becomes a grid of jobs.

model: HuggingFaceTB/SmolLM2-135M-Instruct
methods: [full, lora-r8, lora-r16, shrink]
tasks: [squad2, rte]
seeds: [0, 1, 2]
test_max: 1000                  # rows of the test part, the same for all
tuning: {scales: [0.5, 1, 2]}   # times each method's default learning rate; the best on validation is used
                                # (beyond: 2 tries up to two more where the best is the lowest or the highest);
                                # a single scale is used as it is
common: {epochs: 1}             # any option of `rankrace train`
per_task: {gsm8k: {max_length: 768}}
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.methods import find_method
from rankrace.options import checked
from rankrace.tasks import find_task

SET_HERE = {"model", "data", "out", "task", "validation", "strategy", "lr", "rank_lr", "seed", "device", "resume",
            "quantize", "average"}  # fmt: skip
"""Options that the experiment itself decides."""
Positive = Annotated[float, Field(gt=0)]


class Tuning(BaseModel):
    """How each method's learning rate is found, the same for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    """One: it is used as it is, and nothing is tuned."""
    beyond: Annotated[int, Field(ge=0)] = 0
    """While the best rate is the lowest or the highest tried, one more beyond it, at most so many."""
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("scales")
    @classmethod
    def _differ(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        refuse_doubles([f"{scale:g}" for scale in scales])  # as in `Job.training`
        return scales


class Experiment(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    model: str
    weights: str | None = None
    """Where the model lies, if not under its name: a folder, another on every machine."""
    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    test_max: Annotated[int, Field(ge=1)] | None = None
    tuning: Tuning = Tuning()
    common: dict[str, Any] = Field(default_factory=dict)
    per_task: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("methods", "tasks", "seeds", mode="before")
    @classmethod
    def _listed(cls, values: Any) -> Any:
        if not isinstance(values, list | tuple):
            raise ValueError(f"a list is wanted, [{values}]")
        return values

    @field_validator("tasks")
    @classmethod
    def _named(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(find_task(name).name for name in tasks)

    @field_validator("per_task")
    @classmethod
    def _per_named(cls, per_task: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {find_task(name).name: options for name, options in per_task.items()}

    @field_validator("methods", "tasks", "seeds")
    @classmethod
    def _differ(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        refuse_doubles([str(value) for value in values])
        return values


def refuse_doubles(names: Sequence[str]) -> None:
    """Raises ValueError."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice, and each is one run")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: all that decides its figures."""

    method: str
    task: str
    seed: int
    scale: float
    tuning: bool
    """Only to find the learning rate: the test part is not touched."""

    @property
    def training(self) -> str:
        """Names the training; a tuning run and the run for the table share one."""
        return f"{self.task}--{self.method}--seed{self.seed}--lr{self.scale:g}"

    @property
    def key(self) -> str:
        return self.training + ("--tuning" if self.tuning else "")


def read_experiment(path: Path, model: str | None = None) -> Experiment:
    """The experiment in a YAML file; its name is the file's.

    Args:
        model: where its model lies, if not under its name.

    Raises:
        RankraceError: an unreadable file, an unknown key, method, task or option (with the nearest known one).
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no mapping of names to values")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RankraceError(
            f"cannot read the experiment {path}: {' '.join(str(error).split())}",
            why="it says which methods, tasks and seeds are to be run",
            fix="give a YAML file such as those in experiments/",
        ) from error
    unknown = [key for key in values if key not in Experiment.model_fields or key == "name"]
    if unknown:
        near = get_close_matches(str(unknown[0]), Experiment.model_fields, n=1, cutoff=0.0)
        raise RankraceError(
            f"{path}: there is no key {unknown[0]!r}",
            why="it would be ignored in silence",
            fix=f"did you mean {near[0]!r}?",
        )
    try:
        experiment = Experiment(**{**values, "name": path.stem, **({"weights": model} if model else {})})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RankraceError(
            f"{path}: {where}: {first['msg']}",
            why="the grid of runs cannot be laid out",
            fix=f"correct {where}",
        ) from error
    for name in experiment.methods:
        find_method(name)
    for options in (experiment.common, *experiment.per_task.values()):
        decided = sorted(SET_HERE & options.keys())
        if decided:
            raise RankraceError(
                f"{path}: the option {decided[0]!r} cannot be set under common or per_task",
                why="the experiment itself decides it for each run",
                fix="leave it out; the learning rate is tuned.scales times each method's default",
            )
    for task in experiment.tasks:
        config_of(experiment, Job(method="", task=task, seed=0, scale=1.0, tuning=False), Path(), "cpu")
    return experiment


def narrowed(experiment: Experiment, **wanted: Sequence[str] | None) -> Experiment:
    """Only some of its methods, tasks or seeds.

    Raises:
        RankraceError: one is asked for that the experiment does not have.
    """
    chosen = {}
    for which, names in wanted.items():
        if names is None:
            continue
        known = {str(value): value for value in experiment.model_dump()[which]}
        missing = [name for name in names if name not in known]
        if missing:
            near = get_close_matches(missing[0], known, n=1, cutoff=0.0)
            raise RankraceError(
                f"the experiment {experiment.name} has no {missing[0]!r} among its {which}",
                why="only a part of it can be run, and nothing beyond it",
                fix=f"did you mean {near[0]!r}? It has {', '.join(known)}",
            )
        chosen[which] = tuple(value for name, value in known.items() if name in names)
    return experiment.model_copy(update=chosen)


def config_of(experiment: Experiment, job: Job, out: Path, device: str) -> RunConfig:
    """The run's options, without the learning rate, which waits for the model's width."""
    options = {**experiment.common, **experiment.per_task.get(job.task, {})}
    # The methods are compared on one engine: nothing is switched on by itself for some of them only, or probed for.
    gpu = device.startswith("cuda")
    engine = {"compile": "off", **({"cuda_graphs": "on", "recompute": "off"} if gpu else {"cuda_graphs": "off"})}
    options = {name: value for name, value in options.items() if not (name in engine and value == "auto")}
    here = {"model": experiment.weights or experiment.model, "data": job.task, "out": out, "device": device}
    return checked({**engine, **options, **here, "seed": job.seed})


def settings_of(experiment: Experiment, job: Job) -> dict[str, Any]:
    """What two runs must share to be the same one, as plain values: all that is no default.

    Of the model only the name: its folder is another on every machine. So is the engine, which is here as it would be
    without a GPU; a record's `config` says how it was. Another default of another version is not seen here, but by
    `differences`.
    """
    config = config_of(experiment, job, Path(), "auto")
    given = config.model_dump(mode="json", exclude={"out", "device", "resume", "model"}, exclude_defaults=True)
    return {**given, "model": Path(experiment.model).name, "method": job.method, "scale": job.scale,
            "test_max": experiment.test_max, "tuning": job.tuning}  # fmt: skip


MACHINE = {"model", "out", "device", "compile", "cuda_graphs", "recompute"}
"""Options that may differ between the machines of one experiment."""
CHOICE = {
    "ranks", "refine", "prefer", "penalty", "penalty_weight", "kappa", "rule", "lr_scales", "twin", "layer_ranks",
    "search_fraction",
}  # fmt: skip
"""Options that only methods read that choose a rank."""


def differences(
    experiment: Experiment, job: Job, settings: dict[str, Any], config: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What is another now than in a record, given or as a default: then and now. What it does not know counts not.

    Args:
        settings: the record's, all that was no default then.
        config: the record's, with the defaults of then; a run that failed has none.
    """
    unread = set() if find_method(job.method).chooses else CHOICE
    defaults = config_of(experiment, job, Path(), "auto").model_dump(mode="json")
    given = settings_of(experiment, job)
    known = {**config, **settings}
    named = {*given, *settings, *(defaults.keys() & config.keys()) - MACHINE} - unread
    pairs = {name: (known.get(name), given.get(name, defaults.get(name))) for name in named}
    return {name: (then, now) for name, (then, now) in pairs.items() if then != now}


def training_of(experiment: Experiment, job: Job) -> str:
    """Equal for runs that share one training: that of the tuning and the one for the table."""
    settings = settings_of(experiment, job)
    return fingerprint({name: value for name, value in settings.items() if name not in ("test_max", "tuning")})


def fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
