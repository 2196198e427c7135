"""The Hugging Face hub: whether it can be reached, and the one place that asks it for rows."""

import os
from logging import getLogger
from typing import TYPE_CHECKING

from huggingface_hub import constants, get_session

from rankrace.data.files import Rows
from rankrace.errors import RankraceError

if TYPE_CHECKING:
    import datasets


WANTED_OFFLINE = constants.HF_HUB_OFFLINE
"""By the environment: HF_HUB_OFFLINE=1."""


def reach_hub(name: str) -> None:
    """Before a model or data set is loaded under this name: unless it is one here, asks whether there is a hub.

    Where there is none the process keeps to what was fetched before, until it is asked again, and that is said.
    Otherwise the hub's client would ask six times for each file, over half a minute.
    """
    if os.path.exists(name) or WANTED_OFFLINE:
        return
    constants.HF_HUB_OFFLINE = False
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # those of the hub's own client, whose package differs from version to version
        constants.HF_HUB_OFFLINE = True
        said = str(error).strip() or type(error).__name__
        getLogger(__name__).warning(
            "%s cannot be reached (%s): only what was fetched before can be used.", constants.ENDPOINT, said
        )


def load_hub(
    name: str,
    subset: str | None,
    *,
    what: str,
    instead: str,
    split: str | None = None,
    revision: str | None = None,
) -> "datasets.Dataset | datasets.DatasetDict":
    """One data set, or a split of it.

    Args:
        what: what an error says of it, before "could not be loaded".
        instead: what the user can do without the hub, after "or".
        revision: of the data set's repository.

    Raises:
        RankraceError: the package datasets is missing, or the hub does not give it.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise RankraceError(
            f"{what} would come from the hub, which needs the package datasets.",
            why="it is an optional part of rankrace.",
            fix=f"pip install 'rankrace[hub]', or {instead}.",
        ) from error
    reach_hub(name)
    # trust_remote_code does not exist any more: a hub data set is data, and no code of it is run.
    try:
        found = datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise RankraceError(
            f"{what} could not be loaded from the hub.",
            why=f"{type(error).__name__}: {error}",
            fix=f"check the network, or {instead}.",
        ) from error
    assert isinstance(found, datasets.Dataset | datasets.DatasetDict)
    return found


def hub_rows(split: "datasets.Dataset") -> Rows:
    """Rows with class numbers replaced by their names (null for the -1 that means: not labelled)."""
    import datasets

    names = {name: f.names for name, f in split.features.items() if isinstance(f, datasets.ClassLabel)}
    rows = split.to_list()
    for row in rows:
        for column, known in names.items():
            number = row[column]
            row[column] = None if number is None or number < 0 else known[number]
    return rows
