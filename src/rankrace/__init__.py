"""rankrace: LoRA fine-tuning in which nobody has to guess the rank."""

from importlib import import_module
from logging import LogRecord, getLogger
from typing import TYPE_CHECKING, Any

from rankrace._version import __version__

if TYPE_CHECKING:
    from rankrace.choose import Selection, search
    from rankrace.config import RunConfig
    from rankrace.errors import RankraceError
    from rankrace.result import Result
    from rankrace.run import train

__all__ = ["RankraceError", "__version__", "Result", "RunConfig", "Selection", "search", "train"]


def _of_use(record: LogRecord) -> bool:
    return "Failed to load CPU gemm_4bit_forward" not in record.getMessage()


# PEFT imports bitsandbytes wherever it is installed, and that warns of a CPU kernel that nothing here uses: weights
# in NF4 are unpacked whole. What it says where it cannot work at all stays.
getLogger("bitsandbytes.backends.cpu.ops").addFilter(_of_use)

_HOMES = {
    "RankraceError": "errors",
    "Result": "result",
    "RunConfig": "config",
    "Selection": "choose",
    "search": "choose",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    """What the package offers, loaded at its first use: `rankrace --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rankrace' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"rankrace.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
