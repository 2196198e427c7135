"""The record of a run, `result.json`: what was chosen, why, and what it cost.

    python -m rankrace.result     # prints the JSON schema (kept in schema/result.schema.json)

Within "rankrace/result/1" fields may be added and none is renamed or removed; readers skip what they
do not know. Losses are mean nats per supervised token (classification: per example), times are seconds.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    computed_field,
    model_validator,
)

from rankrace.config import Quantize
from rankrace.errors import RankraceError

SCHEMA = "rankrace/result/1"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM takes for --max-lora-rank."""


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _short(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


Measured = Annotated[float | None, AfterValidator(_finite)]
"""A measurement; NaN and infinity (a diverged candidate) become null, since JSON has neither."""
Traced = Annotated[float | None, AfterValidator(_short)]
"""The same to six significant digits: histories are long."""
Share = Annotated[float, Field(ge=0, le=1)]
Source = Literal["direct", "truncated"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Loss(_Record):
    """Validation loss of the delivered model."""

    base: FiniteFloat
    """Without an adapter."""
    final: FiniteFloat
    """With the finished adapter."""
    final_se: Measured
    """Standard error of `final`, clustered by document; null where it cannot be estimated."""
    gain_se: Measured = None
    """The same of base − final, in pairs."""
    examples: PositiveInt | None = None
    """That they were measured on."""


class Accuracy(_Record):
    """Share of validation examples whose whole answer is the greedy output (or whose class is right)."""

    base: Share | None = None
    final: Share | None = None
    final_se: Measured = None
    """Standard error of `final`, clustered by document."""


class CurvePoint(_Record):
    """One rank as the decision saw it."""

    rank: PositiveInt
    loss: Measured
    se: Measured
    """Standard error of the paired difference from the best point."""
    penalty: Measured
    """What the rank costs, in units of the loss."""
    objective: Measured
    """loss + penalty."""
    source: Source
    """direct: this rank was trained. truncated: cut from a wider one by SVD."""
    step: NonNegativeInt
    bootstrap: Share | None = None
    """Share of bootstrap samples of the held-out documents in which this rank is the pick; null where there is a
    single document."""


class Decision(_Record):
    step: NonNegativeInt
    """The optimiser step after which the rank was fixed."""
    fraction: Share
    """`step` as a share of the whole training."""
    edge: Literal["low", "high"] | None
    """Whether the choice is the smallest or the largest rank there was to choose."""
    capped: bool
    """Whether the limit of the search forced the decision before it was stable."""
    confident: bool
    """Whether the paired standard errors bear the choice out."""
    doubt: str | None = None
    """If not, why."""
    interval: tuple[PositiveInt, PositiveInt] | None = None
    """The measured ranks between which the picks of 95% of the bootstrap samples of the held-out documents lie; not
    told where these are fewer than 20, or one rank was measured."""
    clusters: int | None = None
    """Independent groups (documents) of the examples that chose; errors are estimated from them."""
    lr_scale: float = 1.0
    """The multiple of the rank's own learning rate that was chosen (--lr-scales). Of one above 1, ranks smaller than
    that it was tried at use only a part."""
    lr_edge: Literal["low", "high"] | None = None
    """Whether that is the smallest or the largest of those tried."""
    chance: Measured = None
    """Difference of two trainings that are alike but for their initial factors (--twin), nats."""
    gain: Measured = None
    """By how much the best rank's loss was below the base's then, on the examples that chose, nats."""
    rise: Measured = None
    """By how much the loss on these examples is higher at the end, of what is delivered, nats; null where rows were
    seen once only."""
    rise_se: Measured = None
    """Its paired standard error."""


class Ending(_Record):
    """What was delivered of the values of the last step and their average since the choice."""

    averaged: bool = False
    """The average."""
    gain: Measured = None
    """By how much the average's loss was lower, on the examples that chose, nats; null where none was kept, as in a
    single pass."""
    gain_se: Measured = None
    """Its paired standard error."""


class LearningRate(_Record):
    """One that was tried before the search."""

    scale: float
    """Times the rank's own."""
    loss: Measured
    """Of the average of the factors over the later steps."""
    se: Measured
    """Standard error of the paired difference from the best."""


class _OfCandidate(_Record):
    """What is told of one candidate."""

    rank: PositiveInt
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """Of the rank's own learning rate: `--lr-scales` trains a rank at several."""
    twin: bool = False
    """It began with a second draw of the factors (`--twin`)."""

    @property
    def name(self) -> str:
        """What tells it from other candidates of its rank, too."""
        scale = f" at {self.lr_scale:.3g} × lr" if self.lr_scale != 1 else ""
        return f"rank {self.rank}{scale}" + (", twin" if self.twin else "")


class Candidate(_OfCandidate):
    status: Literal["winner", "dropped", "diverged"]
    steps: NonNegativeInt
    """Optimiser steps it was trained for."""


class Time(_Record):
    """Wall-clock seconds. What is neither search nor evaluation is the winner's training, and before it loading,
    checks and compiling."""

    total_s: NonNegativeFloat
    search_s: NonNegativeFloat
    """Everything only the choice needed: the losers' steps, validation looks, SVDs."""
    evaluation_s: NonNegativeFloat
    """Validation outside the search: of the base model, once in each life of the run, and of the finished adapter."""


class Memory(_Record):
    peak_bytes: NonNegativeInt


class DataFacts(_Record):
    train_examples: NonNegativeInt
    validation_examples: NonNegativeInt
    supervised_tokens: NonNegativeInt
    """In one pass over the training examples."""
    truncated: NonNegativeInt
    """Examples cut to the length limit."""
    dropped: NonNegativeInt
    """Examples left out, such as those without a supervised token."""
    sha256: str


class Series(_OfCandidate):
    """One candidate's training loss at each of `steps`; null where it was not finite."""

    steps: list[NonNegativeInt]
    losses: Sequence[Traced]

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.steps) != len(self.losses):
            raise ValueError("steps and losses must have the same length")
        return self


class Look(_Record):
    """One look at the validation set during the search."""

    step: NonNegativeInt
    ranks: list[PositiveInt]
    losses: Sequence[Traced]
    ses: Sequence[Traced]
    """Standard errors of the paired differences from the look's best rank."""
    source: Source

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if not len(self.ranks) == len(self.losses) == len(self.ses):
            raise ValueError("ranks, losses and ses must have the same length")
        return self


class Result(_Record):
    """The outcome of a run."""

    # BaseModel has an old method named `schema`, hence the alias.
    schema_name: Literal["rankrace/result/1"] = Field(default=SCHEMA, alias="schema")
    model: str
    """The base model's name on the hub, or the whole path of its folder."""
    task: Literal["causal", "classification"]
    strategy: str
    rank: PositiveInt
    reason: str
    """Why this rank, in one sentence."""
    target_modules: list[str]
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Ranks of single modules where they differ from `rank`; empty if all are equal."""
    scaling: Annotated[FiniteFloat, Field(gt=0)]
    """The multiplier of the delivered adapter."""
    learning_rate: Annotated[FiniteFloat, Field(gt=0)]
    """The winner's peak learning rate."""
    trainable_parameters: NonNegativeInt
    base_parameters: NonNegativeInt
    quantize: Quantize = "none"
    """How the frozen base was kept; all losses are those on such a base."""
    labels: list[str] = Field(default_factory=list)
    """Class names of a classification task."""
    loss: Loss
    accuracy: Accuracy = Field(default_factory=Accuracy)
    curve: list[CurvePoint]
    decision: Decision
    ending: Ending = Field(default_factory=Ending)
    candidates: list[Candidate]
    looks: list[Look] = Field(default_factory=list)
    learning_rates: list[LearningRate] = Field(default_factory=list)
    history: list[Series] = Field(default_factory=list)
    """Training loss by step, one series a candidate (two for one that changed its rank)."""
    time: Time
    tokens_per_second: NonNegativeFloat
    memory: Memory
    data: DataFacts
    notes: list[str] = Field(default_factory=list)
    """What else a reader should know, in sentences."""
    versions: dict[str, str]
    seed: NonNegativeInt

    @computed_field
    @property
    def vllm_max_lora_rank(self) -> int | None:
        """The smallest --max-lora-rank under which vLLM loads the adapter; null if there is none."""
        largest = max([self.rank, *self.rank_pattern.values()])
        return next((limit for limit in VLLM_RANKS if limit >= largest), None)

    def write(self, path: Path) -> None:
        """Write the record in one piece: at no moment is there half a file under that name."""
        replace_text(path, _layout(self.model_dump(mode="json", by_alias=True)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises RankraceError for a missing or broken file and for a schema this version does not know."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RankraceError(
                f"{path} cannot be read as JSON: {error}",
                why="It is the record of a run; nothing can be said about the run without it.",
                fix="Give the result.json of a finished run; where it is broken, delete it and --resume the run.",
            ) from error
        found = document.get("schema") if isinstance(document, dict) else None
        if found != SCHEMA:
            raise RankraceError(
                f"{path} has the schema {found!r}, not {SCHEMA!r}.",
                why="The meaning of its fields is unknown.",
                fix="Read it with the version of rankrace that wrote it.",
            )
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RankraceError(
                f"{path} is not a whole result: {where or 'record'}: {first['msg']}.",
                why="A field that others rely on is missing or has the wrong kind.",
                fix="Restore the file, or run again.",
            ) from error


def json_schema() -> dict[str, Any]:
    """The JSON schema of what `Result.write` writes."""
    schema = Result.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: a temporary file beside it, flushed to disk, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _layout(document: dict[str, Any]) -> str:
    """One top-level key a line and one record a line: readable, yet a long history stays short."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    lines: list[str] = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            body = "[\n" + ",\n".join(f"    {compact(record)}" for record in value) + "\n  ]"
        else:
            body = compact(value)
        lines.append(f"  {compact(key)}: {body}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
