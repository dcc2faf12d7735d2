"""What differs in the settings behind two models' results, and only then what differs in their numbers.

Most numbers that "do not match" differ for a reason that was there to be read: other weights, prompts, resizing, a
split, a precision. Every fact of a stored result is set beside the other's; what is the same is said once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlbench.core.config import flatten
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Estimate, Outcomes, Result
from vlbench.report.page import Block, Bullets, Heading, Table, Text
from vlbench.report.settings import FINDINGS, chosen_settings, run_settings
from vlbench.report.tables import MISSING, count, interval, p_value, percent
from vlbench.stats.paired import PairedTest, compare_outcomes
from vlbench.stats.ranking import holm

_SAME_WEIGHTS = (
    "the weights are the same and the backbones are not: architecture, probed feature, image preprocessing or "
    "tokenizer differ (`vlbench show model NAME`)"
)


@dataclass(frozen=True)
class Evidence:
    """A stored result with what lies behind it."""

    result: Result
    meta: Mapping[str, Any]
    """What was stored with the rows as a whole."""
    outcomes: Mapping[str, Outcomes]
    problem: str | None = None
    """Why the rows could not be read; the result's own words are then all there is."""


@dataclass(frozen=True)
class Difference:
    """One fact that is not the same on both sides."""

    fact: str
    a: str
    b: str


@dataclass(frozen=True)
class Number:
    """One metric on both sides, with the paired test where the two may be compared."""

    task: str
    metric: str
    a: Estimate
    b: Estimate
    test: PairedTest | None
    p_adjusted: float | None = None
    """After Holm's correction over the numbers shown."""


@dataclass(frozen=True)
class Explanation:
    """Two sides, settings before numbers."""

    obstacles: tuple[str, ...]
    """One line for each task whose two results may not be compared."""
    everywhere: tuple[Difference, ...]
    """What differs in the same way in every task."""
    by_task: Mapping[str, tuple[Difference, ...]]
    """What differs in this task beyond that."""
    same: Mapping[str, Mapping[str, str]]
    """What is one and the same on both sides in every task: group → fact → value."""
    numbers: tuple[Number, ...]
    notes: tuple[str, ...]


def explain(pairs: Sequence[tuple[Evidence, Evidence]], *, every_metric: bool = False) -> Explanation:
    """Set the two sides of every task beside each other.

    Args:
        pairs: both sides' evidence, one pair a task.
        every_metric: number all metrics that both sides have, not only the headline.
    """
    assert pairs, "nothing to explain"
    sides = {}
    for a, b in pairs:
        read = not a.problem and not b.problem  # else every fact of the rows would differ from its absence
        sides[a.result.task] = (facts(a, rows=read), facts(b, rows=read))
    differing = {task: _differences(left, right) for task, (left, right) in sides.items()}
    first = next(iter(differing.values()))
    everywhere = tuple(d for d in first if all(d in others for others in differing.values()))
    numbers: list[Number] = []
    notes, obstacles = [], []
    for a, b in pairs:
        obstacle = why_not_comparable(a.result, b.result)
        if obstacle:
            hint = " (the examples have the same ids: perhaps only classes or prompts differ)" * _same_ids(a, b)
            obstacles.append(f"{a.result.task}: not comparable: {obstacle}{hint}; no test is given")
        notes += [f"{a.result.task}: {words}" for side in (a, b) if (words := side.problem)]
        mine, theirs = a.result.model, b.result.model
        if mine.weights_hash == theirs.weights_hash and mine.backbone_fingerprint != theirs.backbone_fingerprint:
            notes.append(_SAME_WEIGHTS)
        found, said = _numbers(a, b, tested=obstacle is None, every_metric=every_metric)
        numbers += found
        notes += said
    return Explanation(
        obstacles=tuple(obstacles),
        everywhere=everywhere,
        by_task={task: tuple(d for d in found if d not in everywhere) for task, found in differing.items()},
        same=_same(list(sides.values())),
        numbers=_adjusted(numbers),
        notes=tuple(dict.fromkeys(notes)),
    )


