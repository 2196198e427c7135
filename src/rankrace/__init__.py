"""rankrace: LoRA fine-tuning in which nobody has to guess the rank."""

import rankrace._quiet  # noqa: F401
from rankrace._version import __version__
from rankrace.choose import Selection, search
from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.result import Result
from rankrace.run import train

__all__ = ["RankraceError", "__version__", "Result", "RunConfig", "Selection", "search", "train"]
