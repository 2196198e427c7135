"""Examples as tokens: what encoding makes and packing takes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Task = Literal["causal", "classification"]
NO_LABEL = -1
FEW_DOCUMENTS = 10
"""With fewer, standard errors are rough; of half as many Student's t is above 2.8."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """One example as tokens."""

    input_ids: np.ndarray
    """int32."""
    supervised: np.ndarray
    """bool, as long as input_ids: token i is a target. All False for classification."""
    label: int
    """Class index, -1 for causal."""
    group: int
    """The same number for rows of one document, or copies of one row without a document, and for no others."""
    row: int
    """Place in the list of examples that was encoded."""
    truncated: bool = False
    token_types: np.ndarray | None = None
    """int32, for models such as BERT that mark the second text of a pair; None for the others."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSet:
    """The examples of one side of the split, without those dropped."""

    examples: list[Encoded]
    truncated: int
    """Examples cut to max_length, the dropped ones among them."""
    dropped: int
    """Examples of which truncation left no target."""
    supervised_tokens: int
    """Targets: supervised tokens, or one an example for classification."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def documents(self) -> int:
        """Groups of examples that belong together."""
        return len({example.group for example in self.examples})

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return np.array([len(example) for example in self.examples], dtype=np.int64)
