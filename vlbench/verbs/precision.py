"""What bf16 changes: the same task measured once more with bf16 features, beside its fp32 result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlbench.core.types import Result, Rows

if TYPE_CHECKING:
    from vlbench.verbs.evaluate import Job

_SAID_OF_AN_EXAMPLE = ("pred", "rank", "correct", "prediction", "chosen")
"""Columns that hold what a model says of an example; the first that is there counts."""


def bf16_difference(result: Result, rows: Rows, job: Job, other: Rows) -> dict[str, Any]:
    """What a result stores of it.

    Args:
        result: the fp32 result of ``job``.
        rows: its rows.
        job: the task.
        other: those of the same backbone in bf16.

    Returns:
        ``metric``: the headline's name, ``difference``: its bf16 value minus its fp32 value, ``predictions_changed``:
        the share of examples (of queries, for retrieval) of which the model says something else; not where the metric
        is a ranking's (``map11``, say), in which every example moves a little with any other.
    """
    value = job.adapter.score(other, job.config)[result.metric].value
    found = {"metric": result.metric, "difference": value - result.estimates[result.metric].value}
    changed = _share_changed(rows, other, job, result.metric)
    return found if changed is None else {**found, "predictions_changed": changed}


def say_difference(result: Result) -> None:
    """One line for a person."""
    found = result.settings["bf16_difference"]
    share = found.get("predictions_changed")
    changed = "" if share is None else f", {100 * share:.2f}% of predictions changed"
    print(f"  bf16: {found['metric']} {100 * found['difference']:+.2f} points{changed}", flush=True)


def _share_changed(rows: Rows, other: Rows, job: Job, metric: str) -> float | None:
    for column in _SAID_OF_AN_EXAMPLE:
        if column in rows.columns:
            return float(np.mean(np.asarray(rows[column]) != np.asarray(other[column])))
    before, after = (job.adapter.outcomes(each, job.config)[metric] for each in (rows, other))
    return None if before.pseudo else float(np.mean(before.values != after.values))
