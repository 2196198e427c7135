"""Where the rows of a task are read from: a folder, or the Hugging Face hub.

The folder (RANKRACE_DATA) is laid out as

    squad2/dev-v2.0.json     glue/{SST-2,MRPC,RTE,CoLA}/{train,dev}.tsv     medqa/{dev,test}.4options.jsonl
    medmcqa/validation.jsonl     gsm8k/{train,test}.jsonl     scitldr/{train,dev,test}.jsonl
"""

import os
from pathlib import Path

from rankrace.data.files import Rows
from rankrace.data.hub import hub_rows, load_hub
from rankrace.errors import RankraceError


def data_root() -> Path | None:
    """The folder of local data sets, $RANKRACE_DATA; None: tasks come from the hub."""
    root = os.environ.get("RANKRACE_DATA")
    return Path(root) if root else None


def read_hub(name: str, subset: str | None, split: str, revision: str | None = None) -> Rows:
    """One split of a hub data set, with the names of classes.

    Raises:
        RankraceError: the package datasets is missing, or the hub does not give the split.
    """
    found = load_hub(
        name,
        subset,
        what=f"the split '{split}' of '{name}'",
        instead="set RANKRACE_DATA to a folder with the files",
        split=split,
        revision=revision,
    )
    assert not isinstance(found, dict)
    return hub_rows(found)


def hub_only(task: str, root: Path) -> RankraceError:
    """The error for a task whose files no data folder holds."""
    return RankraceError(
        f"{task} is not among the files of a data folder ({root}).",
        why="it is read from the hub only.",
        fix="unset RANKRACE_DATA where a network can be reached, or leave the task out.",
    )
