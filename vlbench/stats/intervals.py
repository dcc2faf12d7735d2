"""95% intervals whose sampling unit is right.

A test set is a sample; what varies from one such sample to the next is its independent units (images, not the five
captions of each). Right-or-wrong values with one a unit get Wilson's interval; everything else is resampled by whole
units. Ignoring the units makes intervals too short: by 1.2 to 1.6 times with five captions an image.

A mean over strata (mean per-class recall) is resampled by the same units, and every replicate averages each stratum
again: how many images of a class a sample holds moves that class's precision, never the weight it has.

N values, C clusters, S strata, E cells (a cluster's values in one stratum; E = C without strata), B bootstrap
replicates, b those of one block, K columns that share their resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes

CONFIDENCE = 0.95
Z95 = float(special.ndtri(0.5 + CONFIDENCE / 2))

_BLOCK = 4_000_000
"""Resampled indices held at once: 32 MB, whatever the size of the test set."""

Doubles = NDArray[np.float64]


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of ``k`` right out of ``n`` (Wilson 1927, without continuity correction).

    scipy's ``binomtest(k, n).proportion_ci(method="wilson")`` is the same, but does the exact test first, which takes
    milliseconds where a leaderboard asks for thousands; and ``scipy.stats`` takes most of a second to import.
    """
    assert n >= 1, f"an interval needs at least one value, got n={n}"
    assert 0 <= k <= n, f"{k} right out of {n}"
    p, z2 = k / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n the formula gives the bound itself up to rounding; say it exactly.
    return (0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half)


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Any],
    *,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    B: int = 2000,
    seed: int = 0,
) -> Estimate:
    """The weighted mean of ``values``, or the mean of their strata's means, with a percentile interval.

    A replicate draws C clusters with replacement, whole and from all strata together. It is ``sum(w * v) / sum(w)``
    over what it drew; with strata, the plain mean of the means of those strata that it drew anything of.
    Deterministic in ``seed``, and independent of the order of the values.

    Where resampling can say nothing: one cluster alone gives the whole range [0, 1]; values that are all 0 or all 1
    give Wilson's interval over the clusters, since a bootstrap of equal values would claim to be certain. With strata
    that holds for every stratum alone: where each is all 0 or all 1, the lower end is what Wilson's interval leaves of
    the strata at 1, the upper end what it adds to those at 0, as if each stratum had as many clusters as the smallest
    at its end. This is Wilson's interval itself for equal strata at one end, and never shorter for unequal ones.

    Args:
        values: (N,) finite numbers.
        clusters: N labels of the independent unit behind each value.
        weights: (N,) non-negative, not all zero; None: all equal.
        strata: (N,) the group behind each value, not together with weights; None: one group.
        B: replicates.
        seed: of the resampling.

    Raises:
        UserError: where there is no value, or one cluster with values outside [0, 1].
    """
    units = sum_clusters(values, clusters, weights, strata)
    n, value = len(np.asarray(values)), units.mean
    degenerate = _degenerate_interval(np.asarray(values, dtype=np.float64), units)
    if degenerate is not None:
        lo, hi, se, method = degenerate
    else:
        replicates_B = bootstrap_means([units], B=B, seed=seed)[:, 0]
        tail = (1 - CONFIDENCE) / 2
        lo, hi = (float(q) for q in np.quantile(replicates_B, [tail, 1 - tail]))
        se, method = float(np.std(replicates_B, ddof=1)), f"cluster bootstrap B={B}"
    return Estimate(
        value=value, lo=min(lo, value), hi=max(hi, value), se=se, n=n, n_clusters=units.n_clusters, method=method
    )


def estimate(outcomes: Outcomes) -> Estimate:
    """One metric with its 95% interval.

    Wilson's where the values are right or wrong, one a cluster, without weights or strata, with the standard error
    ``sqrt(p (1 - p) / n)`` (zero at p = 0 and 1, where the interval is what to read); else the clustered bootstrap.
    Of pseudo-values the interval is cut to [0, 1], where the metrics lie that are made of them.

    Raises:
        UserError: where there is no value or one is not finite, naming the first such examples.
    """
    values = check_outcomes(outcomes)
    n = len(values)
    if outcomes.pseudo:
        return _of_pseudo_values(values, outcomes)
    if not is_plain_count(outcomes):
        return cluster_bootstrap(values, outcomes.clusters, weights=outcomes.weights, strata=outcomes.strata)
    k = int(values.sum())
    lo, hi = wilson(k, n)
    se = math.sqrt(k / n * (1 - k / n) / n)
    return Estimate(value=k / n, lo=lo, hi=hi, se=se, n=n, n_clusters=n, method="wilson")


