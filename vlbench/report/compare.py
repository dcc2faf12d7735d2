"""Two models, task by task: whether one beats the other, by how much, and what could have been seen at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlbench.core.config import flatten
from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.types import Result
from vlbench.report.columns import OutcomesOf, Protocol
from vlbench.report.legend import NOTHING_KNOWN, NotesOf
from vlbench.report.settings import run_settings
from vlbench.report.tables import escape, interval, markdown_table, p_value, percent
from vlbench.stats.paired import PairedTest, compare_outcomes
from vlbench.stats.ranking import ALPHA, holm


@dataclass(frozen=True)
class TaskComparison:
    """Both models on one task."""

    task: str
    metric: str
    a: float
    b: float
    test: PairedTest
    p_adjusted: float
    """After Holm's correction over the tasks compared."""

    @property
    def verdict(self) -> str:
        """Who is better, if the test says so."""
        if self.p_adjusted >= ALPHA or not self.test.diff:
            return "not separated"
        return "A better" if self.test.diff > 0 else "B better"


@dataclass(frozen=True)
class Comparison:
    """Two models on every task that they share."""

    a: str
    b: str
    tasks: tuple[TaskComparison, ...]
    notes: tuple[str, ...]
    """What was not compared and why, and which settings differ; one line each."""


def compare_models(
    a: Sequence[Result],
    b: Sequence[Result],
    outcomes_of: OutcomesOf,
    *,
    metric: str | None = None,
    notes_of: NotesOf = NOTHING_KNOWN.notes_of,
) -> Comparison:
    """Every task that both models were measured on under one protocol.

    Args:
        a: the stored results of the first model.
        b: those of the second.
        outcomes_of: per-example outcomes of a result.
        metric: compare on this one; None: each task's headline metric.
        notes_of: what was noted about the data of a result; said of the tasks that are compared.

    Raises:
        UserError: where nothing can be compared, or no task has the metric.
    """
    name_a, name_b = a[0].model.name, b[0].model.name
    notes = [note for results in (a, b) if (note := _mixed_weights(results))]
    if metric is not None:
        known = {name for result in (*a, *b) for name in result.estimates}
        if metric not in known:
            raise UserError(unknown("metric", metric, known))
    pairs, unmatched = _match(a, b, metric)
    notes += unmatched
    tested: list[tuple[Result, Result, str, PairedTest]] = []
    for mine, theirs in pairs:
        name = metric or mine.metric
        try:
            outcomes_a, outcomes_b = outcomes_of(mine), outcomes_of(theirs)
            if name not in outcomes_a or name not in outcomes_b:
                raise UserError(f"{name} has no value for a single example")
            tested.append((mine, theirs, name, compare_outcomes(outcomes_a[name], outcomes_b[name])))
        except UserError as error:
            notes.append(f"{mine.task}: not compared: {error}")
    if not tested:
        raise UserError(f"{name_a} and {name_b} share no task that can be compared: " + ("; ".join(notes) or "none"))
    adjusted = holm([test.p for *_, test in tested])
    tasks = tuple(
        TaskComparison(
            task=mine.task,
            metric=name,
            a=mine.estimates[name].value,
            b=theirs.estimates[name].value,
            test=test,
            p_adjusted=float(p),
        )
        for (mine, theirs, name, test), p in zip(tested, adjusted, strict=True)
    )
    notes += _different_settings([(mine, theirs) for mine, theirs, *_ in tested])
    for mine, theirs, *_ in tested:
        notes += _data_notes(mine.task, notes_of(mine), notes_of(theirs))
    return Comparison(name_a, name_b, tasks, tuple(notes))


def render_comparison(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    header = ["Task", "Metric", "A", "B", "A − B", "95% interval", "p", "p (Holm)", "Detectable", "Verdict"]
    rows = [
        [
            row.task,
            row.metric,
            percent(row.a),
            percent(row.b),
            percent(row.test.diff, signed=True),
            interval(row.test.lo, row.test.hi, signed=True),
            p_value(row.test.p),
            p_value(row.p_adjusted),
            percent(row.test.mde),
            row.verdict,
        ]
        for row in comparison.tasks
    ]
    tests = sorted({f"{row.test.method} (n={row.test.n}, {row.test.n_clusters} units)" for row in comparison.tasks})
    lines = [
        f"A = {escape(comparison.a)}, B = {escape(comparison.b)}",
        markdown_table(header, rows, left=2),
        f"In percent, on the same examples. Tests: {'; '.join(tests)}.",
        (
            f"Verdicts: p after Holm's correction over {len(rows)} task{'s' * (len(rows) > 1)}, at 5%.\n"
            "Detectable: the smallest true difference that the test finds with 80% power at an uncorrected 5%, "
            "for a pair that disagrees as often as this one."
        ),
    ]
    if comparison.notes:
        lines.append("\n".join(f"- {escape(note)}" for note in comparison.notes))
    return "\n\n".join(lines) + "\n"


def _match(
    a: Sequence[Result], b: Sequence[Result], metric: str | None
) -> tuple[list[tuple[Result, Result]], list[str]]:
    """Pairs of results under one protocol, and a line for each task that has none."""
    usable_a = {Protocol.of(result, metric): result for result in a if (metric or result.metric) in result.estimates}
    usable_b = {Protocol.of(result, metric): result for result in b if (metric or result.metric) in result.estimates}
    shared = sorted(usable_a.keys() & usable_b.keys())
    notes = []
    tasks_a, tasks_b = {result.task for result in a}, {result.task for result in b}
    for task in sorted((tasks_a | tasks_b) - {protocol.task for protocol in shared}):
        mine = [protocol for protocol in usable_a if protocol.task == task]
        theirs = [protocol for protocol in usable_b if protocol.task == task]
        if task not in tasks_a or task not in tasks_b:
            notes.append(f"{task}: only {'A' if task in tasks_a else 'B'} has been measured")
        elif not mine or not theirs:
            notes.append(f"{task}: no metric {metric!r}")
        else:
            what = " and ".join(max(mine).differences(max(theirs)))
            notes.append(f"{task}: not compared: the two were measured with different {what}; evaluate both again")
    return [(usable_a[protocol], usable_b[protocol]) for protocol in shared], notes


def _mixed_weights(results: Sequence[Result]) -> str | None:
    prints = {result.model.backbone_fingerprint for result in results}
    if len(prints) == 1:
        return None
    return f"{results[0].model.name}: its results come from {len(prints)} different weights or preprocessings"


def _different_settings(pairs: Sequence[tuple[Result, Result]]) -> list[str]:
    """Settings of the runs (precision, device) that are not the same on both sides."""
    found: dict[str, set[str]] = {}
    for mine, theirs in pairs:
        left, right = (flatten(run_settings(result)) for result in (mine, theirs))
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                found.setdefault(f"{key}: A {left.get(key)}, B {right.get(key)}", set()).add(mine.task)
    return [f"settings differ: {words} ({', '.join(sorted(tasks))})" for words, tasks in sorted(found.items())]


def _data_notes(task: str, a: Sequence[str], b: Sequence[str]) -> list[str]:
    """What was noted about the data of either result, and of which."""
    whose = {note: "A and B" if note in a and note in b else "A" if note in a else "B" for note in (*a, *b)}
    return [f"{task}, {who}: {note}" for note, who in whose.items()]
