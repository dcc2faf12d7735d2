"""95% intervals whose sampling unit is right.

A test set is a sample; what varies from one such sample to the next is its independent units (images, not the five
captions of each). Right-or-wrong values with one a unit get Wilson's interval; everything else is resampled by whole
units. Ignoring the units makes intervals too short: by 1.2 to 1.6 times with five captions an image.

N values, C clusters, B bootstrap replicates, K columns that share their resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes

CONFIDENCE = 0.95
Z95 = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))

_BLOCK = 4_000_000
"""Resampled indices held at once: 32 MB, whatever the size of the test set."""

Doubles = NDArray[np.float64]


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of ``k`` right out of ``n`` (Wilson 1927, without continuity correction)."""
    assert n >= 1, f"an interval needs at least one value, got n={n}"
    assert 0 <= k <= n, f"{k} right out of {n}"
    interval = stats.binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
    # At 0 and n the formula gives the bound itself up to rounding; say it exactly.
    return (0.0 if k == 0 else float(interval.low), 1.0 if k == n else float(interval.high))


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[Any], *, weights: ArrayLike | None = None, B: int = 2000, seed: int = 0
) -> Estimate:
    """The weighted mean of ``values`` with a percentile interval from resampling whole clusters.

    A replicate draws C clusters with replacement and is ``sum(w * v) / sum(w)`` over what it drew. Deterministic in
    ``seed``, and independent of the order of the values.

    Where resampling can say nothing: one cluster alone gives the whole range [0, 1]; values that are all 0 or all 1
    give Wilson's interval over the clusters, since a bootstrap of equal values would claim to be certain.

    Args:
        values: (N,) finite numbers.
        clusters: N labels of the independent unit behind each value.
        weights: (N,) non-negative, not all zero; None: all equal.
        B: replicates.
        seed: of the resampling.

    Raises:
        UserError: where there is no value, or one cluster with values outside [0, 1].
    """
    units = sum_clusters(values, clusters, weights)
    n, value = len(np.asarray(values)), units.mean
    degenerate = _degenerate_interval(np.asarray(values, dtype=np.float64), units)
    if degenerate is not None:
        lo, hi, se, method = degenerate
    else:
        replicates_B = bootstrap_means(units.sums_C[:, None], units.weights_C, B=B, seed=seed)[:, 0]
        tail = (1 - CONFIDENCE) / 2
        lo, hi = (float(q) for q in np.quantile(replicates_B, [tail, 1 - tail]))
        se, method = float(np.std(replicates_B, ddof=1)), f"cluster bootstrap B={B}"
    return Estimate(
        value=value, lo=min(lo, value), hi=max(hi, value), se=se, n=n, n_clusters=len(units.sums_C), method=method
    )


def estimate(outcomes: Outcomes) -> Estimate:
    """One metric with its 95% interval.

    Wilson's where the values are right or wrong, one for each cluster, unweighted, with the standard error
    ``sqrt(p (1 - p) / n)`` (zero at p = 0 and 1, where the interval is what to read); else the clustered bootstrap.

    Raises:
        UserError: where there is no value or one is not finite, naming the first such examples.
    """
    values = check_outcomes(outcomes)
    n = len(values)
    if not (outcomes.binary and outcomes.weights is None and has_single_values(outcomes.clusters)):
        return cluster_bootstrap(values, outcomes.clusters, weights=outcomes.weights)
    k = int(values.sum())
    lo, hi = wilson(k, n)
    se = math.sqrt(k / n * (1 - k / n) / n)
    return Estimate(value=k / n, lo=lo, hi=hi, se=se, n=n, n_clusters=n, method="wilson")


def check_outcomes(outcomes: Outcomes) -> Doubles:
    """The values of ``outcomes``, checked: some, finite, one for each id and cluster, 0 or 1 where binary.

    Raises:
        UserError: where there is none, or values are not finite. NaN must never become a wrong answer in silence.
    """
    values = np.asarray(outcomes.values, dtype=np.float64)
    assert values.ndim == 1, f"outcomes are one value per unit, got the shape {values.shape}"
    sizes = {len(values), len(outcomes.ids), len(outcomes.clusters)}
    assert len(sizes) == 1, f"ids, values and clusters of outcomes differ in length: {sizes}"
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


