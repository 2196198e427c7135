"""Paired differences between candidates measured on the same held-out examples.

Shapes: K candidates, N examples, C clusters (documents).
"""

import numpy as np

CLEARLY = 2.0
"""Paired standard errors by which one must be ahead of another to be called better, at least."""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5% points of Student's t with 1 to 10 degrees of freedom."""


def t_975(freedom: int) -> float:
    """With more of them by its limit and the first term towards it, right to 0.01."""
    return T_975[freedom - 1] if freedom <= len(T_975) else 1.96 + 2.5 / freedom


def clearly(d: float, se: float, clusters: int) -> bool:
    """Whether a difference is above nothing by more than chance, with 95% confidence.

    By two standard errors, or by Student's t where these come from few clusters: an error that is itself estimated
    from three documents is often far too small. What is unknown is never clear.
    """
    return clusters > 1 and d > max(CLEARLY, t_975(clusters - 1)) * se


def paired_difference(
    a_N: np.ndarray, b_N: np.ndarray, tokens_N: np.ndarray, cluster_N: np.ndarray
) -> tuple[float, float]:
    """The mean loss of a minus that of b, in nats per supervised token, and its standard error.

    d = Σ_i (a_i − b_i) / Σ_i n_i with n_i the tokens of example i: a ratio of sums, so the linearised residual
    of cluster c is e_c = Σ_{i∈c} (a_i − b_i − d·n_i) and SE = √(C/(C−1)·Σ e_c²) / Σ n_i (Cochran 1977, 6.4).
    Examples of one document share what is easy or hard about it, so they make one cluster.

    Returns:
        (d, SE); SE is NaN with fewer than two clusters, where nothing is known of the spread.
    """
    total = tokens_N.sum()
    d_N = a_N - b_N
    d = float(d_N.sum() / total)
    clusters, member_N = np.unique(cluster_N, return_inverse=True)
    C = len(clusters)
    if C < 2:
        return d, float("nan")
    e_C = np.bincount(member_N, weights=d_N - d * tokens_N, minlength=C)
    return d, float(np.sqrt(C / (C - 1) * np.square(e_C).sum()) / total)


def mean_and_se(loss_N: np.ndarray, tokens_N: np.ndarray, cluster_N: np.ndarray) -> tuple[float, float]:
    """A candidate's own loss in nats per supervised token and its (unpaired) standard error."""
    return paired_difference(loss_N, np.zeros_like(loss_N), tokens_N, cluster_N)
