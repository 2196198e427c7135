"""Paired differences between candidates measured on the same held-out examples.

Shapes: K candidates, N examples, C clusters (documents), B draws of C clusters with replacement.
"""

import numpy as np

LEAST_CLUSTERS = 20
"""Of a choice that may be called sure. With fewer, two standard errors are far from 95%: 62% with 2 clusters, 80%
with 4, 88% with 8; and samples of a handful of documents are too much alike."""
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


def by_cluster(x_XN: np.ndarray, cluster_N: np.ndarray) -> np.ndarray:
    """Sums over the examples of each cluster, [X, C]."""
    clusters, member_N = np.unique(cluster_N, return_inverse=True)
    return np.stack([np.bincount(member_N, weights=x_N, minlength=len(clusters)) for x_N in x_XN])


def bootstrap_weights(C: int, draws: int) -> np.ndarray:
    """How often each of C clusters comes in each of so many draws of C of them, [B, C]; always the same draws.

    The bootstrap of clusters (Efron 1979; Davison and Hinkley 1997, 3.8).
    """
    return np.random.Generator(np.random.Philox(0)).multinomial(C, np.full(C, 1 / C), size=draws)


def differences(
    loss_KC: np.ndarray, to_B: np.ndarray, tokens_C: np.ndarray, weight_BC: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mean loss of all candidates less that of one, in nats per supervised token, and their standard errors.

    d = Σ_i (a_i − b_i) / Σ_i n_i with n_i the tokens of example i: a ratio of sums, so the linearised residual
    of cluster c is e_c = Σ_{i∈c} (a_i − b_i − d·n_i) and SE = √(C/(C−1)·Σ e_c²) / Σ n_i (Cochran 1977, 6.4).
    Examples of one document share what is easy or hard about it, so they make one cluster.

    Args:
        to_B: that one, for each draw.
        weight_BC: how often each cluster counts.

    Returns:
        (d, SE), [B, K] each; SE is NaN with fewer than two clusters, where nothing is known of the spread.
    """
    C = len(tokens_C)
    total_B1, weight_BC1 = (weight_BC @ tokens_C)[:, None], weight_BC[:, :, None].astype(float)
    e_BKC = loss_KC - loss_KC[to_B][:, None]
    d_BK = (e_BKC @ weight_BC1)[:, :, 0] / total_B1
    if C < 2:
        return d_BK, np.full_like(d_BK, np.nan)
    e_BKC -= d_BK[:, :, None] * tokens_C
    return d_BK, np.sqrt(C / (C - 1) * (np.square(e_BKC, out=e_BKC) @ weight_BC1)[:, :, 0]) / total_B1


def paired_difference(
    a_N: np.ndarray, b_N: np.ndarray, tokens_N: np.ndarray, cluster_N: np.ndarray
) -> tuple[float, float]:
    """The mean loss of a minus that of b, and its standard error: see `differences`."""
    *loss_KC, tokens_C = by_cluster(np.stack([b_N, a_N, tokens_N]), cluster_N)
    d_1K, se_1K = differences(np.stack(loss_KC), np.zeros(1, int), tokens_C, np.ones((1, len(tokens_C))))
    return float(d_1K[0, 1]), float(se_1K[0, 1])


def mean_and_se(loss_N: np.ndarray, tokens_N: np.ndarray, cluster_N: np.ndarray) -> tuple[float, float]:
    """A candidate's own loss in nats per supervised token and its (unpaired) standard error."""
    return paired_difference(loss_N, np.zeros_like(loss_N), tokens_N, cluster_N)