def mean_of(outcomes: Outcomes) -> float:
    """The metric itself: the weighted mean of the values, or the plain mean of their strata's means."""
    values_N = np.asarray(outcomes.values, dtype=np.float64)
    if outcomes.strata is None:
        return float(np.average(values_N, weights=outcomes.weights))
    _, stratum_N = np.unique(np.asarray(outcomes.strata), return_inverse=True)
    return float((np.bincount(stratum_N, weights=values_N) / np.bincount(stratum_N)).mean())


def check_outcomes(outcomes: Outcomes) -> Doubles:
    """The values of ``outcomes``, checked: some, finite, one for each id and cluster, 0 or 1 where binary.

    Raises:
        UserError: where there is none, or values are not finite. NaN must never become a wrong answer in silence.
    """
    values = np.asarray(outcomes.values, dtype=np.float64)
    assert values.ndim == 1, f"outcomes are one value per unit, got the shape {values.shape}"
    sizes = {len(values), len(outcomes.ids), len(outcomes.clusters)}
    assert len(sizes) == 1, f"ids, values and clusters of outcomes differ in length: {sizes}"
    assert outcomes.strata is None or len(outcomes.strata) == len(values), "strata are one for each value"
    if not len(values):
        raise UserError("no example to measure: the reported split is empty")
    finite = np.isfinite(values)
    if outcomes.weights is not None:
        finite &= np.isfinite(np.asarray(outcomes.weights, dtype=np.float64))
    if not finite.all():
        bad = [str(outcomes.ids[position]) for position in np.flatnonzero(~finite).tolist()]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"the outcome is not a finite number for {len(bad)} of {len(values)} examples: {', '.join(bad[:3])}{more};"
            " look for NaN in the features of these images"
        )
    if outcomes.binary:
        assert np.isin(values, (0.0, 1.0)).all(), "binary outcomes must be 0 or 1"
    return values


def is_plain_count(outcomes: Outcomes) -> bool:
    """Whether the metric is a share of right units: right or wrong, one value a cluster, no weights or strata."""
    whole = outcomes.binary and outcomes.weights is None and outcomes.strata is None
    return whole and len(set(outcomes.clusters)) == len(outcomes.clusters)


def _of_pseudo_values(values_N: Doubles, outcomes: Outcomes) -> Estimate:
    if len(set(outcomes.clusters)) == 1:
        raise UserError("one independent image alone: average precision and ROC-AUC have no interval")
    found = cluster_bootstrap(values_N, outcomes.clusters)
    value, lo, hi = (min(max(number, 0.0), 1.0) for number in (found.value, found.lo, found.hi))
    method = f"jackknife pseudo-values, {found.method}"
    return found.model_copy(update={"value": value, "lo": lo, "hi": hi, "method": method})


# ------------------------------------------------------------------------------------- resampling by cluster


@dataclass(frozen=True)
class ClusterSums:
    """All that a mean needs of each cluster: its sums by stratum, ordered by stratum, then by cluster label."""

    sums_E: Doubles
    """Sum of weight times value."""
    weights_E: Doubles
    """Sum of weights."""
    cluster_E: NDArray[np.int64]
    """The cluster of a cell, from 0 to C - 1; without strata, all of them in order."""
    starts_S: NDArray[np.int64]
    """The first cell of each stratum."""
    n_clusters: int

    @property
    def mean(self) -> float:
        """The mean over strata of each one's weighted mean over all clusters."""
        return float(np.mean([sums.sum() / weights.sum() for sums, weights in zip(*self.by_stratum(), strict=True)]))

    def by_stratum(self) -> tuple[list[Doubles], list[Doubles]]:
        """Sums and weights of the clusters of each stratum."""
        return np.split(self.sums_E, self.starts_S[1:]), np.split(self.weights_E, self.starts_S[1:])


