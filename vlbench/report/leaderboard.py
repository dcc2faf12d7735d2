"""The leaderboard: stored results as one page, the same bytes for the same results.

One section for each kind of task, models down, tasks across; more than eight tasks of a kind are several tables, one
under the other, in one order of models. Rows are ordered by mean rank over the cells that a model has in the section,
then by mean value, then by name; the order inside one rank says nothing. Missing cells are never filled in. Under the
tables stand the protocol of every column and what was noted about the data of a cell.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby

from vlbench.core.types import Estimate, Result
from vlbench.report.columns import Column, OutcomesOf, make_columns, row_labels
from vlbench.report.legend import NOTHING_KNOWN, PEER_MARK, Background, Footnotes, protocol_line, shows_peer
from vlbench.report.page import Block, Bullets, Heading, Table, Text, markdown, table_parts
from vlbench.report.seeds import seed_blocks
from vlbench.report.tables import MISSING, cell, count, percent

_HEAD = """\
Written by `vlbench leaderboard` from the results beside this file; not to be edited.

`62.1 [60.3, 63.8] ²` is a value with its 95% interval, in percent, and the model's rank on that task: one plus the
number of models **significantly better** than it (paired test on the same examples, Holm's correction over all pairs
of the column, 5%). Models that share a rank are tied. Two of different rank need not be separated from each other:
`vlbench compare A B` tests a pair. A value in bold is significantly better than every other in its column. `–` is not
measured. Models are ordered by mean rank, then by mean value. A letter in brackets, `(a)`, points to what was noted
about the data, under the table; a column marked † shows another harness's or paper's own protocol."""


def page_of(
    results: Sequence[Result],
    outcomes_of: OutcomesOf,
    *,
    problems: Sequence[str] = (),
    background: Background = NOTHING_KNOWN,
) -> list[Block]:
    """The page as blocks.

    Args:
        results: what is stored, in any order.
        outcomes_of: per-example outcomes of one of them, for the paired tests.
        problems: one line for each stored file that could not be used; shown at the end.
        background: task cards, adapters' defaults and data notes, for what stands under the tables.
    """
    columns = sorted(make_columns(results, outcomes_of), key=_kind)
    blocks: list[Block] = [Heading("Leaderboard", level=1), *(Text(part) for part in _HEAD.split("\n\n"))]
    for kind, group in groupby(columns, key=_kind):
        blocks += _section(kind, list(group), background)
    if results:
        blocks += _model_section(results)
    else:
        blocks.append(Text("No results yet: `vlbench eval --model MODEL --tasks TASKS` stores some."))
    if problems:
        blocks += [Heading("Left out"), Text("These files could not be used:"), Bullets(tuple(sorted(problems)))]
    return blocks


def render(
    results: Sequence[Result],
    outcomes_of: OutcomesOf,
    *,
    problems: Sequence[str] = (),
    background: Background = NOTHING_KNOWN,
) -> str:
    """The page as Markdown; the arguments are those of ``page_of``."""
    return markdown(page_of(results, outcomes_of, problems=problems, background=background))


def _kind(column: Column) -> str:
    return column.protocol.task.partition("/")[0]


def _section(kind: str, columns: list[Column], background: Background) -> list[Block]:
    notes = Footnotes(columns, background)
    models = {label: result.model for column in columns for label, result in column.results.items()}
    order = sorted(models, key=lambda label: _order(label, columns))
    names = {label: f"{label} (random weights)" if models[label].random else label for label in order}
    blocks: list[Block] = [Heading(kind)]
    for part in table_parts(len(columns)):
        rows = [
            (names[label], *(_cell(columns[i], label) + notes.at_cell(i, label) for i in part))
            for label in order
            if any(label in columns[i].results for i in part)
        ]
        titles = (_title(columns[i], background) + notes.at_title(i) for i in part)
        chances = (_chance({result.chance for result in columns[i].results.values()}) for i in part)
        blocks.append(Table(("Model", *titles), tuple(rows), foot=(("*chance*", *chances),)))
    blocks.append(Text(_statistics_line(columns)))
    blocks += [Text(f"{c.title}: not ranked: {c.problem}") for c in columns if c.problem]
    split = sorted({c.protocol.task for c in columns if sum(c.protocol.task == o.protocol.task for o in columns) > 1})
    if split:
        blocks.append(
            Text(
                "Stored under different data, task cards or settings, hence in columns of their own and never ranked "
                f"together: {', '.join(split)}."
            )
        )
    if lines := notes.lines():
        blocks += [Text("Notes on the data:"), Bullets(lines)]
    blocks += [Text("What each column shows:"), Bullets(tuple(protocol_line(c, background) for c in columns))]
    if precision := _precision_line(columns):
        blocks.append(Text(precision))
    return blocks + seed_blocks(columns)


def _title(column: Column, background: Background) -> str:
    return f"{column.title} {PEER_MARK}" if shows_peer(column, background) else column.title


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
    return " ".join(f"{', '.join(titles)}: {words}." for words, titles in by_words.items())


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
    return f"Precision of the forward pass differs: {said}."


def _model_section(results: Sequence[Result]) -> list[Block]:
    labels = row_labels(results)
    by_label: dict[str, list[Result]] = {}
    for result in results:
        by_label.setdefault(labels[result.model.name, result.model.backbone_fingerprint], []).append(result)
    rows = tuple(_model_row(label, by_label[label]) for label in sorted(by_label))
    header = ("Model", "Recipe", "Architecture", "Pretraining data", "Params", "Images seen", "Seed", "Images/s")
    note = (
        "Params are those of the image tower. Images/s is the median over the model's stored runs that encoded images; "
        "`–` where every feature came from the feature store."
    )
    return [Heading("Models"), Table(header, rows, left=4), Text(note)]


def _model_row(label: str, results: Sequence[Result]) -> tuple[str, ...]:
    model = min(results, key=lambda result: (result.task, result.task_version)).model
    if model.random:
        trained_on = "none (random weights)"
    elif model.pretrain_data is None:
        trained_on = "not disclosed"
    else:
        trained_on = ", ".join(model.pretrain_data)
    return (
        label,
        model.recipe or MISSING,
        model.arch or MISSING,
        trained_on,
        count(model.params),
        MISSING if model.random else count(model.images_seen),
        MISSING if model.seed is None else str(model.seed),
        _speed(results),
    )


def _speed(results: Sequence[Result]) -> str:
    """Median images per second for each kind of device that it ran on, and number of processes that shared the work."""
    by_machine: dict[tuple[str, int], list[float]] = {}
    for result in results:
        if result.images_per_second is not None:
            device = str(result.settings.get("device", "")).partition(":")[0]
            machine = (device, int(result.settings.get("processes", 1)))
            by_machine.setdefault(machine, []).append(result.images_per_second)
    speeds = []
    for device, processes in sorted(by_machine):
        shared = f" ({processes} processes)" if processes > 1 else ""
        speeds.append(f"{statistics.median(by_machine[device, processes]):.0f} {device}".strip() + shared)
    return ", ".join(speeds) or MISSING
