"""Two models on the same examples: the difference, its interval, its p-value, and what could have been seen at all.

Both models meet the same hard images, so their errors go together and the difference is known far better than either
score: on 1,000 images with 70 against 30 discordant ones an unpaired test says z = 1.9, the paired one z = 4.

M models, N values, C clusters, B bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special

from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes
from vlbench.stats.intervals import (
    CONFIDENCE,
    Z95,
    bootstrap_means,
    check_outcomes,
    is_plain_count,
    sum_clusters,
    wilson,
)

POWER = 0.8
REPLICATES = 10_000
"""Paired bootstrap: the smallest p is 1 / (B + 1), which has to survive Holm's correction over a table's pairs."""
REPLICATES_PER_PAIR = 80
"""With M models' pairs B grows to four times the pairs over 5%, so that the first step of Holm stays within reach."""

_Z_POWER = float(special.ndtri(POWER))
_FEWEST_DISCORDANT = 6
"""Six discordant examples, all one way, are the fewest with which the exact two-sided McNemar test reaches 5%."""
_ROUNDING = 1e-12

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class PairedTest:
    """The first model minus the second."""

    diff: float
    lo: float
    """Lower end of the 95% interval of the difference."""
    hi: float
    p: float
    """Two-sided, not adjusted for other comparisons; never zero."""
    method: str
    n: int
    n_clusters: int
    mde: float
    """Minimum detectable effect: the smallest true difference found with 80% power at a two-sided 5%."""


def compare_outcomes(a: Outcomes, b: Outcomes) -> PairedTest:
    """Test ``a`` against ``b`` on the same examples, joined on their ids.

    Right-or-wrong values, one a cluster, without weights or strata: exact McNemar (a binomial test on the discordant
    pairs), with Newcombe's interval of a paired difference (1998, method 10). Everything else: a paired bootstrap over
    clusters (with strata, of the mean over strata: see ``stats.intervals``), percentile interval, and
    ``p = (1 + #{|d* - d| >= |d|}) / (B + 1)``: how often a resampled difference lies as far from the observed d as d
    lies from zero. Of a metric that is no mean (average precision, ROC-AUC) the values are pseudo-values.

    ``mde`` is ``(z_0.975 + z_0.8) * se``. For McNemar se is ``sqrt(discordant) / n``, its value where the models are
    equal, and at least 6 / n is needed (five discordant pairs never reach 5%); for the bootstrap it is the standard
    deviation of the replicates. It depends on how much the two models disagree, so it belongs to this pair alone.

    Raises:
        UserError: where the two are on different examples, units, weights or strata, or a value is not finite.
    """
    return compare_all([a, b])[0, 1]


def compare_all(models: Sequence[Outcomes]) -> dict[tuple[int, int], PairedTest]:
    """``compare_outcomes`` of every pair (i, j), i < j. The bootstrap draws its resamples once for all pairs."""
    assert len(models) >= 2, "a comparison needs two models"
    first, values_NM = models[0], _join(models)
    pairs = list(combinations(range(len(models)), 2))
    if all(m.binary for m in models) and is_plain_count(first):
        return {(i, j): _mcnemar(values_NM[:, i] > 0, values_NM[:, j] > 0) for i, j in pairs}
    units = [sum_clusters(values_N, first.clusters, first.weights, first.strata) for values_N in values_NM.T]
    n, n_clusters, means_M = len(values_NM), units[0].n_clusters, [unit.mean for unit in units]
    B = max(REPLICATES, REPLICATES_PER_PAIR * len(pairs))
    means_BM = bootstrap_means(units, B=B)
    return {
        (i, j): _bootstrap_test(
            means_M[i] - means_M[j],
            means_BM[:, i] - means_BM[:, j],
            n=n,
            n_clusters=n_clusters,
            of="jackknife pseudo-values, " if first.pseudo else "",
        )
        for i, j in pairs
    }


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """95% interval of the paired difference ``(only_a - only_b) / n``: Newcombe 1998 (Stat Med 17:2635), method 10.

    It joins the two Wilson intervals through the correlation of the pairs; it stays within [-1, 1] and has a width
    where no pair is discordant.
    """
    n = both + only_a + only_b + neither
    p_a, p_b = (both + only_a) / n, (both + only_b) / n
    (lo_a, hi_a), (lo_b, hi_b) = wilson(both + only_a, n), wilson(both + only_b, n)
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    excess = float(both * neither - only_a * only_b)
    if excess > 0:
        excess = max(excess - n / 2, 0.0)
    phi = excess / math.sqrt(product) if product else 0.0
    diff = p_a - p_b
    below = _norm(p_a - lo_a, hi_b - p_b, phi)
    above = _norm(hi_a - p_a, p_b - lo_b, phi)
    return diff - below, diff + above


