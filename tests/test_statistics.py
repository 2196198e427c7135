"""Standard errors of paired differences against resampling, the textbook and the truth.

Shapes: N examples, C clusters (documents), B resamples.
"""

import math

import numpy as np
import pytest

from rankrace.select.statistics import clearly, mean_and_se, paired_difference


def documents(rng: np.random.Generator, C: int, delta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences whose expectation is `delta` a token, in C documents of 1 to 6 examples of 1 to 40 tokens.

    What the examples of a document share varies by .3 nats a token, what they do not share by .2.
    """
    cluster_N = np.repeat(np.arange(C), rng.integers(1, 7, C))
    N = len(cluster_N)
    tokens_N = rng.integers(1, 41, N)
    d_N = tokens_N * (delta + 0.3 * rng.normal(size=C)[cluster_N] + 0.2 * rng.normal(size=N))
    return d_N, tokens_N, cluster_N


def test_the_error_is_that_of_resampling_whole_documents():
    """Within 5%: the bootstrap's own error at B = 4000 is 1.1%, and it lacks the factor √(C/(C−1)), .6%."""
    rng = np.random.default_rng(0)
    C, B = 80, 4000
    d_N, tokens_N, cluster_N = documents(rng, C, 0.05)
    other_N = rng.gamma(2.0, size=len(d_N))
    d, se = paired_difference(other_N + d_N, other_N, tokens_N, cluster_N)
    assert d == pytest.approx(d_N.sum() / tokens_N.sum(), rel=1e-12)
    members = [np.flatnonzero(cluster_N == c) for c in range(C)]
    resampled_B = np.empty(B)
    for b in range(B):
        drawn = np.concatenate([members[c] for c in rng.integers(0, C, C)])
        resampled_B[b] = d_N[drawn].sum() / tokens_N[drawn].sum()
    assert se == pytest.approx(resampled_B.std(ddof=1), rel=0.05)


def test_equal_lengths_and_single_documents_give_the_textbook_formula():
    """s/√N of the differences per token."""
    rng = np.random.default_rng(1)
    a_N, b_N = rng.normal(size=(2, 37))
    d, se = paired_difference(a_N, b_N, np.full(37, 5), np.arange(37))
    per_token_N = (a_N - b_N) / 5
    assert d == pytest.approx(per_token_N.mean(), rel=1e-12)
    assert se == pytest.approx(per_token_N.std(ddof=1) / math.sqrt(37), rel=1e-12)


def test_pairing_cancels_what_candidates_share():
    rng = np.random.default_rng(2)
    hard_N = 100 * rng.gamma(2.0, size=50)
    gap_N = 0.01 * rng.normal(size=50)
    ones, each = np.ones(50), np.arange(50)
    assert paired_difference(hard_N + gap_N, hard_N, ones, each)[1] == pytest.approx(0.01 / math.sqrt(50), rel=0.3)
    assert mean_and_se(hard_N, ones, each)[1] > 10


def test_copies_of_an_example_in_one_document_teach_nothing():
    rng = np.random.default_rng(3)
    d_N, tokens_N, cluster_N = documents(rng, 20, 0.1)
    once = paired_difference(d_N, 0 * d_N, tokens_N, cluster_N)
    d_N, tokens_N, cluster_N = (np.repeat(x, 10) for x in (d_N, tokens_N, cluster_N))
    assert paired_difference(d_N, 0 * d_N, tokens_N, cluster_N) == pytest.approx(once, rel=1e-12)
    # Taken for independent, they would seem to.
    assert paired_difference(d_N, 0 * d_N, tokens_N, np.arange(len(d_N)))[1] < 0.5 * once[1]


def test_the_names_and_the_order_of_documents_do_not_matter():
    rng = np.random.default_rng(4)
    d_N, tokens_N, cluster_N = documents(rng, 15, 0.0)
    plain = paired_difference(d_N, 0 * d_N, tokens_N, cluster_N)
    order = rng.permutation(len(d_N))
    renamed_N = np.array([f"article {c}" for c in cluster_N])
    shuffled = paired_difference(d_N[order], 0 * d_N, tokens_N[order], renamed_N[order])
    assert shuffled == pytest.approx(plain, rel=1e-9)
    assert paired_difference(0 * d_N, d_N, tokens_N, cluster_N) == pytest.approx((-plain[0], plain[1]))


@pytest.mark.parametrize("examples", [1, 64])
def test_one_document_says_nothing_about_the_spread(examples: int):
    d, se = paired_difference(np.full(examples, 3.0), np.ones(examples), np.full(examples, 4), np.zeros(examples))
    assert d == pytest.approx(0.5)
    assert math.isnan(se)


def test_coverage():
    """d ± 1.96 SE holds the truth in 95% of 2000 samples of 150 documents.

    Tolerance: four standard deviations of that share, 4·√(.95·.05/2000) = .0195; the normal quantile at 150
    documents costs .002 of it. Treating examples as independent fails by far more.
    """
    rng = np.random.default_rng(5)
    hits, naive_hits = 0, 0
    for _ in range(2000):
        d_N, tokens_N, cluster_N = documents(rng, 150, 0.03)
        d, se = paired_difference(d_N, 0 * d_N, tokens_N, cluster_N)
        _, naive = paired_difference(d_N, 0 * d_N, tokens_N, np.arange(len(d_N)))
        hits += abs(d - 0.03) <= 1.96 * se
        naive_hits += abs(d - 0.03) <= 1.96 * naive
    assert hits / 2000 == pytest.approx(0.95, abs=0.0195)
    assert naive_hits / 2000 < 0.85


@pytest.mark.parametrize(("documents_", "covered"), [(2, 0.62), (4, 0.80), (8, 0.88)])
def test_few_documents_cover_less(documents_: int, covered: float):
    """What `reason.LEAST_CLUSTERS` rests on: ±1.96 SE is no 95% interval then. Tolerance: 4·√(.24/2000)."""
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(2000):
        tokens_N = rng.integers(5, 60, documents_)
        d_N = tokens_N * (0.01 + 0.05 * rng.normal(size=documents_))
        d, se = paired_difference(d_N, 0 * d_N, tokens_N, np.arange(documents_))
        hits += abs(d - 0.01) <= 1.96 * se
    assert hits / 2000 == pytest.approx(covered, abs=0.044)


@pytest.mark.parametrize("documents_", [2, 3, 4, 8, 12, 200])
def test_few_documents_are_seldom_called_clear(documents_: int):
    """Two equal candidates: the error is estimated from the documents there are, and with few of them is often far
    too small. At most 5% of such differences, of either sign, may pass for one."""
    rng, tokens_N, cluster_N = (
        np.random.default_rng(documents_),
        np.ones(4 * documents_),
        np.arange(4 * documents_) // 4,
    )
    clear, two_errors = [], []
    for _ in range(2000):
        a_N = rng.normal(size=documents_).repeat(4)
        d, se = paired_difference(a_N, np.zeros_like(a_N), tokens_N, cluster_N)
        clear.append(clearly(abs(d), se, documents_))
        two_errors.append(abs(d) > 2 * se)
    assert np.mean(clear) <= 0.062  # 5%, and three errors of 2,000 draws
    assert np.mean(two_errors) > 0.25 or documents_ > 2, "what it guards from"


def test_what_is_unknown_is_never_clear():
    assert not clearly(1.0, float("nan"), 1)
    assert not clearly(1.0, float("nan"), 9)
    assert clearly(1.0, 0.0, 2)
    assert not clearly(0.0, 0.0, 2)
