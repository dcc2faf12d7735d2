"""Accuracy of visual entailment, over everything and by class (SNLI-VE: Xie et al., 1901.06706)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlbench.core.types import Outcomes
from vlbench.stats.grouped import by_group


def entailment_outcomes(
    ids: Sequence[str],
    predicted: Sequence[int],
    labels: Sequence[int],
    *,
    classes: Sequence[str],
    images: Sequence[str],
) -> dict[str, Outcomes]:
    """``accuracy`` and ``accuracy/CLASS``: the share of right predictions among the pairs of that true class.

    Args:
        ids: N ids of pairs.
        predicted: the class that the model says.
        labels: the true class.
        classes: class names by label.
        images: the image of each pair, which is the sampling unit.
    """
    right_N = (np.asarray(predicted) == np.asarray(labels)).astype(np.float64)
    whole = Outcomes(list(ids), right_N, list(images), binary=True)
    return by_group("accuracy", whole, [classes[label] for label in labels])
