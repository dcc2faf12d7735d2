from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes
from vlbench.stats.intervals import wilson
from vlbench.stats.paired import compare_all, compare_outcomes, newcombe


def outcomes(values, clusters=None, *, binary=True, weights=None, strata=None) -> Outcomes:
    ids, values = [f"img{i:05d}" for i in range(len(values))], np.asarray(values, dtype=float)
    return Outcomes(ids, values, clusters or ids, binary=binary, weights=weights, strata=strata)


def table(both: int, only_a: int, only_b: int, neither: int) -> tuple[Outcomes, Outcomes]:
    counts = [both, only_a, only_b, neither]
    return outcomes(np.repeat([1, 1, 0, 0], counts)), outcomes(np.repeat([1, 0, 1, 0], counts))


def draw_table(rng: np.random.Generator, n: int, discordant: float, diff: float) -> tuple[Outcomes, Outcomes]:
    chances = [0.6 - discordant / 2, (discordant + diff) / 2, (discordant - diff) / 2, 0.4 - discordant / 2]
    return table(*rng.multinomial(n, chances))


# ----------------------------------------------------------------------------------------------------- McNemar


def test_mcnemar_is_the_binomial_tail() -> None:
    a, b = table(30, 9, 2, 10)
    tail = sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11
    found = compare_outcomes(a, b)
    assert found.p == pytest.approx(2 * tail, abs=1e-12)
    assert found.diff == pytest.approx(7 / 51)
    assert (found.method, found.n, found.n_clusters) == ("exact McNemar", 51, 51)


def test_mcnemar_sees_what_an_unpaired_test_misses() -> None:
    # 1,000 images, 70 right for A alone and 30 for B alone: z = 40 / sqrt(100) = 4; unpaired 1.95.
    found = compare_outcomes(*table(650, 70, 30, 250))
    z_paired = stats.norm.isf(found.p / 2)
    p_a, p_b = 0.72, 0.68
    z_unpaired = (p_a - p_b) / math.sqrt(p_a * (1 - p_a) / 1000 + p_b * (1 - p_b) / 1000)
    print(f"z paired {z_paired:.2f}, unpaired {z_unpaired:.2f}")
    assert z_paired == pytest.approx(4.0, abs=0.12)
    assert z_unpaired < 1.96
    assert found.lo > 0


def test_mcnemar_without_a_discordant_pair_separates_nothing() -> None:
    found = compare_outcomes(*table(40, 0, 0, 10))
    assert (found.diff, found.p) == (0.0, 1.0)
    assert found.lo < 0 < found.hi
    assert found.mde == pytest.approx(6 / 50)


def test_mcnemar_keeps_its_level_under_the_null() -> None:
    rng = np.random.default_rng(0)
    p = np.array([compare_outcomes(*draw_table(rng, 400, 0.25, 0.0)).p for _ in range(600)])
    print(f"rejected under the null: {np.mean(p < 0.05):.3f}, median p {np.median(p):.2f}")
    assert 0.02 <= np.mean(p < 0.05) <= 0.06
    assert 0.4 < np.median(p) < 0.7


def test_newcombe_worked_example() -> None:
    # Newcombe 1998 (Stat Med 17:2635), table III: 36, 12, 2, 0, method 10.
    assert newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_newcombe_covers_95_percent() -> None:
    rng, runs, covered = np.random.default_rng(1), 1500, 0
    for _ in range(runs):
        lo, hi = newcombe(*(int(x) for x in rng.multinomial(200, [0.5, 0.15, 0.1, 0.25])))
        covered += lo <= 0.05 <= hi
    assert covered / runs == pytest.approx(0.95, abs=0.02)


# --------------------------------------------------------------------------------------------- paired bootstrap


def graded(rng: np.random.Generator, n_clusters: int, shift: float) -> tuple[Outcomes, Outcomes]:
    """Two models' values, three a cluster, that share how hard each cluster is; A is better by ``shift``."""
    clusters = [f"c{i // 3}" for i in range(3 * n_clusters)]
    hard = np.repeat(rng.random(n_clusters), 3)
    own = [np.repeat(rng.normal(0, 0.1, n_clusters), 3) + rng.normal(0, 0.1, 3 * n_clusters) for _ in "ab"]
    return (
        outcomes(hard + own[0] + shift, clusters, binary=False),
        outcomes(hard + own[1], clusters, binary=False),
    )