def _mcnemar(right_a_N: NDArray[np.bool_], right_b_N: NDArray[np.bool_]) -> PairedTest:
    n = len(right_a_N)
    only_a, only_b = int((right_a_N & ~right_b_N).sum()), int((~right_a_N & right_b_N).sum())
    both = int((right_a_N & right_b_N).sum())
    discordant = only_a + only_b
    # What scipy's binomtest gives at one half, where both tails are equal, without its search for the other tail.
    p = min(1.0, 2 * float(special.bdtr(min(only_a, only_b), discordant, 0.5))) if discordant else 1.0
    lo, hi = newcombe(both, only_a, only_b, n - both - discordant)
    mde = max((Z95 + _Z_POWER) * math.sqrt(discordant), _FEWEST_DISCORDANT) / n
    return PairedTest(
        diff=(only_a - only_b) / n, lo=lo, hi=hi, p=p, method="exact McNemar", n=n, n_clusters=n, mde=min(mde, 1.0)
    )


def _bootstrap_test(diff: float, replicates_B: Doubles, *, n: int, n_clusters: int, of: str) -> PairedTest:
    B = len(replicates_B)
    method = f"{of}paired cluster bootstrap B={B}"
    if n_clusters == 1:  # every replicate is the sample itself: nothing can be said
        return PairedTest(diff=diff, lo=-1.0, hi=1.0, p=1.0, method=method, n=n, n_clusters=1, mde=1.0)
    far = int((np.abs(replicates_B - diff) >= abs(diff) - _ROUNDING).sum())
    tail = (1 - CONFIDENCE) / 2
    lo, hi = (float(q) for q in np.quantile(replicates_B, [tail, 1 - tail]))
    mde = (Z95 + _Z_POWER) * float(np.std(replicates_B, ddof=1))
    if not mde:  # two models that agree everywhere: resampling shows no spread, yet a difference could have been missed
        mde = min(_FEWEST_DISCORDANT / n_clusters, 1.0)
    return PairedTest(
        diff=diff,
        lo=min(lo, diff),
        hi=max(hi, diff),
        p=(1 + far) / (B + 1),
        method=method,
        n=n,
        n_clusters=n_clusters,
        mde=mde,
    )


def _join(models: Sequence[Outcomes]) -> Doubles:
    """(N, M) values in the first model's order of ids. Raises UserError where the others have other examples."""
    first = models[0]
    columns = [check_outcomes(first)]
    place = {name: position for position, name in enumerate(first.ids)}
    if len(place) != len(first.ids):
        raise UserError(f"{len(first.ids) - len(place)} example ids occur twice: outcomes cannot be paired")
    for other in models[1:]:
        values = check_outcomes(other)
        if len(set(other.ids)) != len(other.ids):
            raise UserError(
                f"{len(other.ids) - len(set(other.ids))} example ids occur twice: outcomes cannot be paired"
            )
        different = place.keys() ^ set(other.ids)
        if different:
            absent, extra = len(place.keys() & different), len(different - place.keys())
            raise UserError(
                f"the two models were measured on different examples ({absent} only in the first, {extra} only in the "
                f"second, for instance {min(different)!r}): evaluate both on the same data"
            )
        order = np.array([place[name] for name in other.ids])
        back = np.argsort(order)
        _check_units(first, other, back)
        columns.append(values[back])
    return np.column_stack(columns)


def _check_units(first: Outcomes, other: Outcomes, back_N: NDArray[np.int64]) -> None:
    """The same cluster, weight and stratum must stand behind the same id in both."""
    if [other.clusters[position] for position in back_N.tolist()] != list(first.clusters):
        raise UserError("the two models' outcomes name different clusters for the same examples: evaluate both again")
    mine, theirs = first.weights, other.weights
    if (mine is None) != (theirs is None):
        raise UserError("one model's outcomes are weighted, the other's are not: evaluate both again")
    if mine is not None and theirs is not None and not np.allclose(np.asarray(theirs)[back_N], mine, rtol=1e-9, atol=0):
        raise UserError("the two models' outcomes have different weights for the same examples: evaluate both again")
    own, others = first.strata, other.strata
    if (own is None) != (others is None) or (
        own is not None and others is not None and (np.asarray(others)[back_N] != np.asarray(own)).any()
    ):
        raise UserError(
            "the two models' outcomes have different strata (classes) for the same examples: evaluate both again"
        )


def _norm(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))
