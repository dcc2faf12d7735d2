"""Stored results back to per-example outcomes: the adapter that made the rows scores them again, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlbench.core.catalog import ADAPTERS
from vlbench.core.config import parse
from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes, Result, Rows
from vlbench.stats.intervals import mean_of
from vlbench.store.results import ResultStore

_TOLERANCE = 1e-6


class StoredOutcomes:
    """What the rows behind stored results say; each result's are read once. Raises UserError where they are damaged."""

    def __init__(self, store: ResultStore) -> None:
        self._store = store
        self._known: dict[tuple[str, str, int], tuple[Mapping[str, Outcomes], Mapping[str, Any]]] = {}

    def __call__(self, result: Result) -> Mapping[str, Outcomes]:
        """The outcomes by metric."""
        return self._read(result)[0]

    def meta(self, result: Result) -> Mapping[str, Any]:
        """What was stored with the rows as a whole: class names, chosen settings, notes."""
        return self._read(result)[1]

    def notes(self, result: Result) -> tuple[str, ...]:
        """What was noted about the data when ``result`` was measured."""
        return tuple(self.meta(result).get("notes", ()))

    def _read(self, result: Result) -> tuple[Mapping[str, Outcomes], Mapping[str, Any]]:
        key = (result.model.name, result.task, result.task_version)
        if key not in self._known:
            path = self._store.path(*key)
            rows = self._store.rows(result)
            self._known[key] = outcomes_of_rows(result, rows, path), rows.meta
        return self._known[key]


def outcomes_from(store: ResultStore) -> StoredOutcomes:
    """A function from a stored result to its outcomes by metric, each result read once."""
    return StoredOutcomes(store)


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


def outcomes_of_rows(result: Result, rows: Rows, path: Path) -> Mapping[str, Outcomes]:
    """The outcomes in the ``rows`` of ``result``, which was read from ``path``.

    Raises:
        UserError: where its adapter is unknown, a column is absent, or the rows say another number than the result.
    """
    if result.metric not in result.estimates:
        raise UserError(f"{path}: its headline metric {result.metric!r} is not among its estimates; evaluate it again")
    try:
        adapter = ADAPTERS.get(result.adapter)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    config = parse(adapter.Config, result.config, where=str(path))
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


def adapter_peer(name: str) -> str | None:
    """Whose own protocol the adapter ``name`` is; None: nobody else's."""
    peer: str | None = getattr(ADAPTERS.get(name), "peer", None)
    return peer


def adapter_defaults(name: str) -> dict[str, Any]:
    """The settings of the adapter ``name`` where a task card says nothing."""
    defaults: dict[str, Any] = ADAPTERS.get(name).Config().model_dump(mode="json")
    return defaults
