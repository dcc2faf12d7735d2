"""One metric over everything and by groups: answer types of VQA, classes of entailment, splits of RefCOCO+."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vlbench.core.types import Outcomes


def by_group(name: str, outcomes: Outcomes, groups: Sequence[str]) -> dict[str, Outcomes]:
    """``{name: all, "name/group": those of the group, ...}``, the groups in alphabetical order.

    Args:
        name: of the metric.
        outcomes: its values.
        groups: the group of each value, or "" for one that belongs to the whole only.
    """
    assert len(groups) == len(outcomes.ids), f"{len(groups)} groups for {len(outcomes.ids)} values"
    group_N = np.asarray(groups, dtype=object)
    found = {name: outcomes}
    for group in sorted(set(groups) - {""}):
        found[f"{name}/{group}"] = _chosen(outcomes, np.flatnonzero(group_N == group))
    return found


def _chosen(outcomes: Outcomes, places: np.ndarray) -> Outcomes:
    return replace(
        outcomes,
        ids=[outcomes.ids[place] for place in places.tolist()],
        values=np.asarray(outcomes.values)[places],
        clusters=[outcomes.clusters[place] for place in places.tolist()],
        weights=None if outcomes.weights is None else outcomes.weights[places],
        strata=None if outcomes.strata is None else outcomes.strata[places],
    )