def test_bootstrap_p_is_near_uniform_under_the_null() -> None:
    rng = np.random.default_rng(2)
    tests = [compare_outcomes(*graded(rng, 60, 0.0)) for _ in range(300)]
    p = np.array([test.p for test in tests])
    print(f"rejected under the null: {np.mean(p < 0.05):.3f}, KS p {stats.kstest(p, 'uniform').pvalue:.3f}")
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(p < 0.05) <= 0.09
    assert np.mean([test.lo <= 0 <= test.hi for test in tests]) == pytest.approx(0.95, abs=0.04)


def test_bootstrap_agrees_with_the_paired_t_test_over_clusters() -> None:
    a, b = graded(np.random.default_rng(3), 400, 0.02)
    found = compare_outcomes(a, b)
    means = (a.values - b.values).reshape(-1, 3).mean(axis=1)
    oracle = stats.ttest_1samp(means, 0.0)
    assert found.diff == pytest.approx(means.mean(), abs=1e-12)
    assert found.p == pytest.approx(oracle.pvalue, abs=0.01)
    assert (found.lo, found.hi) == pytest.approx(tuple(oracle.confidence_interval(0.95)), abs=0.001)
    assert found.mde == pytest.approx(2.8016 * stats.sem(means), rel=0.05)
    assert (found.n, found.n_clusters) == (1200, 400)


def test_bootstrap_p_is_never_zero() -> None:
    rng = np.random.default_rng(4)
    values = rng.random(200)
    found = compare_outcomes(outcomes(values + 1, binary=False), outcomes(values, binary=False))
    assert found.p == pytest.approx(1 / 10_001)


