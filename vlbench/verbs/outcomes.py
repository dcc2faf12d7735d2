"""Stored results back to per-example outcomes: the adapter that made the rows scores them again, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vlbench.core.catalog import ADAPTERS
from vlbench.core.config import parse
from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes, Result
from vlbench.stats.intervals import mean_of
from vlbench.store.results import ResultStore

_TOLERANCE = 1e-6


def outcomes_from(store: ResultStore) -> Callable[[Result], Mapping[str, Outcomes]]:
    """A function from a stored result to its outcomes by metric, each result read once."""
    known: dict[tuple[str, str, int], Mapping[str, Outcomes]] = {}

    def outcomes_of(result: Result) -> Mapping[str, Outcomes]:
        key = (result.model.name, result.task, result.task_version)
        if key not in known:
            known[key] = _read(store, result)
        return known[key]

    return outcomes_of


def sound_results(
    results: Sequence[Result], outcomes_of: Callable[[Result], Mapping[str, Outcomes]]
) -> tuple[list[Result], list[str]]:
    """The results whose rows can be read and say the same number, and one line for each of the others."""
    sound, problems = [], []
    for result in results:
        try:
            outcomes_of(result)
        except UserError as error:
            problems.append(str(error))
        else:
            sound.append(result)
    return sound, problems


def _read(store: ResultStore, result: Result) -> Mapping[str, Outcomes]:
    path = store.path(result.model.name, result.task, result.task_version)
    if result.metric not in result.estimates:
        raise UserError(f"{path}: its headline metric {result.metric!r} is not among its estimates; evaluate it again")
    try:
        adapter = ADAPTERS.get(result.adapter)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    config = parse(adapter.Config, result.config, where=str(path))
    rows = store.rows(result)
    try:
        outcomes: Mapping[str, Outcomes] = adapter.outcomes(rows, config)
    except KeyError as error:
        raise UserError(f"{path}: its rows lack the column {error}, which the adapter reads; evaluate again") from None
    for metric, values in outcomes.items():
        stored = result.estimates.get(metric)
        if stored is not None and abs(mean_of(values) - stored.value) > _TOLERANCE:
            raise UserError(
                f"{path}: says {metric} {stored.value:.6f}, but its rows give {mean_of(values):.6f}; evaluate it again"
            )
    return outcomes
