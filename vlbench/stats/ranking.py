"""Ranks that say no more than the tests behind them.

The rule: a model's rank is one plus the number of models that are **significantly better** than it, by a paired test
at 5% after Holm's correction over all pairs of the table's column. A column in which nothing is separated is all
rank 1. Being separated is not transitive, so the converse does not hold: two models of different rank may be tied with
each other and differ in what they are separated from. A winner is named only where one model is significantly better
than every other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ALPHA = 0.05


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjusted p-values (1979) in the order given.

    The k-th smallest of m (k from 0) is multiplied by m - k; none may be smaller than one before it, nor exceed 1.
    Comparing them with 5% keeps the chance of even one false separation among the m below 5%.
    """
    values = np.asarray(p, dtype=np.float64)
    assert values.ndim == 1, f"p-values come as one list, got the shape {values.shape}"
    assert ((values >= 0) & (values <= 1)).all(), "p-values lie in [0, 1]"
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def tie_groups(
    names: Sequence[str], values: ArrayLike, p_adjusted_MM: ArrayLike, *, alpha: float = ALPHA
) -> dict[str, int]:
    """Rank by model name, by the module's rule.

    Args:
        names: M distinct names.
        values: (M,) scores, larger is better.
        p_adjusted_MM: (M, M) symmetric adjusted p-values of the pairs; the diagonal is not looked at.
        alpha: the level.
    """
    assert len(set(names)) == len(names), "names must be distinct"
    beats = _beats(values, p_adjusted_MM, alpha)
    assert beats.shape == (len(names), len(names)), f"{len(names)} names, p-values of the shape {beats.shape}"
    return {name: 1 + int(beats[:, m].sum()) for m, name in enumerate(names)}


def winner(names: Sequence[str], values: ArrayLike, p_adjusted_MM: ArrayLike, *, alpha: float = ALPHA) -> str | None:
    """The one model significantly better than every other, or None."""
    beats: Any = _beats(values, p_adjusted_MM, alpha)
    for m, name in enumerate(names):
        if len(names) > 1 and beats[m].sum() == len(names) - 1:
            return name
    return None


def _beats(values: ArrayLike, p_adjusted_MM: ArrayLike, alpha: float) -> NDArray[np.bool_]:
    """(M, M): whether the row's model is significantly better than the column's."""
    scores, p = np.asarray(values, dtype=np.float64), np.asarray(p_adjusted_MM, dtype=np.float64)
    beats: NDArray[np.bool_] = (scores[:, None] > scores[None, :]) & (p < alpha)
    return beats
