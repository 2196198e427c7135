"""The output folder: whose it is, and what may be written into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.options import checked
from rankrace.result import Result, replace_text

MAY_DIFFER = {"out", "resume", "device", "save_every", "micro_tokens", "compile", "cuda_graphs",
              "recompute", "track"}  # fmt: skip
"""Options that a resumed run may change without becoming another run."""
UNRESOLVED = (None, "auto")
"""Values that leave the choice to the run: whatever it came to is no other option."""


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
        """Before anything is loaded: is the folder free and writable, or does it hold this very run?

        Returns:
            The result, if the run to resume is already finished.

        Raises:
            RankraceError: the folder holds another run or what looks like one, or it cannot be written.
        """
        self.check_writable()
        mine = (self.config, self.result, self.report, self.adapter, self.checkpoints)
        found = [path.name for path in mine if os.path.exists(path)]
        if not found:
            return None
        started = self.started()
        if started is None:
            raise RankraceError(
                f"{self.root} holds {', '.join(found)}, but no config.yaml",
                why="a run would write over it, and without that file it is no run to go on with",
                fix="choose another --out",
            )
        if not config.resume:
            raise RankraceError(
                f"{self.root} already holds a run",
                why="its adapter and report would be overwritten",
                fix="continue it with --resume, or choose another --out",
            )
        self.compare(started, config)
        return Result.read(self.result) if self.result.exists() else None

    def check_writable(self) -> None:
        """Raises RankraceError when the folder is none, or neither it nor the one to make it in can be written."""
        # Not Path.exists: that raises where a folder may not even be looked into.
        existing = next(path for path in (self.root, *self.root.absolute().parents) if os.path.exists(path))
        if not existing.is_dir():
            raise RankraceError(
                f"--out {self.root}: {existing} is a file",
                why="a run writes a folder of several files",
                fix="choose another name for --out",
            )
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RankraceError(
                f"--out {self.root}: {existing} cannot be written",
                why="the run would be lost when its first checkpoint is due",
                fix="choose another --out, or change the folder's permissions",
            )

    def compare(self, started: RunConfig, config: RunConfig) -> None:
        """Raises RankraceError when the run in the folder was started with other options than are given now."""
        before, now = started.model_dump(mode="json"), config.model_dump(mode="json")
        differing = [
            key
            for key in before
            if key in config.model_fields_set - MAY_DIFFER and now[key] != before[key] and now[key] not in UNRESOLVED
        ]
        if differing:
            listed = "; ".join(f"{key}: {before[key]} there, {now[key]} now" for key in differing)
            raise RankraceError(
                f"{self.root} holds a run with other options ({listed})",
                why="a run that changes its options half-way is neither the one nor the other",
                fix=f"resume with the options it was started with (--config {self.config} --resume), "
                "or choose another --out",
            )

    def claim(self, config: RunConfig) -> None:
        """Makes the folder and writes the resolved configuration: from here on it is this run's.

        Raises:
            RankraceError: it cannot be written; a folder that was not there is not there.
        """
        settings = config.model_dump(mode="json", exclude={"resume"})
        new = not os.path.exists(self.root)
        try:
            with writing(self.root):
                # The configuration comes first: a folder with anything but it would be taken for another's.
                replace_text(self.config, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
                self.checkpoints.mkdir(exist_ok=True)
        except RankraceError:
            if new:
                shutil.rmtree(self.root, ignore_errors=True)
            raise

    def started(self) -> RunConfig | None:
        """The resolved configuration of the run in the folder.

        Raises:
            RankraceError: there is a config.yaml, but not that of a run.
        """
        if not os.path.exists(self.config):
            return None
        try:
            values = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no options")
            return checked(values)
        except (OSError, ValueError, yaml.YAMLError, RankraceError) as error:
            said = error.what if isinstance(error, RankraceError) else " ".join(str(error).split())
            raise RankraceError(
                f"{self.config} is not the configuration of a run: {said}",
                why="the folder holds something else, or a run of another version of rankrace",
                fix="choose another --out",
            ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's word that a file cannot be written into an error for the user."""
    try:
        yield
    except OSError as error:
        raise RankraceError(
            f"cannot write {path}: {error.strerror or error}",
            why="the disk is full or the folder is not writable; nothing half-written was left behind",
            fix="free some space, or choose another --out; a run that had begun goes on with --resume",
        ) from error
