"""A study's one table: an arm a row, a task a column; mean over seeds, spread over seeds, interval over examples.

The two sources of variance are kept apart, since they answer two questions. Another seed would have given another
backbone: the standard deviation between seeds. Another test set would have given another number to the same backbones:
the interval, which is that of the seeds' mean, every example counting with the mean of its values over the seeds. (The
seeds share their test examples, so more seeds make this interval no shorter than the examples allow.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Result
from vlbench.report.columns import OutcomesOf, Protocol
from vlbench.report.page import Block, Heading, Table, Text
from vlbench.report.tables import MISSING, interval, percent
from vlbench.stats.intervals import estimate

_NOTE = (
    "Mean over seeds ± standard deviation between seeds, then the 95% interval over examples of that mean, in percent. "
    "`–` is not measured: the arm has not the parts that the task needs, or the task failed."
)


@dataclass(frozen=True)
class Arm:
    """One row: models that differ in their seed alone."""

    name: str
    models: tuple[str, ...]
    """Their names in the result store, a seed each."""


ChanceOf: TypeAlias = Callable[[Result, str], float | None]
"""What guessing would reach in one metric of a result, where that is known."""


def _headline_chance(result: Result, metric: str) -> float | None:
    return result.chance if metric == result.metric else None


@dataclass(frozen=True)
class Wanted:
    """Which metrics beside each task's headline a table shows, and how their chance level is known."""

    metrics: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Task → further metrics, in the order of their columns."""
    chance_of: ChanceOf = _headline_chance

    def of(self, result: Result) -> list[str]:
        """The headline, then the others."""
        return list(dict.fromkeys([result.metric, *self.metrics.get(result.task, ())]))


def arms_page(
    title: str,
    arms: Sequence[Arm],
    results: Sequence[Result],
    outcomes_of: OutcomesOf,
    *,
    notes: Sequence[str] = (),
    wanted: Wanted | None = None,
) -> list[Block]:
    """The study as a page.

    Args:
        title: the study's.
        arms: rows, in the study's order.
        results: what is stored of their models; results of other models are left alone.
        outcomes_of: per-example outcomes of a result.
        notes: what else there is to say, under the table.
        wanted: metrics beside the headlines; none by default.
    """
    wanted = wanted or Wanted()
    names = {name for arm in arms for name in arm.models}
    by_protocol: dict[tuple[Protocol, int, str], dict[str, Result]] = {}
    for result in results:
        if result.model.name in names:
            whole = replace(Protocol.of(result), metric="")  # a task's columns stand together, its headline first
            for place, metric in enumerate(wanted.of(result)):
                by_protocol.setdefault((whole, place, metric), {})[result.model.name] = result
    columns = [(replace(key[0], metric=key[2]), by_protocol[key]) for key in sorted(by_protocol)]
    rows = []
    for arm in arms:
        cells = [_cell(arm, column, protocol.metric, outcomes_of) for protocol, column in columns]
        rows.append((arm.name, *cells))
    chances = tuple(_chance(column, protocol.metric, wanted.chance_of) for protocol, column in columns)
    header = ("Arm", *_titles([protocol for protocol, _ in columns]))
    counted = _counted(arms)
    return [
        Heading(title, level=1),
        Table(header, tuple(rows), foot=(("*chance*", *chances),)),
        Text(f"{_NOTE} {counted}"),
        *(Text(note) for note in notes),
    ]


def mean_outcomes(outcomes: Sequence[Outcomes]) -> Outcomes | None:
    """Every example with the mean of its values over some models, or None where they are not of the same examples."""
    first = outcomes[0]
    places = [{name: place for place, name in enumerate(each.ids)} for each in outcomes]
    if any(known.keys() != places[0].keys() or len(known) < len(each.ids) for known, each in zip(places, outcomes)):
        return None
    orders = [np.array([known[name] for name in first.ids], dtype=np.int64) for known in places]
    for part in ("weights", "strata"):
        groups = [getattr(each, part) for each in outcomes]
        if any((group is None) != (groups[0] is None) for group in groups):
            return None
        ordered = [np.asarray(group)[order] for group, order in zip(groups, orders) if group is not None]
        if any(not np.array_equal(group, ordered[0]) for group in ordered):
            return None
    values = np.mean([np.asarray(each.values, dtype=float)[order] for each, order in zip(outcomes, orders)], axis=0)
    return replace(first, values=values, binary=first.binary and len(outcomes) == 1)


def _cell(arm: Arm, column: Mapping[str, Result], metric: str, outcomes_of: OutcomesOf) -> str:
    results = [column[name] for name in arm.models if name in column and metric in column[name].estimates]
    if not results:
        return MISSING
    values = [result.estimates[metric].value for result in results]
    over_examples = _over_examples(results, metric, outcomes_of)
    words = [percent(statistics.fmean(values))]
    if len(values) > 1:
        words.append(f"± {percent(statistics.stdev(values))}")
    words.append(interval(over_examples.lo, over_examples.hi) if over_examples else "[examples differ]")
    if len(values) < len(arm.models):
        words.append(f"({len(values)} of {len(arm.models)} seeds)")
    return " ".join(words)


def _over_examples(results: Sequence[Result], metric: str, outcomes_of: OutcomesOf) -> Estimate | None:
    if len(results) == 1:
        return results[0].estimates[metric]
    try:
        found = mean_outcomes([outcomes_of(result)[metric] for result in results])
    except (UserError, KeyError):
        return None  # a metric that no single example has a value of
    return estimate(found) if found is not None else None


def _titles(protocols: Sequence[Protocol]) -> list[str]:
    """Task and metric, and which of several protocols of a task."""
    titles = []
    for protocol in protocols:
        others = [other for other in protocols if (other.task, other.metric) == (protocol.task, protocol.metric)]
        which = f" ({others.index(protocol) + 1} of {len(others)} protocols)" if len(others) > 1 else ""
        titles.append(f"{protocol.task}: {protocol.metric}{which}")
    return titles


def _chance(column: Mapping[str, Result], metric: str, chance_of: ChanceOf) -> str:
    known = sorted({chance for result in column.values() if (chance := chance_of(result, metric)) is not None})
    return " or ".join(dict.fromkeys(percent(value) for value in known)) or MISSING


def _counted(arms: Sequence[Arm]) -> str:
    counts = sorted({len(arm.models) for arm in arms})
    said = " or ".join(map(str, counts))
    return f"{said} seed{'s' * (counts != [1])} an arm."
