from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes
from vlbench.stats import intervals
from vlbench.stats.intervals import cluster_bootstrap, estimate, wilson


def outcomes(values, clusters=None, *, binary=True, weights=None) -> Outcomes:
    ids = [f"img{i:05d}" for i in range(len(values))]
    return Outcomes(ids=ids, values=np.asarray(values), clusters=clusters or ids, binary=binary, weights=weights)


def correlated(rng: np.random.Generator, n_clusters: int, size: int, p: float, icc: float) -> np.ndarray:
    """(C, size) right-or-wrong values whose success rate varies from cluster to cluster (beta-binomial)."""
    a, b = p * (1 / icc - 1), (1 - p) * (1 / icc - 1)
    return (rng.random((n_clusters, size)) < rng.beta(a, b, (n_clusters, 1))).astype(float)


# ------------------------------------------------------------------------------------------------------ wilson


def test_wilson_equals_the_formula() -> None:
    k, n, z = 62, 100, 1.959963984540054
    centre = (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    assert wilson(k, n) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_wilson_worked_example() -> None:
    # Newcombe 1998 (Stat Med 17:857), table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_is_exact_at_the_ends_and_symmetric() -> None:
    assert wilson(0, 50)[0] == 0.0
    assert wilson(50, 50)[1] == 1.0
    lo, hi = wilson(13, 50)
    assert wilson(37, 50) == pytest.approx((1 - hi, 1 - lo), abs=1e-12)


@pytest.mark.parametrize("n", [100, 1000])
def test_wilson_covers_95_percent(n: int) -> None:
    k = np.arange(n + 1)
    bounds = np.array([wilson(int(each), n) for each in k])
    truths = np.linspace(0.02, 0.98, 97)
    coverage = [stats.binom.pmf(k, n, p)[(bounds[:, 0] <= p) & (p <= bounds[:, 1])].sum() for p in truths]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.89


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(AssertionError):
        wilson(3, 2)
    with pytest.raises(AssertionError):
        wilson(0, 0)


# ------------------------------------------------------------------------------------------- clustered bootstrap


def test_cluster_bootstrap_covers_95_percent_where_the_naive_interval_does_not() -> None:
    rng, p, runs = np.random.default_rng(1), 0.6, 400
    clusters = np.repeat(np.arange(80), 5)
    clustered = naive = 0
    for _ in range(runs):
        values = correlated(rng, 80, 5, p, icc=0.4).ravel()
        found = cluster_bootstrap(values, clusters, B=400)
        clustered += found.lo <= p <= found.hi
        lo, hi = wilson(int(values.sum()), len(values))
        naive += lo <= p <= hi
    print(f"coverage: clustered {clustered / runs:.3f}, naive {naive / runs:.3f}")
    assert 0.92 <= clustered / runs <= 0.98
    assert naive / runs < 0.85


def test_cluster_bootstrap_standard_error_matches_the_analytic_one() -> None:
    rng = np.random.default_rng(2)
    means = rng.random(400)
    found = cluster_bootstrap(np.repeat(means, 3), np.repeat(np.arange(400), 3))
    assert found.se == pytest.approx(np.std(means) / np.sqrt(400), rel=0.06)
    assert found.value == pytest.approx(means.mean(), abs=1e-12)
    assert (found.n, found.n_clusters) == (1200, 400)


def test_cluster_bootstrap_of_singletons_agrees_with_wilson() -> None:
    values = (np.arange(2000) % 10 < 7).astype(float)
    found = cluster_bootstrap(values, range(2000))
    assert (found.lo, found.hi) == pytest.approx(wilson(1400, 2000), abs=0.002)


def test_cluster_bootstrap_is_the_brute_force_one() -> None:
    rng = np.random.default_rng(3)
    clusters = rng.integers(0, 12, 60)
    values, weights = rng.random(60), rng.random(60)
    found = cluster_bootstrap(values, clusters, weights=weights, B=4000)
    labels = np.unique(clusters)
    means = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(clusters == c) for c in rng.choice(labels, len(labels))])
        means.append(np.average(values[rows], weights=weights[rows]))
    assert found.value == pytest.approx(np.average(values, weights=weights), abs=1e-12)
    assert found.se == pytest.approx(np.std(means), rel=0.06)
    assert (found.lo, found.hi) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)


