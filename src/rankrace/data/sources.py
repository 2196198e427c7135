"""A data name → rows of the training and the validation split.

`load_rows("name")` takes, in this order: a file, a folder with files named train and validation (or dev,
valid, val), or a data set of the Hugging Face hub, `name` or `name:subset`. A test split is never read.
Nothing that is on this machine's disk is looked up on the network.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rankrace.data.files import READERS, Rows, missing, read_file
from rankrace.data.hub import hub_rows, load_hub
from rankrace.errors import RankraceError

VALIDATION_NAMES = ("validation", "dev", "valid", "val")
# train.tsv, train-v2.0.json, dev.4options.jsonl, train-00000-of-00002.parquet
_SPLIT_FILE = re.compile(r"(train|validation|dev|valid|val|test)(-\d+-of-\d+)?(?:[-.].*)?\.\w+", re.IGNORECASE)
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::(?P<subset>[\w.-]+))?")


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """The rows as they were read, and what they are called in messages."""

    train: Rows
    validation: Rows | None
    train_where: str
    validation_where: str | None

    def sha256(self) -> str:
        """SHA-256 over all rows (training, then validation), each as JSON with sorted keys.

        Over rows, not bytes: the same rows as csv or as jsonl, or from the hub, are the same data.
        """
        digest = hashlib.sha256()
        for rows in (self.train, self.validation or []):
            for row in rows:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
                digest.update(b"\n")
            digest.update(b"\n")
        return digest.hexdigest()


def load_rows(data: str, validation: str | None = None) -> SourceRows:
    """Read a data set.

    Args:
        data: a file, a folder, or a hub name (`squad_v2`, `nyu-mll/glue:sst2`).
        validation: a file with validation rows; it goes before a validation split of the data.

    Raises:
        RankraceError: missing, unreadable, empty or ambiguous data, or no way to reach the hub.
    """
    path = Path(data).expanduser()
    # Not Path.is_dir and the like: they raise for a name that is too long or a folder that may not be looked into.
    if os.path.isdir(path):
        source = _from_folder(path)
    elif os.path.exists(path) or _looks_local(data, path):
        source = SourceRows(train=read_file(path), validation=None, train_where=data, validation_where=None)
    else:
        source = _from_hub(data)
    if validation is None:
        return source
    return SourceRows(
        train=source.train,
        validation=read_file(Path(validation).expanduser()),
        train_where=source.train_where,
        validation_where=validation,
    )


def _looks_local(data: str, path: Path) -> bool:
    """Is this name, where nothing is, meant as a path? (`data/train.jsonl`, `./data`, `runs/x/y`)"""
    return (
        path.suffix.lower() in READERS
        or data.startswith((".", "~", "/"))
        or _HUB_NAME.fullmatch(data) is None
        or (len(path.parts) > 1 and os.path.isdir(path.parent))
    )


def _from_folder(folder: Path) -> SourceRows:
    try:
        files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in READERS)
    except OSError as error:
        raise RankraceError(
            f"{folder} cannot be read: {error.strerror}.",
            why="its files are the data.",
            fix="check the folder's permissions.",
        ) from error
    by_split: dict[str, list[Path]] = {}
    for file in files:
        if match := _SPLIT_FILE.fullmatch(file.name):
            by_split.setdefault(match[1].lower(), []).append(file)
    train = by_split.get("train", [])
    if not train and len(files) == 1:
        return SourceRows(
            train=read_file(files[0]), validation=None, train_where=str(files[0]), validation_where=None
        )
    if not train:
        raise RankraceError(
            f"{folder} has no training file (seen: {', '.join(f.name for f in files) or 'no data file'}).",
            why="a folder holds train.* and, if there is one, validation.*, or a single file.",
            fix=f"name a file train with one of the endings {', '.join(READERS)}, or give the file itself.",
        )
    held_out = [file for name in VALIDATION_NAMES for file in by_split.get(name, [])]
    return SourceRows(
        train=_read_shards(train),
        validation=_read_shards(held_out) if held_out else None,
        train_where=str(train[0]) if len(train) == 1 else f"{folder}/train-*",
        validation_where=(str(held_out[0]) if len(held_out) == 1 else f"{folder}/validation-*") if held_out else None,
    )


def _read_shards(files: list[Path]) -> Rows:
    """One file, or the numbered shards of one split in their order."""
    shards = [match and match[2] for match in (_SPLIT_FILE.fullmatch(file.name) for file in files)]
    if len(files) > 1 and not all(shards):
        raise RankraceError(
            f"{files[0].parent} has several files for one split: {', '.join(file.name for file in files)}.",
            why="it is not clear which of them is meant.",
            fix="leave one, or give the training file itself and --validation.",
        )
    return [row for file in files for row in read_file(file)]


def _from_hub(data: str) -> SourceRows:
    match = _HUB_NAME.fullmatch(data)
    if match is None:
        raise missing(Path(data))
    found = load_hub(
        match["name"],
        match["subset"],
        what=f"'{data}' is no file or folder here and",
        instead="correct the name (a subset: name:subset), or give a local file",
    )
    assert isinstance(found, dict)
    if "train" not in found:
        raise RankraceError(
            f"the hub data set '{data}' has no split train (seen: {', '.join(map(str, found))}).",
            why="training needs one.",
            fix="download the split that you mean and give it as a file.",
        )
    held_out = next((name for name in VALIDATION_NAMES if name in found), None)
    return SourceRows(
        train=hub_rows(found["train"]),
        validation=hub_rows(found[held_out]) if held_out else None,
        train_where=f"{data} (train)",
        validation_where=f"{data} ({held_out})" if held_out else None,
    )