def test_bootstrap_of_equal_models_separates_nothing() -> None:
    values = np.random.default_rng(5).random(100)
    found = compare_outcomes(outcomes(values, binary=False), outcomes(values, binary=False))
    assert (found.diff, found.lo, found.hi, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert found.mde == pytest.approx(0.06)


def test_bootstrap_of_one_cluster_separates_nothing() -> None:
    clusters = ["only"] * 4
    found = compare_outcomes(outcomes([1, 1, 1, 1], clusters), outcomes([0, 0, 0, 0], clusters))
    assert (found.diff, found.p, found.lo, found.hi) == (1.0, 1.0, -1.0, 1.0)


def by_class(rng: np.random.Generator, n: int, shift: float) -> tuple[Outcomes, Outcomes]:
    """Two models that share how hard each image is, over five classes of very different size and recall."""
    strata = rng.choice(5, n, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    p, hard = np.linspace(0.2, 0.9, 5)[strata], rng.random(n)
    own = [np.where(rng.random(n) < 0.3, rng.random(n), hard) for _ in "ab"]
    return outcomes(own[0] < p + shift, strata=strata), outcomes(own[1] < p, strata=strata)


def test_strata_bootstrap_is_the_brute_force_one() -> None:
    rng = np.random.default_rng(10)
    a, b = by_class(rng, 400, 0.05)
    found = compare_outcomes(a, b)

    def diff(rows: np.ndarray) -> float:
        values, strata = a.values[rows] - b.values[rows], a.strata[rows]
        return np.mean([values[strata == s].mean() for s in np.unique(strata)])

    brute = np.array([diff(rng.integers(0, 400, 400)) for _ in range(4000)])
    assert found.method == "paired cluster bootstrap B=10000"
    assert found.diff == pytest.approx(diff(np.arange(400)), abs=1e-12)
    assert found.mde == pytest.approx(2.8016 * np.std(brute), rel=0.05)
    assert (found.lo, found.hi) == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=0.006)
    assert found.p == pytest.approx((np.abs(brute - found.diff) >= abs(found.diff)).mean(), abs=0.03)


def test_strata_bootstrap_keeps_its_level_under_the_null() -> None:
    rng = np.random.default_rng(11)
    tests = [compare_outcomes(*by_class(rng, 200, 0.0)) for _ in range(120)]
    p = np.array([test.p for test in tests])
    print(f"rejected under the null: {np.mean(p < 0.05):.3f}, KS p {stats.kstest(p, 'uniform').pvalue:.3f}")
    assert 0.005 <= np.mean(p < 0.05) <= 0.11
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_strata_bootstrap_of_equal_models_separates_nothing() -> None:
    a, _ = by_class(np.random.default_rng(12), 100, 0.0)
    found = compare_outcomes(a, a)
    assert (found.diff, found.lo, found.hi, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert found.mde == pytest.approx(0.06)


# ----------------------------------------------------------------------------------------------------- both kinds


@pytest.mark.parametrize("kind", ["binary", "graded"])
def test_compare_is_antisymmetric(kind: str) -> None:
    rng = np.random.default_rng(6)
    a, b = draw_table(rng, 300, 0.3, 0.05) if kind == "binary" else graded(rng, 50, 0.03)
    ab, ba = compare_outcomes(a, b), compare_outcomes(b, a)
    assert (ba.diff, ba.lo, ba.hi) == pytest.approx((-ab.diff, -ab.hi, -ab.lo), abs=1e-4)
    assert (ba.p, ba.mde) == pytest.approx((ab.p, ab.mde))


@pytest.mark.parametrize("kind", ["binary", "graded", "strata"])
def test_compare_joins_on_ids(kind: str) -> None:
    rng = np.random.default_rng(7)
    if kind == "strata":
        a, b = by_class(rng, 100, 0.03)
    else:
        a, b = draw_table(rng, 300, 0.3, 0.05) if kind == "binary" else graded(rng, 50, 0.03)
    order = rng.permutation(len(b.ids))
    shuffled = Outcomes(
        ids=[b.ids[i] for i in order],
        values=b.values[order],
        clusters=[b.clusters[i] for i in order],
        binary=b.binary,
        strata=None if b.strata is None else b.strata[order],
    )
    assert compare_outcomes(a, shuffled) == compare_outcomes(a, b)


def test_compare_all_gives_what_each_pair_gives() -> None:
    a, b = graded(np.random.default_rng(8), 50, 0.03)
    c = replace(a, values=a.values[::-1].copy())
    every = compare_all([a, b, c])
    assert list(every) == [(0, 1), (0, 2), (1, 2)]
    assert every[1, 2].p == pytest.approx(compare_outcomes(b, c).p)
    assert every[0, 1].lo == pytest.approx(compare_outcomes(a, b).lo)


def test_mde_is_found_with_80_percent_power() -> None:
    rng = np.random.default_rng(9)
    mde = compare_outcomes(*table(540, 60, 60, 340)).mde
    power = np.mean([compare_outcomes(*draw_table(rng, 1000, 0.12, mde)).p < 0.05 for _ in range(400)])
    print(f"mde {mde:.4f}, power there {power:.2f}")
    assert 0.72 <= power <= 0.88


def test_compare_says_how_many_examples_differ() -> None:
    a, b = table(3, 2, 1, 1)
    other = replace(b, ids=[*b.ids[:-2], "x", "y"], clusters=[*b.clusters[:-2], "x", "y"])
    with pytest.raises(UserError, match="2 only in the first, 2 only in the second"):
        compare_outcomes(a, other)
    shorter = outcomes(b.values[:-1])
    with pytest.raises(UserError, match="1 only in the first, 0 only in the second"):
        compare_outcomes(a, shorter)


def test_compare_refuses_other_units_weights_and_double_ids() -> None:
    a, b = table(3, 2, 1, 1)
    with pytest.raises(UserError, match="clusters"):
        compare_outcomes(a, replace(b, clusters=["z"] * 7))
    with pytest.raises(UserError, match="weighted"):
        compare_outcomes(a, replace(b, weights=np.ones(7)))
    with pytest.raises(UserError, match="weights"):
        compare_outcomes(replace(a, weights=np.ones(7)), replace(b, weights=np.arange(1.0, 8.0)))
    with pytest.raises(UserError, match="strata"):
        compare_outcomes(a, replace(b, strata=np.ones(7)))
    with pytest.raises(UserError, match="strata"):
        compare_outcomes(replace(a, strata=np.ones(7)), replace(b, strata=np.arange(7)))
    with pytest.raises(UserError, match="twice"):
        compare_outcomes(replace(a, ids=["x"] * 7), b)
    with pytest.raises(UserError, match="not a finite number"):
        compare_outcomes(replace(a, binary=False), replace(b, values=np.full(7, np.nan), binary=False))


def test_newcombe_without_variation_is_as_wide_as_its_parts() -> None:
    lo, hi = newcombe(0, 0, 0, 50)
    assert hi == pytest.approx(wilson(0, 50)[1])
    assert lo == pytest.approx(-hi)