def why_not_comparable(a: Result, b: Result) -> str | None:
    """What forbids a test of two results of one task, or None. Other settings do not: they are what is explained."""
    found = []
    if a.task_version != b.task_version:
        found.append(f"task versions {a.task_version} and {b.task_version}")
    if a.data.split != b.data.split:
        found.append(f"splits {a.data.split} and {b.data.split}")
    if a.data.fingerprint != b.data.fingerprint:
        sizes = f" ({a.data.n:,} and {b.data.n:,} examples)" if a.data.n != b.data.n else ""
        found.append(f"other data, classes or prompts{sizes}")
    return " and ".join(found) or None


def _same_ids(a: Evidence, b: Evidence) -> bool:
    """Whether other data go by the same names; false where they are the same data, or nothing is known."""
    if a.result.data.fingerprint == b.result.data.fingerprint:
        return False
    shared = a.outcomes.keys() & b.outcomes.keys()
    return bool(shared) and all(set(a.outcomes[metric].ids) == set(b.outcomes[metric].ids) for metric in shared)


def facts(side: Evidence, *, rows: bool = True) -> dict[str, str]:
    """Every setting behind a result as ``group: name`` → value, in the order in which to look at them.

    Args:
        side: the result and what lies behind it.
        rows: tell also what was stored with the rows: classes, templates, training images, notes.
    """
    result, model, meta = side.result, side.result.model, side.meta if rows else {}
    groups: dict[str, Mapping[str, Any]] = {
        "model": {
            "weights": model.weights_hash,
            "backbone (weights, feature, preprocessing)": model.backbone_fingerprint,
            "asked for as": model.spec,
            "recipe": model.recipe,
            "architecture": model.arch,
            "parameters": count(model.params),
            "pretraining data": "not disclosed" if model.pretrain_data is None else model.pretrain_data,
            "images seen": count(model.images_seen),
            "seed": model.seed,
            "random weights": model.random,
        },
        "task": {
            "version": result.task_version,
            "card": result.task_fingerprint,
            "adapter": result.adapter,
            "headline": result.metric,
            "chance": None if result.chance is None else percent(result.chance),
        },
        "setting": flatten(result.config),
        "chosen": chosen_settings(result.chosen),
        "data": {
            "content": result.data.fingerprint,
            "split": result.data.split,
            "examples": result.data.n,
            "found at": result.data.spec,
            **flatten({key: value for key, value in meta.items() if key not in FINDINGS}),
            "notes": "; ".join(meta.get("notes", ())) or None,
        },
        "run": flatten(run_settings(result)),
        "version": {**result.versions, "commit": result.commit},
    }
    return {f"{group}: {name}": _said(value) for group, named in groups.items() for name, value in named.items()}


def explanation_blocks(explanation: Explanation, a: str, b: str) -> list[Block]:
    """The explanation as a page; ``a`` and ``b`` are what the two sides are called."""
    blocks: list[Block] = [Text(f"A = {a}, B = {b}")]
    if explanation.obstacles:
        blocks.append(Bullets(explanation.obstacles))
    several = len(explanation.by_task) > 1
    where = f"in each of the {len(explanation.by_task)} tasks" if several else f"in {next(iter(explanation.by_task))}"
    blocks.append(Heading(f"Settings that differ {where}"))
    blocks.append(_difference_table(explanation.everywhere) if explanation.everywhere else Text("None."))
    own = {task: differences for task, differences in explanation.by_task.items() if differences}
    if own:
        rows = tuple((task, d.fact, d.a, d.b) for task, found in own.items() for d in found)
        blocks += [Heading("Settings that differ in one task"), Table(("Task", "Setting", "A", "B"), rows, left=4)]
    if explanation.same:
        lines = [f"{group}: {', '.join(map(' '.join, named.items()))}" for group, named in explanation.same.items()]
        blocks += [Heading("The same on both sides"), Bullets(tuple(lines))]
    blocks += [Heading("Numbers"), _number_table(explanation.numbers)]
    tests = {f"{n.test.method} (n={n.test.n}, {n.test.n_clusters} units)" for n in explanation.numbers if n.test}
    said = "In percent, with 95% intervals."
    if tests:
        said += f" A − B is tested on the same examples: {'; '.join(sorted(tests))}; Holm over the numbers shown."
    blocks.append(Text(said))
    if explanation.notes:
        blocks.append(Bullets(explanation.notes))
    return blocks


