"""Checkpoints: whole or not there.

A checkpoint is a folder `step-000123` with `tensors.safetensors` and `state.json`. It is written under another
name, flushed to disk and renamed, so a crash at any moment leaves the previous one in place.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankrace.errors import RankraceError

KEEP = 2


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes one checkpoint and removes all but the newest two.

    Raises:
        RankraceError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:06d}"
    with written_whole(final) as partial:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial / "tensors.safetensors")
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    killed = folder.glob(".step-*")  # what saves that did not come to their end have left
    for old in [*checkpoints(folder)[:-KEEP], *killed]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint's tensors and state, or None where there is none.

    Raises:
        RankraceError: it is broken.
    """
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        return load_file(newest / "tensors.safetensors"), state
    except (OSError, ValueError, SafetensorError) as error:
        raise RankraceError(
            f"the checkpoint {newest} cannot be read: {error}",
            why="the run cannot go on from it",
            fix="remove that folder to go on from the one before, or start again in another --out",
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The finished steps that its name says."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    return max(map(step_of, checkpoints(folder)), default=0)


@contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name only when all of it is on disk.

    Raises:
        RankraceError: the disk is full or not writable; nothing of the folder is left.
    """
    partial, replaced = (final.with_name(f".{final.name}.{end}") for end in ("partial", "replaced"))
    try:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            if path.is_file():
                path.chmod(0o666 & ~umask())  # safetensors lets none but the owner read its files
            flush(path)
        if final.exists():
            os.rename(final, replaced)  # at once: a folder half removed must not bear the name
        os.rename(partial, final)
        flush(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a full disk as its own error, with the system's words in it.
        if isinstance(error, OSError) or "os error" in str(error) or "I/O error" in str(error):
            raise RankraceError(
                f"cannot write {final}: {error}",
                why="the disk is full or the folder is not writable; nothing of it was left behind",
                fix="free some space (or choose another --out) and run again with --resume",
            ) from error
        raise


def umask() -> int:
    """What new files may not allow; to be asked for it has to be set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """Asks the system to put a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