def has_single_values(clusters: Sequence[Any]) -> bool:
    """Whether every cluster has exactly one value."""
    return len(set(clusters)) == len(clusters)


# ------------------------------------------------------------------------------------- resampling by cluster


@dataclass(frozen=True)
class ClusterSums:
    """All that a weighted mean needs of each cluster, in the order of the cluster labels."""

    sums_C: Doubles
    """Sum of weight times value."""
    weights_C: Doubles
    """Sum of weights."""

    @property
    def mean(self) -> float:
        """The weighted mean over all clusters."""
        return float(self.sums_C.sum() / self.weights_C.sum())


def sum_clusters(values: ArrayLike, clusters: Sequence[Any], weights: ArrayLike | None = None) -> ClusterSums:
    """Sums by cluster, the same to the bit for every order of the input. Raises UserError where there is no value."""
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, dtype=np.float64)
    assert values_N.shape == weights_N.shape == (len(clusters),), "values, clusters and weights differ in length"
    if not len(values_N):
        raise UserError("no example to measure: the reported split is empty")
    assert (weights_N >= 0).all(), "weights must not be negative"
    assert weights_N.sum() > 0, "weights must not all be zero"
    labels, cluster_N = np.unique(np.asarray(clusters), return_inverse=True)
    order = np.lexsort((weights_N, values_N, cluster_N))  # floating-point sums depend on their order
    cluster_N, products_N = cluster_N[order], (weights_N * values_N)[order]
    sums_C, weights_C = (
        np.bincount(cluster_N, weights=of_N, minlength=len(labels)).astype(np.float64)
        for of_N in (products_N, weights_N[order])
    )
    return ClusterSums(sums_C, weights_C)


def bootstrap_means(sums_CK: Doubles, weights_C: Doubles, *, B: int, seed: int = 0) -> Doubles:
    """(B, K) weighted means of resampled clusters; all K columns see the same resamples.

    The first replicates do not depend on ``B``. Memory is bounded by the block, not by B times C.
    """
    assert B >= 2, f"a bootstrap needs replicates, got B={B}"
    columns = np.column_stack([sums_CK, weights_C])
    means = np.empty((B, sums_CK.shape[1]))
    done = 0
    for counts_bC in _resample_counts(len(weights_C), B, seed):
        totals = counts_bC @ columns
        # A replicate that drew only clusters of weight zero has no mean; it takes the estimate itself.
        empty = totals[:, -1] <= 0
        totals[empty] = columns.sum(axis=0)
        means[done : done + len(totals)] = totals[:, :-1] / totals[:, -1:]
        done += len(totals)
    return means


def _resample_counts(n_clusters: int, B: int, seed: int) -> Iterator[Doubles]:
    """How often each cluster is drawn: blocks of rows (b, C), B rows in all, each summing to C."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n_clusters)
    for start in range(0, B, rows):
        b = min(rows, B - start)
        drawn = rng.integers(0, n_clusters, size=(b, n_clusters))
        drawn += np.arange(b)[:, None] * n_clusters
        yield np.bincount(drawn.ravel(), minlength=b * n_clusters).reshape(b, n_clusters).astype(np.float64)


def _degenerate_interval(values_N: Doubles, units: ClusterSums) -> tuple[float, float, float, str] | None:
    """(lo, hi, se, method) where resampling clusters cannot say anything, else None."""
    n_clusters = len(units.sums_C)
    if n_clusters == 1:
        if values_N.min() < 0 or values_N.max() > 1:
            raise UserError("one independent example alone, with values outside [0, 1]: it has no interval")
        return 0.0, 1.0, 0.5, "one cluster: the whole range"
    if (values_N == values_N[0]).all() and values_N[0] in (0.0, 1.0):
        lo, hi = wilson(n_clusters * int(values_N[0]), n_clusters)
        return lo, hi, 0.0, "wilson over clusters: all equal"
    return None
