"""Where the rows of a task are read from: a folder, or the Hugging Face hub.

The folder (RANKRACE_DATA) is laid out as

    squad2/dev-v2.0.json     glue/{SST-2,MRPC,RTE,CoLA}/{train,dev}.tsv     medqa/{dev,test}.4options.jsonl
    medmcqa/validation.jsonl     gsm8k/{train,test}.jsonl     scitldr/{train,dev,test}.jsonl
"""

from pathlib import Path

from rankrace.data.files import Rows
from rankrace.errors import RankraceError


def hub_rows(name: str, subset: str | None, split: str, revision: str | None = None) -> Rows:
    """One split of a hub data set, class numbers replaced by their names (null for the -1 of unlabelled rows).

    Raises:
        RankraceError: the package datasets is missing, or the hub does not give the split.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise RankraceError(
            f"without a data folder, '{name}' is read from the hub, which needs the package datasets.",
            why="it is an optional part of rankrace.",
            fix="pip install 'rankrace[hub]', or set RANKRACE_DATA to a folder with the files.",
        ) from error
    try:
        found = datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise RankraceError(
            f"the split '{split}' of '{name}' could not be loaded from the hub.",
            why=f"{type(error).__name__}: {error}",
            fix="check the network, or set RANKRACE_DATA to a folder with the files.",
        ) from error
    assert isinstance(found, datasets.Dataset)
    names = {column: f.names for column, f in found.features.items() if isinstance(f, datasets.ClassLabel)}
    rows = found.to_list()
    for row in rows:
        for column, known in names.items():
            number = row[column]
            row[column] = None if number is None or number < 0 else known[number]
    return rows


def hub_only(task: str, root: Path) -> RankraceError:
    """The error for a task whose files no data folder holds."""
    return RankraceError(
        f"{task} is not among the files of a data folder ({root}).",
        why="it is read from the hub only.",
        fix="unset RANKRACE_DATA where a network can be reached, or leave the task out.",
    )