def sum_clusters(
    values: ArrayLike, clusters: Sequence[Any], weights: ArrayLike | None = None, strata: ArrayLike | None = None
) -> ClusterSums:
    """Sums by cluster, the same to the bit for every order of the input. Raises UserError where there is no value."""
    assert weights is None or strata is None, "a mean over strata has no weights"
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, dtype=np.float64)
    strata_N = np.zeros(len(values_N), dtype=np.int64) if strata is None else np.asarray(strata)
    same = values_N.shape == weights_N.shape == strata_N.shape == (len(clusters),)
    assert same, "values, clusters, weights and strata differ in length"
    if not len(values_N):
        raise UserError("no example to measure: the reported split is empty")
    assert (weights_N >= 0).all(), "weights must not be negative"
    assert weights_N.sum() > 0, "weights must not all be zero"
    labels, cluster_N = np.unique(np.asarray(clusters), return_inverse=True)
    names, stratum_N = np.unique(strata_N, return_inverse=True)
    cells_E, cell_N = np.unique(stratum_N * len(labels) + cluster_N, return_inverse=True)
    order = np.lexsort((weights_N, values_N, cell_N))  # floating-point sums depend on their order
    cell_N, products_N = cell_N[order], (weights_N * values_N)[order]
    sums_E, weights_E = (
        np.bincount(cell_N, weights=of_N, minlength=len(cells_E)).astype(np.float64)
        for of_N in (products_N, weights_N[order])
    )
    starts_S = np.searchsorted(cells_E // len(labels), np.arange(len(names)))
    return ClusterSums(sums_E, weights_E, cells_E % len(labels), starts_S, len(labels))


def bootstrap_means(columns: Sequence[ClusterSums], *, B: int, seed: int = 0) -> Doubles:
    """(B, K) means of resampled clusters; all K columns, of the same clusters and strata, see the same resamples.

    The first replicates do not depend on ``B``. Memory is bounded by the block, not by B times C.
    """
    assert B >= 2, f"a bootstrap needs replicates, got B={B}"
    units = columns[0]
    sums_EK = np.column_stack([column.sums_E for column in columns])
    means_of = _ratios if len(units.starts_S) == 1 else _stratum_means
    means = np.empty((B, len(columns)))
    done = 0
    for counts_bC in _resample_counts(units.n_clusters, B, seed, width=len(units.cluster_E)):
        means[done : done + len(counts_bC)] = means_of(counts_bC, sums_EK, units)
        done += len(counts_bC)
    return means


def _ratios(counts_bC: Doubles, sums_CK: Doubles, units: ClusterSums) -> Doubles:
    """(b, K) weighted means without strata."""
    columns = np.column_stack([sums_CK, units.weights_E])
    totals = counts_bC @ columns
    # A replicate that drew only clusters of weight zero has no mean; it takes the estimate itself.
    empty = totals[:, -1] <= 0
    totals[empty] = columns.sum(axis=0)
    means: Doubles = totals[:, :-1] / totals[:, -1:]
    return means


def _stratum_means(counts_bC: Doubles, sums_EK: Doubles, units: ClusterSums) -> Doubles:
    """(b, K) means over the strata that occur, of the means of what was drawn of each."""
    counts_bE = counts_bC[:, units.cluster_E]
    sizes_bS = np.add.reduceat(counts_bE * units.weights_E, units.starts_S, axis=1)
    occurs_bS = sizes_bS > 0
    sizes_bS[~occurs_bS] = 1.0  # their sums are zero
    n_strata_b = occurs_bS.sum(axis=1)
    means = [
        (np.add.reduceat(counts_bE * sums_E, units.starts_S, axis=1) / sizes_bS).sum(axis=1) / n_strata_b
        for sums_E in sums_EK.T
    ]
    return np.column_stack(means)


def _resample_counts(n_clusters: int, B: int, seed: int, *, width: int) -> Iterator[Doubles]:
    """How often each cluster is drawn: blocks of rows (b, C), B rows in all, each summing to C.

    ``width``: the most numbers that the caller needs for a row.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(n_clusters, width))
    for start in range(0, B, rows):
        b = min(rows, B - start)
        drawn = rng.integers(0, n_clusters, size=(b, n_clusters))
        drawn += np.arange(b)[:, None] * n_clusters
        yield np.bincount(drawn.ravel(), minlength=b * n_clusters).reshape(b, n_clusters).astype(np.float64)


def _degenerate_interval(values_N: Doubles, units: ClusterSums) -> tuple[float, float, float, str] | None:
    """(lo, hi, se, method) where resampling clusters cannot say anything, else None."""
    if units.n_clusters == 1:
        if values_N.min() < 0 or values_N.max() > 1:
            raise UserError("one independent example alone, with values outside [0, 1]: it has no interval")
        return 0.0, 1.0, 0.5, "one cluster: the whole range"
    if not np.isin(values_N, (0.0, 1.0)).all():
        return None
    if len(units.starts_S) == 1:
        if (values_N != values_N[0]).any():
            return None
        lo, hi = wilson(units.n_clusters * int(values_N[0]), units.n_clusters)
        return lo, hi, 0.0, "wilson over clusters: all equal"
    wrong: list[int] = []  # clusters of each stratum whose values are all 0
    right: list[int] = []  # all 1
    for sums, weights in zip(*units.by_stratum(), strict=True):
        if 0 < sums.sum() < weights.sum():
            return None
        (right if sums.sum() else wrong).append(len(sums))
    n_strata, lo, hi = len(units.starts_S), units.mean, units.mean
    if right:
        n = len(right) * min(right)
        lo -= len(right) / n_strata * (1 - wilson(n, n)[0])
    if wrong:
        n = len(wrong) * min(wrong)
        hi += len(wrong) / n_strata * wilson(0, n)[1]
    return lo, hi, 0.0, "wilson over clusters: all equal in each stratum"