def _differences(left: Mapping[str, str], right: Mapping[str, str]) -> list[Difference]:
    keys = sorted(left.keys() | right.keys(), key=_place([*left, *right]))
    return [
        Difference(key, left.get(key, MISSING), right.get(key, MISSING))
        for key in keys
        if left.get(key, MISSING) != right.get(key, MISSING)
    ]


def _place(keys: Sequence[str]) -> Any:
    order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    groups = {group: place for place, group in enumerate(dict.fromkeys(key.partition(":")[0] for key in keys))}
    return lambda key: (groups[key.partition(":")[0]], order[key])


def _same(sides: Sequence[tuple[Mapping[str, str], Mapping[str, str]]]) -> dict[str, dict[str, str]]:
    every = [facts for pair in sides for facts in pair]
    found: dict[str, dict[str, str]] = {}
    for key, value in every[0].items():
        if value != MISSING and all(facts.get(key) == value for facts in every):
            group, _, name = key.partition(": ")
            found.setdefault(group, {})[name] = value
    return found


def _numbers(a: Evidence, b: Evidence, *, tested: bool, every_metric: bool) -> tuple[list[Number], list[str]]:
    """The metrics that both sides have, and a line for each that could not be tested."""
    task, mine, theirs = a.result.task, a.result.estimates, b.result.estimates
    shared = [metric for metric in mine if metric in theirs]
    headlines = [metric for metric in dict.fromkeys((a.result.metric, b.result.metric)) if metric in shared]
    numbers, notes = [], []
    for metric in shared if every_metric else headlines:
        test = None
        if tested and metric in a.outcomes and metric in b.outcomes:
            try:
                test = compare_outcomes(a.outcomes[metric], b.outcomes[metric])
            except UserError as error:
                notes.append(f"{task}, {metric}: not tested: {error}")
        numbers.append(Number(task, metric, mine[metric], theirs[metric], test))
    if not headlines:
        notes.append(f"{task}: A's headline is {a.result.metric}, B's is {b.result.metric}, and neither has both")
    return numbers, notes


def _adjusted(numbers: Sequence[Number]) -> tuple[Number, ...]:
    adjusted = iter(holm([number.test.p for number in numbers if number.test is not None]))
    return tuple(
        number
        if number.test is None
        else Number(number.task, number.metric, number.a, number.b, number.test, float(next(adjusted)))
        for number in numbers
    )


def _difference_table(differences: Sequence[Difference]) -> Table:
    return Table(("Setting", "A", "B"), tuple((d.fact, d.a, d.b) for d in differences), left=3)


def _number_table(numbers: Sequence[Number]) -> Table:
    rows = []
    for number in numbers:
        test, p = number.test, number.p_adjusted
        tested = (MISSING,) * 4
        if test is not None and p is not None:
            between = interval(test.lo, test.hi, signed=True)
            tested = (percent(test.diff, signed=True), between, p_value(test.p), p_value(p))
        sides = (f"{percent(side.value)} {interval(side.lo, side.hi)}" for side in (number.a, number.b))
        rows.append((number.task, number.metric, *sides, *tested))
    return Table(("Task", "Metric", "A", "B", "A − B", "95% interval", "p", "p (Holm)"), tuple(rows), left=2)


def _said(value: Any) -> str:
    match value:
        case None | "":
            return MISSING
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case list() | tuple() if len(value) > 6:
            return f"{len(value)} of them, {_said(value[0])} … {_said(value[-1])} ({fingerprint(list(value))[:6]})"
        case list() | tuple():
            return ", ".join(map(_said, value)) or "none"
        case _:
            return str(value)