def test_cluster_bootstrap_does_not_depend_on_order_or_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    clusters = np.array([f"image{c}" for c in rng.integers(0, 50, 300)])
    values, weights = rng.random(300), rng.random(300)
    before = cluster_bootstrap(values, clusters, weights=weights)
    order = rng.permutation(300)
    assert cluster_bootstrap(values[order], clusters[order], weights=weights[order]) == before
    monkeypatch.setattr(intervals, "_BLOCK", 500)
    after = cluster_bootstrap(values, clusters, weights=weights)
    assert (after.lo, after.hi, after.se) == pytest.approx((before.lo, before.hi, before.se), abs=1e-12)
    assert cluster_bootstrap(values, clusters, weights=weights, seed=1) != before


def test_cluster_bootstrap_of_equal_values_is_not_certain() -> None:
    found = cluster_bootstrap(np.ones(50), np.repeat(np.arange(10), 5))
    assert (found.value, found.hi) == (1.0, 1.0)
    assert found.lo == pytest.approx(wilson(10, 10)[0])
    half = cluster_bootstrap(np.full(50, 0.5), np.repeat(np.arange(10), 5))
    assert (half.lo, half.value, half.hi, half.se) == (0.5, 0.5, 0.5, 0.0)


def test_cluster_bootstrap_of_one_cluster_says_that_nothing_is_known() -> None:
    found = cluster_bootstrap([1.0, 0.0, 1.0], ["a", "a", "a"])
    assert (found.lo, found.hi, found.n_clusters) == (0.0, 1.0, 1)
    with pytest.raises(UserError, match="one independent example"):
        cluster_bootstrap([7.0], ["a"])


def test_cluster_bootstrap_survives_clusters_of_weight_zero() -> None:
    found = cluster_bootstrap([0.2, 0.8, 0.4], ["a", "b", "c"], weights=[0.0, 0.0, 1.0])
    assert (found.value, found.lo, found.hi) == pytest.approx((0.4, 0.4, 0.4))


# ------------------------------------------------------------------------------------------------------ estimate


def test_estimate_takes_wilson_where_it_applies() -> None:
    found = estimate(outcomes([1, 1, 0, 1]))
    assert found.method == "wilson"
    assert (found.lo, found.hi) == wilson(3, 4)
    assert found.se == pytest.approx(np.sqrt(0.75 * 0.25 / 4))
    assert (found.n, found.n_clusters) == (4, 4)


@pytest.mark.parametrize(
    "case",
    [
        outcomes([1, 1, 0, 1, 0, 0], ["a", "a", "b", "b", "c", "c"]),
        outcomes([0.5, 0.1, 0.9, 0.3], binary=False),
        outcomes([1, 0, 1, 1], weights=np.array([1.0, 2.0, 1.0, 1.0])),
    ],
    ids=["clustered", "graded", "weighted"],
)
def test_estimate_resamples_clusters_elsewhere(case: Outcomes) -> None:
    found = estimate(case)
    assert found.method == "cluster bootstrap B=2000"
    assert found.value == pytest.approx(np.average(case.values, weights=case.weights))
    assert found.lo < found.value < found.hi


def test_estimate_of_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="no example"):
        estimate(outcomes([]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_estimate_names_the_examples_that_are_not_finite(bad: float) -> None:
    with pytest.raises(UserError, match=r"2 of 5 examples: img00001, img00003"):
        estimate(outcomes([0.1, bad, 0.2, bad, 0.3], binary=False))


def test_estimate_refuses_values_that_are_not_right_or_wrong() -> None:
    with pytest.raises(AssertionError, match="0 or 1"):
        estimate(outcomes([0.5, 1.0]))
