"""Random encoded examples of very unequal lengths, for exactness tests."""

import numpy as np

from rankrace.data.encoded import Encoded


def examples(
    count: int, *, seed: int = 0, longest: int = 23, vocabulary: int = 61, classes: int = 0
) -> list[Encoded]:
    """Lengths from 2 (1 for classification) to `longest`; the supervised tokens are a random tail of each."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        length = int(rng.integers(1 if classes else 2, longest + 1))
        ids = rng.integers(5, vocabulary, length).astype(np.int32)
        supervised = np.zeros(length, dtype=bool)
        if not classes:
            supervised[int(rng.integers(1, length)) :] = True
        label = int(rng.integers(classes)) if classes else -1
        made.append(Encoded(input_ids=ids, supervised=supervised, label=label, group=row, row=row))
    return made
