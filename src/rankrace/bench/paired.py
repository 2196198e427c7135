"""How far one method is behind another, on the same test rows and seed by seed.

Shapes: n seeds that both have run, N test rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankrace.bench.record import Record
from rankrace.select.statistics import paired_difference, t_975


@dataclass(frozen=True, kw_only=True)
class Difference:
    """In points: a row that is right counts 100."""

    mean: float
    se: float
    """NaN where nothing is known of it: no seed in common, or one document."""
    documents: int
    """From which it is estimated; rows, where they are of no document."""

    @property
    def tie(self) -> bool:
        """Not to be told from nothing, with 95% confidence; nor is it where nothing is known of it."""
        return not (self.known and abs(self.mean) > t_975(self.documents - 1) * self.se)

    @property
    def known(self) -> bool:
        return not math.isnan(self.se)


def difference(some: Sequence[Record], others: Sequence[Record]) -> Difference:
    """The mean score of some runs of a task less that of others, over test rows and common seeds.

    SE² = SE_rows² + SE_seeds²: that of the seeds' mean over rows, clustered by document, since another draw of test
    rows would give another difference; and with two seeds or more s²/n of the seeds' differences, since another draw
    of seeds would. What varies with both is in both, so the sum is rather too large than too small.
    """
    mine, theirs = ({run["seed"]: run for run in runs} for runs in (some, others))
    common = sorted(mine.keys() & theirs.keys())
    if not common:
        means = [float(np.mean([run["rows"] for run in runs])) for runs in (some, others)]
        return Difference(mean=100 * (means[0] - means[1]), se=math.nan, documents=0)
    d_nN = np.array([mine[s]["rows"] for s in common]) - np.array([theirs[s]["rows"] for s in common])
    n, N = d_nN.shape
    documents = mine[common[0]]["documents"] or list(range(N))
    mean, se_rows = paired_difference(d_nN.mean(0), np.zeros(N), np.ones(N), np.array(documents))
    variance = se_rows**2 + (float(d_nN.mean(1).var(ddof=1)) / n if n > 1 else 0.0)
    return Difference(mean=100 * mean, se=100 * math.sqrt(variance), documents=len(set(documents)))
