from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes
from vlbench.stats import intervals
from vlbench.stats.intervals import cluster_bootstrap, estimate, mean_of, wilson


def outcomes(values, clusters=None, *, binary=True, weights=None, strata=None) -> Outcomes:
    ids, values = [f"img{i:05d}" for i in range(len(values))], np.asarray(values)
    return Outcomes(ids, values, clusters or ids, binary=binary, weights=weights, strata=strata)


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


@pytest.mark.parametrize("n", [1, 2, 17, 1000, 2_000_003])
def test_wilson_equals_scipy(n: int) -> None:
    from scipy.stats import binomtest

    for k in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-14)


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


# -------------------------------------------------------------------------------------------- means over strata


def brute_macro(values: np.ndarray, strata: np.ndarray) -> float:
    return float(np.mean([values[strata == s].mean() for s in np.unique(strata)]))


def test_strata_bootstrap_is_the_brute_force_one() -> None:
    # 60 clusters of one to four values, some across strata; one stratum so small that replicates can miss it.
    rng = np.random.default_rng(10)
    clusters = np.repeat(np.arange(60), rng.integers(1, 5, 60))
    strata = np.where(rng.random(len(clusters)) < 0.8, clusters % 4, rng.integers(0, 4, len(clusters)))
    strata[:2] = 9
    values = (rng.random(len(clusters)) < np.array([0.1, 0.4, 0.7, 0.95, 0, 0, 0, 0, 0, 0.5])[strata]).astype(float)
    found = cluster_bootstrap(values, clusters, strata=strata, B=4000)
    means, missed = [], 0
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(clusters == c) for c in rng.integers(0, 60, 60)])
        missed += 9 not in strata[rows]
        means.append(brute_macro(values[rows], strata[rows]))
    print(f"se {found.se:.4f}, brute force {np.std(means):.4f}, missed the small stratum {missed / 4000:.2f}")
    assert missed > 400
    assert found.value == pytest.approx(brute_macro(values, strata), abs=1e-12)
    assert found.se == pytest.approx(np.std(means), rel=0.05)
    assert (found.lo, found.hi) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)


def test_strata_of_different_means_add_no_error() -> None:
    # As a ratio with weights of one over the stratum's size, the spread between strata would count as error.
    strata = np.repeat(np.arange(10), 100)
    p = np.tile([0.1, 0.95], 5)
    values = (np.tile(np.arange(100), 10) < (100 * p)[strata]).astype(float)
    analytic = np.sqrt((p * (1 - p) / 100).sum()) / 10
    found = cluster_bootstrap(values, np.arange(1000), strata=strata, B=4000)
    weighted = cluster_bootstrap(values, np.arange(1000), weights=np.full(1000, 0.01), B=4000)
    print(f"se {found.se:.4f}, analytic {analytic:.4f}, as a weighted ratio {weighted.se:.4f}")
    assert found.value == pytest.approx(weighted.value)
    assert found.se == pytest.approx(analytic, rel=0.05)
    assert weighted.se > 1.8 * analytic


def test_strata_bootstrap_covers_95_percent() -> None:
    rng, p, runs = np.random.default_rng(11), np.array([0.1, 0.3, 0.6, 0.8, 0.95]), 400
    covered = 0
    for _ in range(runs):
        strata = rng.choice(5, 300, p=[0.4, 0.2, 0.2, 0.1, 0.1])
        found = cluster_bootstrap((rng.random(300) < p[strata]).astype(float), np.arange(300), strata=strata, B=300)
        covered += found.lo <= p.mean() <= found.hi
    print(f"coverage of a macro recall: {covered / runs:.3f}")
    assert 0.915 <= covered / runs <= 0.98


def test_one_stratum_is_no_stratum() -> None:
    rng = np.random.default_rng(12)
    values, clusters = rng.random(200), rng.integers(0, 50, 200)
    assert cluster_bootstrap(values, clusters, strata=np.full(200, 7)) == cluster_bootstrap(values, clusters)


def test_strata_bootstrap_does_not_depend_on_order_names_or_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(13)
    values, clusters, strata = rng.random(300), rng.integers(0, 50, 300), rng.integers(0, 7, 300)
    before = cluster_bootstrap(values, clusters, strata=strata)
    order = rng.permutation(300)
    names = np.array([f"class {s}" for s in strata])
    assert cluster_bootstrap(values[order], clusters[order], strata=names[order]) == before
    monkeypatch.setattr(intervals, "_BLOCK", 900)
    after = cluster_bootstrap(values, clusters, strata=strata)
    assert (after.lo, after.hi, after.se) == pytest.approx((before.lo, before.hi, before.se), abs=1e-12)


def test_strata_all_right_or_all_wrong_are_neither_certain_nor_spread() -> None:
    # Five classes of 100 always right, five never: the ends are those of 500 of 500 right and 0 of 500, halved.
    strata = np.repeat(np.arange(10), 100)
    found = estimate(outcomes((strata < 5).astype(float), strata=strata))
    assert found.value == 0.5
    assert found.lo == pytest.approx(0.5 - 0.5 * (1 - wilson(500, 500)[0]))
    assert found.hi == pytest.approx(0.5 + 0.5 * wilson(0, 500)[1])
    assert found.hi - found.lo < 0.01
    even = estimate(outcomes(np.ones(1000), strata=strata))
    assert (even.value, even.hi) == (1.0, 1.0)
    assert even.lo == pytest.approx(wilson(1000, 1000)[0]), "equal strata at one end: Wilson's interval itself"
    uneven = estimate(outcomes(np.ones(1000), strata=np.r_[np.full(990, 0), np.full(10, 1)]))
    assert uneven.lo == pytest.approx(wilson(20, 20)[0]), "half of the metric hangs on ten images"


def test_mean_of_is_the_value_of_the_estimate() -> None:
    rng = np.random.default_rng(14)
    values, groups = rng.random(100), rng.integers(0, 6, 100)
    for case in ({}, {"weights": rng.random(100)}, {"strata": groups}):
        case = outcomes(values, binary=False, **case)
        assert mean_of(case) == pytest.approx(estimate(case).value, abs=1e-12)


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
        outcomes([1, 0, 1, 0, 1, 1], strata=np.array([0, 0, 0, 1, 1, 1])),
    ],
    ids=["clustered", "graded", "weighted", "strata"],
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
