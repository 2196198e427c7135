"""Ways to train a model on the same examples, one file each, all through the one loop.

running = find_method("lora-r8").prepare(config, data, model, task)
"""

from difflib import get_close_matches
from typing import get_args

from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.methods.adalora import AdaLora
from rankrace.methods.base import Base
from rankrace.methods.full import Full
from rankrace.methods.houlsby import Houlsby
from rankrace.methods.method import AVERAGE, Described, Method, Running
from rankrace.methods.peft_lora import PeftLora
from rankrace.methods.qlora import QLora
from rankrace.methods.rankrace import Rankrace

__all__ = ["METHODS", "Described", "Method", "Running", "find_method"]

_ALL: tuple[Method, ...] = (
    Base(),
    Full(),
    Houlsby(),
    PeftLora(name="lora-r8", rank=8),
    PeftLora(name="lora-r16", rank=16),
    PeftLora(name=f"lora-r16{AVERAGE}", rank=16, average=True),
    PeftLora(name="rslora-r16", rank=16, rslora=True),
    PeftLora(name="dora-r16", rank=16, dora=True),
    AdaLora(rank=8),
    PeftLora(name="eva-r16", rank=16, eva=True),
    QLora(rank=16),
    *(Rankrace(strategy) for strategy in get_args(RunConfig.model_fields["strategy"].annotation)),
    Rankrace("shrink", average=True),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        RankraceError: no such method, with the nearest known one.
    """
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, n=1, cutoff=0.0)
    raise RankraceError(
        f"there is no method {name!r}; the nearest is {near[0]!r}",
        why="a method says what trains and how",
        fix=f"use one of {', '.join(METHODS)}",
    )
