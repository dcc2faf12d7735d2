"""Stored results as the columns of a table, each column holding only what may be compared.

The rule against mixing: two results share a column exactly when task, version, task fingerprint, data fingerprint,
split, resolved settings of the adapter and metric agree. A task that was run on two editions of its data, or under
two protocols, becomes two columns whose titles say what differs; they are never ranked against one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeAlias

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Estimate, Outcomes, Result
from vlbench.stats.paired import PairedTest, compare_all
from vlbench.stats.ranking import holm, tie_groups, winner

OutcomesOf: TypeAlias = Callable[[Result], Mapping[str, Outcomes]]
"""The per-example outcomes of a stored result, by metric. Raises UserError where its rows are damaged."""


@dataclass(frozen=True, order=True)
class Protocol:
    """All that must agree before two results may be compared."""

    task: str
    version: int
    metric: str
    card: str
    data: str
    settings: str

    @staticmethod
    def of(result: Result, metric: str | None = None) -> Protocol:
        """The protocol under which ``result`` was measured; ``metric`` None is its headline."""
        return Protocol(
            task=result.task,
            version=result.task_version,
            metric=metric or result.metric,
            card=result.task_fingerprint,
            data=f"{result.data.fingerprint} {result.data.split}",
            settings=fingerprint(result.config),
        )

    def differences(self, other: Protocol) -> list[str]:
        """What differs, in words."""
        words = {
            "version": "task version",
            "metric": "metric",
            "card": "task card",
            "data": "data",
            "settings": "adapter settings",
        }
        return [text for name, text in words.items() if getattr(self, name) != getattr(other, name)]


@dataclass
class Column:
    """One task under one protocol, with every model that was measured on it."""

    protocol: Protocol
    title: str
    results: dict[str, Result]
    """By row label."""
    ranks: dict[str, int] = field(default_factory=dict)
    best: str | None = None
    """The one model separated from every other."""
    tests: dict[tuple[str, str], PairedTest] = field(default_factory=dict)
    problem: str | None = None
    """Why there are no ranks."""

    def estimate(self, label: str) -> Estimate | None:
        """The cell of one row."""
        result = self.results.get(label)
        return result.estimates[self.protocol.metric] if result else None

    @property
    def interval_method(self) -> str:
        """How the intervals of this column were made."""
        return " or ".join(sorted({r.estimates[self.protocol.metric].method for r in self.results.values()}))

    @property
    def test_method(self) -> str:
        """How its pairs were tested."""
        return " or ".join(sorted({test.method for test in self.tests.values()}))


def row_labels(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """(model name, backbone fingerprint) → row label. Weights that changed under one name are two rows, said so."""
    keys = sorted({(result.model.name, result.model.backbone_fingerprint) for result in results})
    labels = {}
    for name, group in groupby(keys, key=lambda key: key[0]):
        members = list(group)
        for key in members:
            labels[key] = name if len(members) == 1 else f"{name} (weights {key[1][:6]})"
    return labels


def make_columns(results: Sequence[Result], outcomes_of: OutcomesOf) -> list[Column]:
    """The columns of ``results``, by task and protocol, each with its tests and ranks."""
    labels = row_labels(results)
    grouped: dict[Protocol, dict[str, Result]] = {}
    for result in results:
        label = labels[result.model.name, result.model.backbone_fingerprint]
        grouped.setdefault(Protocol.of(result), {})[label] = result
    columns = [
        Column(protocol, _title(protocol, list(grouped)), dict(sorted(grouped[protocol].items())))
        for protocol in sorted(grouped)
    ]
    for column in columns:
        _rank(column, outcomes_of)
    return columns


def _rank(column: Column, outcomes_of: OutcomesOf) -> None:
    labels = list(column.results)
    if len(labels) < 2:
        return
    try:
        outcomes = []
        for label in labels:
            by_metric = outcomes_of(column.results[label])
            if column.protocol.metric not in by_metric:
                raise UserError(f"{column.protocol.metric} has no value for a single example")
            outcomes.append(by_metric[column.protocol.metric])
        tests = compare_all(outcomes)
    except UserError as error:
        column.problem = str(error)
        return
    p_MM = np.ones((len(labels), len(labels)))
    for (i, j), p in zip(tests, holm([test.p for test in tests.values()]), strict=True):
        p_MM[i, j] = p_MM[j, i] = p
    values = [column.results[label].estimates[column.protocol.metric].value for label in labels]
    column.tests = {(labels[i], labels[j]): test for (i, j), test in tests.items()}
    column.ranks = tie_groups(labels, values, p_MM)
    column.best = winner(labels, values, p_MM)


def _title(protocol: Protocol, everything: Sequence[Protocol]) -> str:
    """The task's name without its kind, and whatever sets this column apart from others of the same task."""
    others = [other for other in everything if other.task == protocol.task]
    name = protocol.task.partition("/")[2] or protocol.task
    marks = []
    if len({other.version for other in others}) > 1:
        marks.append(f"v{protocol.version}")
    for word in ("card", "data", "settings"):
        if len({getattr(other, word) for other in others}) > 1:
            marks.append(f"{word} {fingerprint(getattr(protocol, word))[:4]}")
    marked = f"{name} ({', '.join(marks)})" if marks else name
    return f"{marked}: {protocol.metric}"
