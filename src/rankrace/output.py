"""The output folder: whose it is, and what may be written into it."""

from pathlib import Path

import yaml

from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.result import Result, replace_text

MAY_DIFFER = {"out", "resume", "device", "save_every", "micro_tokens"}
"""Options that a resumed run may change without becoming another run."""


class OutputFolder:
    """Args:
    root: config.out; nothing is created before `claim`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.adapter = root / "adapter"
        self.checkpoints = root / "checkpoints"
        self.result = root / "result.json"
        self.report = root / "report.html"
        self.config = root / "config.yaml"

    def check(self, config: RunConfig) -> Result | None:
        """Before anything is loaded: is the folder free, or does it hold this very run?

        Returns:
            The result, if the run to resume is already finished.

        Raises:
            RankraceError: the folder holds another run, or is no folder.
        """
        if self.root.exists() and not self.root.is_dir():
            raise RankraceError(
                f"--out {self.root} is a file",
                why="a run writes a folder of several files",
                fix="choose another name for --out",
            )
        if not self.config.exists() and not self.result.exists():
            return None
        if not config.resume:
            raise RankraceError(
                f"{self.root} already holds a run",
                why="its adapter and report would be overwritten",
                fix="continue it with --resume, or choose another --out",
            )
        if self.config.exists():
            self.compare(config)
        return Result.read(self.result) if self.result.exists() else None

    def compare(self, config: RunConfig) -> None:
        """Raises RankraceError when the run in the folder was started with other options."""
        before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        now = config.model_dump(mode="json")
        asked = {
            key
            for key, value in now.items()
            if key not in MAY_DIFFER and value != RunConfig.model_fields[key].get_default(call_default_factory=True)
        }
        differing = sorted(key for key in asked if key in before and before[key] != now[key])
        if differing:
            listed = "; ".join(f"{key}: {before[key]} there, {now[key]} now" for key in differing)
            raise RankraceError(
                f"{self.root} holds a run with other options ({listed})",
                why="a run that changes its options half-way is neither the one nor the other",
                fix=f"resume with the options it was started with (--config {self.config} --resume), "
                "or choose another --out",
            )

    def claim(self, config: RunConfig) -> None:
        """Makes the folder and writes the resolved configuration: from here on it is this run's."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        settings = config.model_dump(mode="json", exclude={"resume"})
        replace_text(self.config, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    def started(self) -> RunConfig | None:
        """The resolved configuration of the run in the folder."""
        if not self.config.exists():
            return None
        return RunConfig.model_validate(yaml.safe_load(self.config.read_text(encoding="utf-8")))
