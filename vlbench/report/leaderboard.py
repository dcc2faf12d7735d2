"""The leaderboard: stored results as one Markdown page, the same bytes for the same results.

One table for each kind of task, models down, tasks across. Rows are ordered by mean rank over the cells that a model
has, then by mean value, then by name; the order inside one rank says nothing. Missing cells are never filled in.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby

from vlbench.core.types import Estimate, Result
from vlbench.report.columns import Column, OutcomesOf, make_columns, row_labels
from vlbench.report.seeds import seed_table
from vlbench.report.tables import MISSING, cell, count, escape, markdown_table, percent

_HEAD = """\
# Leaderboard

Written by `vlbench leaderboard` from the results beside this file; not to be edited.

`62.1 [60.3, 63.8] ²` is a value with its 95% interval, in percent, and the model's rank on that task: one plus the
number of models **significantly better** than it (paired test on the same examples, Holm's correction over all pairs
of the column, 5%). Models that share a rank are tied. Two of different rank need not be separated from each other:
`vlbench compare A B` tests a pair. A value in bold is significantly better than every other in its column. `–` is not
measured. Models are ordered by mean rank, then by mean value.
"""


def render(results: Sequence[Result], outcomes_of: OutcomesOf, *, problems: Sequence[str] = ()) -> str:
    """The page.

    Args:
        results: what is stored, in any order.
        outcomes_of: per-example outcomes of one of them, for the paired tests.
        problems: one line for each stored file that could not be used; shown at the end.
    """
    columns = sorted(make_columns(results, outcomes_of), key=_kind)
    parts = [_HEAD]
    for kind, group in groupby(columns, key=_kind):
        parts.append(_section(kind, list(group)))
    if results:
        parts.append(_model_section(results))
    else:
        parts.append("No results yet: `vlbench eval --model MODEL --tasks TASKS` stores some.\n")
    if problems:
        lines = "\n".join(f"- {escape(problem)}" for problem in sorted(problems))
        parts.append(f"## Left out\n\nThese files could not be used:\n\n{lines}\n")
    return "\n".join(parts)


def _kind(column: Column) -> str:
    return column.protocol.task.partition("/")[0]


def _section(kind: str, columns: list[Column]) -> str:
    models = {label: result.model for column in columns for label, result in column.results.items()}
    rows = []
    for label in sorted(models, key=lambda label: _order(label, columns)):
        name = f"{label} (random weights)" if models[label].random else label
        rows.append([name, *(_cell(column, label) for column in columns)])
    chances = [{result.chance for result in column.results.values()} for column in columns]
    rows.append(["*chance*", *(_chance(values) for values in chances)])
    table = markdown_table(["Model", *(column.title for column in columns)], rows)
    parts = [f"## {kind}", table, _statistics_line(columns)]
    parts += [f"{escape(c.title)}: not ranked: {escape(c.problem)}" for c in columns if c.problem]
    split = sorted({c.protocol.task for c in columns if sum(c.protocol.task == o.protocol.task for o in columns) > 1})
    if split:
        parts.append(
            f"Stored under different data, task cards or settings, hence in columns of their own and never ranked "
            f"together: {', '.join(map(escape, split))}."
        )
    settings = _precision_line(columns)
    seeds = seed_table(columns)
    return "\n\n".join([*parts, *([settings] if settings else []), *([seeds] if seeds else [])]) + "\n"


def _cell(column: Column, label: str) -> str:
    estimate = column.estimate(label)
    if estimate is None:
        return MISSING
    return cell(estimate, rank=column.ranks.get(label), bold=column.best == label)


def _chance(values: set[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    return " or ".join(percent(value) for value in known) or MISSING


def _order(label: str, columns: Sequence[Column]) -> tuple[float, float, str]:
    ranks = [column.ranks[label] for column in columns if label in column.ranks]
    estimates: list[Estimate] = [estimate for column in columns if (estimate := column.estimate(label))]
    mean_rank = statistics.fmean(ranks) if ranks else float("inf")
    return mean_rank, -statistics.fmean(estimate.value for estimate in estimates), label


def _statistics_line(columns: Sequence[Column]) -> str:
    """What the intervals and ranks rest on; columns that agree are said together."""
    by_words: dict[str, list[str]] = {}
    for column in columns:
        words = f"95% intervals: {column.interval_method}"
        if column.tests:
            words += f"; ranks: {column.test_method}, Holm over {len(column.tests)} pair" + "s" * (
                len(column.tests) > 1
            )
        by_words.setdefault(words, []).append(column.title)
    if len(by_words) == 1:
        return f"{next(iter(by_words))} a column." if len(columns) > 1 else f"{next(iter(by_words))}."
    return " ".join(f"{escape(', '.join(titles))}: {words}." for words, titles in by_words.items())


def _precision_line(columns: Sequence[Column]) -> str | None:
    """Which models were run in which precision, where it is recorded: it moves numbers."""
    by_value: dict[str, set[str]] = {}
    for column in columns:
        for label, result in column.results.items():
            if "precision" in result.settings:
                by_value.setdefault(str(result.settings["precision"]), set()).add(label)
    if not by_value:
        return None
    if len(by_value) == 1:
        return f"Precision of the forward pass: {next(iter(by_value))}."
    said = "; ".join(f"{value} ({', '.join(sorted(labels))})" for value, labels in sorted(by_value.items()))
    return f"Precision of the forward pass differs: {escape(said)}."


def _model_section(results: Sequence[Result]) -> str:
    labels = row_labels(results)
    by_label: dict[str, list[Result]] = {}
    for result in results:
        by_label.setdefault(labels[result.model.name, result.model.backbone_fingerprint], []).append(result)
    rows = [_model_row(label, by_label[label]) for label in sorted(by_label)]
    header = ["Model", "Recipe", "Architecture", "Pretraining data", "Params", "Images seen", "Seed", "Images/s"]
    note = (
        "Params are those of the image tower. Images/s is the median over the model's stored runs that encoded images; "
        "`–` where every feature came from the feature store."
    )
    return f"## Models\n\n{markdown_table(header, rows, left=4)}\n\n{note}\n"


def _model_row(label: str, results: Sequence[Result]) -> list[str]:
    model = min(results, key=lambda result: (result.task, result.task_version)).model
    if model.random:
        trained_on = "none (random weights)"
    elif model.pretrain_data is None:
        trained_on = "not disclosed"
    else:
        trained_on = ", ".join(model.pretrain_data)
    return [
        label,
        model.recipe or MISSING,
        model.arch or MISSING,
        trained_on,
        count(model.params),
        MISSING if model.random else count(model.images_seen),
        MISSING if model.seed is None else str(model.seed),
        _speed(results),
    ]


def _speed(results: Sequence[Result]) -> str:
    """Median images per second for each device that it ran on."""
    by_device: dict[str, list[float]] = {}
    for result in results:
        if result.images_per_second is not None:
            by_device.setdefault(str(result.settings.get("device", "")), []).append(result.images_per_second)
    speeds = [f"{statistics.median(by_device[device]):.0f} {device}".strip() for device in sorted(by_device)]
    return ", ".join(speeds) or MISSING
