"""Plain values, from the command line, from YAML or from Python, to a RunConfig."""

from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ValidationError

from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.select.learning_rate import rates_tried


def checked(values: dict[str, Any]) -> RunConfig:
    """RunConfig from plain values, with errors a user can read.

    Raises:
        RankraceError: an unknown option (with the nearest known one), an empty one, or a value that it does not take.
    """
    unknown = [key for key in values if key not in RunConfig.model_fields]
    if unknown:
        near = get_close_matches(str(unknown[0]), RunConfig.model_fields, n=1)
        raise RankraceError(
            f"there is no option {unknown[0]!r}",
            why="it would be ignored in silence",
            fix=f"did you mean {near[0]!r}?" if near else "see `rankrace train --help`",
        )
    empty = next((key for key, value in values.items() if value == ""), None)
    if empty is not None:
        raise RankraceError(
            f"--{empty.replace('_', '-')} is empty",
            why="as a path that would be the present folder; a shell variable that is not set looks like this",
            fix="give it a value, or leave it out",
        )
    values = {key: on_or_off(value) if switch(key) else value for key, value in values.items()}
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-") if first["loc"] else "configuration"
        missing = first["type"] == "missing"
        raise RankraceError(
            f"--{name} is missing" if missing else f"--{name} {first.get('input')!r}: {first['msg']}",
            why="the run cannot start without it" if missing else "the value is outside what the option takes",
            fix=f"give {'' if missing else 'another value for '}--{name}; `rankrace train --help` says what it takes",
        ) from error
    refuse_idle(config)
    return config


def on_or_off(value: Any) -> Any:
    """To YAML these words are true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def switch(name: str) -> bool:
    """Whether they are among the words that an option takes."""
    return {"on", "off"} <= set(get_args(RunConfig.model_fields[name].annotation))


def refuse_idle(config: RunConfig) -> None:
    """Raises RankraceError for an option that others leave without effect."""
    opening = len(rates_tried(config.lr_scales)) > 1 or config.twin
    searching = RunConfig.model_fields["search_fraction"].default
    idle = [
        ("lr_scales or twin", opening and config.strategy == "grid", "strategy shrink or race"),
        ("layer_ranks", config.layer_ranks != "uniform" and config.strategy != "shrink", "strategy shrink"),
        ("penalty_weight", config.penalty_weight > 0 and config.penalty == "log2", "penalty parameters or bytes"),
        ("search_fraction", config.search_fraction != searching and config.strategy != "grid", "strategy grid"),
        ("kappa", config.kappa > 0 and config.penalty != "log2", "penalty log2"),
        ("prefer", config.prefer != "balanced" and config.rule == "argmin", "a rule other than argmin"),
    ]
    for option, is_idle, needs in idle:
        if is_idle:
            raise RankraceError(
                f"the option {option} has no effect here",
                why=f"it goes with {needs}",
                fix=f"choose {needs}, or leave it out",
            )
