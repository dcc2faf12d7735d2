"""Published numbers beside stored ones: reproduced, off by so much, or not attempted.

Several numbers may be published of one measurement: a paper's, and a re-evaluation's with other prompts or another copy
of the data. Whoever reproduces one of them has measured the model; that the others differ is a matter between the
sources (``sources disagree``), which is shown and not counted as off. Where none is reproduced, each is off.

A published number is an attempt at a model's own weights. So a stored result counts only where it was made with the
weights that the reference card names: never with random ones, nor with others that were given the card's name.

A local file given to the card (``--model CARD --weights FILE``) is held to the card's SHA-256. Most cards know none:
their publishers print none, and some models are not downloaded at all. Such a file is judged, for else nothing could
ever be said of these models, and every verdict on it says that the file could not be checked: it may be another one.
What attributes the result to the card is that the card itself was asked for, which the result's ``spec`` holds; the
name alone, which ``--name`` gives to anything, does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any, Literal, TypeAlias, get_args

from tabulate import tabulate

from vlbench.core.cards import ModelCard, Published, TaskCard
from vlbench.core.types import Estimate, Result
from vlbench.report.tables import MISSING, count, interval

TOLERANCE = 0.005
"""Half a point: what resizing in another library or another rounding of the prompts' mean is known to move."""
_FEWEST_DECIMALS = 3
"""Papers print a tenth of a point; a value's closing zeros (0.800) do not survive YAML."""
_ROUNDING = 1e-9

Status: TypeAlias = Literal[
    "reproduced",
    "sources disagree",
    "off",
    "not comparable",
    "other protocol",
    "metric missing",
    "refused",
    "not attempted",
]
"""Sources disagree: off, where another number published of the same model, task and metric is reproduced.
Not comparable: measured on other examples than published, or under an earlier card of the task; then a number within
the tolerance still counts as reproduced, but no interval excuses one beyond it: it is wide where the examples are few.
Other protocol: the card says that the number was printed for another one, so that ours is not judged by it.
Refused: something is stored under the model's name and is no attempt at its number."""


@dataclass(frozen=True)
class Verdict:
    """One published number and what is stored about it."""

    model: str
    task: str
    metric: str
    published: float
    source: str
    note: str
    status: Status
    rule: str = ""
    """Why it counts as reproduced: ``tolerance`` or ``interval``; why it was refused or not judged, in words. Of a
    number that is off and not the only one of its measurement: which of them is reproduced, or else the nearest."""
    ours: float | None = None
    lo: float | None = None
    hi: float | None = None
    n: int | None = None
    off_by: float | None = None
    """Ours, rounded as the published value is, minus the published value."""
    unchecked: str = ""
    """Our weights file, where it cannot be held to the card because the card knows no checksum; else empty."""
    remarks: tuple[str, ...] = ()
    """What was not as it should be in a comparison: the task's version, the precision, several weights."""

    def words(self) -> str:
        """The verdict in one phrase, with what could not be checked about the weights."""
        said = self._judgement()
        return f"{said}; {self.unchecked} could not be checked: the card knows no sha256" if self.unchecked else said

    def _judgement(self) -> str:
        match self.status:
            case "reproduced":
                return "reproduced (inside our interval)" if self.rule == "interval" else "reproduced"
            case "off":
                said = f"off by {self._points()} points (interval {self.interval()})"
                return f"{said}; {self.rule}" if self.rule else said
            case "sources disagree":
                return f"sources disagree ({self._points()} points): {self.rule}"
            case "not comparable":
                return f"not comparable ({self._points()} points): {self.rule}"
            case "other protocol":
                return f"other protocol, not judged ({self._points()} points)"
            case _:
                return f"{self.status}: {self.rule}" if self.rule else self.status

    def _points(self) -> str:
        """How far off, with as many digits as were published: 0.52 points are not within half a point."""
        digits = printed_decimals(self.published) - 2
        return f"{round(100 * (self.off_by or 0.0), digits) + 0.0:+.{digits}f}"

    def interval(self) -> str:
        """Our 95% interval, or a dash."""
        return MISSING if self.lo is None or self.hi is None else interval(self.lo, self.hi)


def verify(
    cards: Sequence[ModelCard],
    results: Sequence[Result],
    tasks: Mapping[str, TaskCard],
    *,
    tolerance: float = TOLERANCE,
) -> list[Verdict]:
    """A verdict on every published number of ``cards``, in their order.

    Args:
        cards: reference models; several rows about one number (a paper's and a re-evaluation's) are judged each, and
            one that is off while another is reproduced is a disagreement of the sources.
        results: everything stored; what belongs to other models is passed over.
        tasks: today's task cards by name, for the version that a result should have.
        tolerance: as a fraction. A value is reproduced where ours, rounded to the digits that were printed (a tenth of
            a point at least), differs by no more, or else where it lies within our 95% interval and ours was measured
            on the published number of examples, under today's card of the task.
    """
    verdicts = []
    for card in cards:
        own = [result for result in results if is_named_after(card, result)]
        verdicts += _side_by_side([_verdict(card, row, own, tasks, tolerance) for row in card.published])
    return verdicts


def _side_by_side(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One card's verdicts; what is off is held against the other numbers published of the same task and metric."""
    return [_beside(verdict, verdicts) if verdict.status == "off" else verdict for verdict in verdicts]


def _beside(verdict: Verdict, verdicts: Sequence[Verdict]) -> Verdict:
    """``verdict``, which is off, with what its rivals come to. One of another protocol is none: it is not judged."""
    about = (verdict.task, verdict.metric)
    judged = [each for each in verdicts if (each.task, each.metric) == about and each.status in ("reproduced", "off")]
    held = sorted({each.published for each in judged if each.status == "reproduced"})
    if held:
        numbers = " and ".join(_percent(value) for value in held)
        rule = f"{_percent(verdict.published)} here; {numbers}, published too, is reproduced"
        return replace(verdict, status="sources disagree", rule=rule)
    values = {each.published for each in judged}
    if len(values) == 1:
        return verdict
    nearest = min(values, key=lambda value: abs(value - (verdict.ours or 0.0)))
    return replace(verdict, rule=f"of {len(values)} published numbers {_percent(nearest)} is the nearest")


def is_named_after(card: ModelCard, result: Result) -> bool:
    """Whether ``result`` bears the card's name, or that of another file in its architecture (``<id>@<file>``)."""
    return result.model.name == card.id or result.model.name.startswith(f"{card.id}@")


def why_not_the_cards(card: ModelCard, result: Result) -> str | None:
    """Why ``result`` was not made with the weights of ``card``, or None where it was, for all that is known.

    The weights are the card's where it was asked for by its id or by its loader's name for the same weights. A local
    file (``--weights FILE``) must have been given to the card itself. Where the card has a checksum, only that file is
    believed: for any other one, the loader takes back what the card says about training. Where it has none, see
    ``unchecked_file``.
    """
    if result.model.random:
        return "random weights"
    spec, file = _asked_for(result)
    if spec != card.id and (file or spec != _as_its_loader_names_it(card)):
        return f"made from {spec}, under the card's name"
    if result.model.name != card.id and (card.sha256 or not file):
        return f"{result.model.name} is another file than the card's"
    claims = ("recipe", "pretrain_data", "images_seen")
    kept = all(getattr(result.model, claim) == getattr(card, claim) for claim in claims)
    some = any(getattr(card, claim) is not None for claim in claims)
    if file and card.sha256 and not (kept and some):
        return f"the weights file {file} is not the file of the card's sha256"
    return None


def unchecked_file(card: ModelCard, result: Result) -> str:
    """The weights file of ``result``, where it cannot be held to ``card``, which knows no checksum; else empty."""
    return "" if card.sha256 else _asked_for(result)[1]


def _asked_for(result: Result) -> tuple[str, str]:
    """What ``--model`` named, and the file that ``--weights`` did; empty where there was none."""
    spec, _, file = result.model.spec.partition(" --weights ")
    return spec, file


def _as_its_loader_names_it(card: ModelCard) -> str | None:
    """``--model`` for the card's weights without the card. None where the loader would take others, its default."""
    if card.weights is not None and "://" not in card.weights:
        return f"{card.loader}:{card.arch}.{card.weights}"
    return f"{card.loader}:{card.arch}" if card.loader == "hf" or "." in card.arch else None


def _verdict(
    card: ModelCard, row: Published, results: Sequence[Result], tasks: Mapping[str, TaskCard], tolerance: float
) -> Verdict:
    words: dict[str, Any] = {"model": card.id, "task": row.task, "metric": row.metric, "published": row.value}
    words |= {"source": row.source, "note": row.note}
    on_task = [result for result in results if result.task == row.task]
    if not on_task:
        known = "" if row.task in tasks else "there is no such task here"
        return Verdict(**words, status="not attempted", rule=known)
    reasons = {why_not_the_cards(card, result) for result in on_task}
    own = [result for result in on_task if why_not_the_cards(card, result) is None]
    if not own:
        return Verdict(**words, status="refused", rule="; ".join(sorted(filter(None, reasons))))
    result = _to_judge(card, own, tasks.get(row.task))
    words["unchecked"] = unchecked_file(card, result)
    if row.metric not in result.estimates:
        has = ", ".join(sorted(result.estimates))
        return Verdict(**words, status="metric missing", rule=f"the stored result has {has}")
    ours = result.estimates[row.metric]
    off_by = round(ours.value, printed_decimals(row.value)) - row.value
    other = _other_measurement(result, tasks.get(result.task))
    status: Status = "other protocol"
    rule, remarks = "", [*other, *_remarks(card, result, results, tasks)]
    if row.comparable:
        status, rule = _judge(row.value, ours, off_by, tolerance, other=other)
    if status == "not comparable":
        remarks = remarks[len(other) :]  # the rule says them
    words |= {"status": status, "rule": rule, "ours": ours.value, "lo": ours.lo, "hi": ours.hi}
    words |= {"n": ours.n_clusters, "off_by": round(off_by, 9), "remarks": tuple(remarks)}
    return Verdict(**words)


def _judge(
    published: float, ours: Estimate, off_by: float, tolerance: float, *, other: Sequence[str]
) -> tuple[Status, str]:
    if abs(off_by) <= tolerance + _ROUNDING:
        return "reproduced", "tolerance"
    if other:
        return "not comparable", "; ".join(other)
    lo, hi = (round(end, printed_decimals(published)) for end in (ours.lo, ours.hi))  # as a reader compares them
    return ("reproduced", "interval") if lo <= published <= hi else ("off", "")


def printed_decimals(value: float) -> int:
    """How many decimals a fraction was printed with: 0.5982 four, 0.8 three."""
    exponent = Decimal(repr(value)).as_tuple().exponent
    assert isinstance(exponent, int), "a published value is finite"
    return max(_FEWEST_DECIMALS, -exponent)


def _to_judge(card: ModelCard, results: Sequence[Result], task: TaskCard | None) -> Result:
    """A result that nothing is open about before one of an unchecked file; then today's version of the task, else the
    newest; then what was measured last.
    """

    def order(result: Result) -> tuple[bool, bool, int, str]:
        today = task is not None and result.task_version == task.version
        return (not unchecked_file(card, result), today, result.task_version, result.created)

    return max(results, key=order)


def _other_measurement(result: Result, task: TaskCard | None) -> list[str]:
    """Why ``result`` is not the measurement that the published number is of: another version, card or size."""
    if task is None:
        return []
    said = []
    if task.version != result.task_version:
        said.append(f"measured on v{result.task_version} of the task, which is v{task.version} now")
    elif task.fingerprint() != result.task_fingerprint:
        said.append("the task's card has changed since")
    expected = task.expected_sizes.get("test", result.data.n)
    if expected != result.data.n:
        said.append(f"measured on {result.data.n:,} examples, the published split has {expected:,}")
    return said


def _remarks(card: ModelCard, result: Result, results: Sequence[Result], tasks: Mapping[str, TaskCard]) -> list[str]:
    said = [] if result.task in tasks else ["there is no such task any more"]
    precision = result.settings.get("precision", "fp32")
    if precision != "fp32":
        said.append(f"measured in {precision}")
    alike = [
        other.model.weights_hash
        for other in results
        if why_not_the_cards(card, other) is None
        and bool(unchecked_file(card, other)) == bool(unchecked_file(card, result))
    ]
    if len(set(alike)) > 1:
        said.append("the results under this name come from several weights")
    if card.params is not None and result.model.params not in (None, card.params):
        said.append(f"{count(result.model.params)} parameters, the card says {count(card.params)}")
    return said


def render_verdicts(verdicts: Sequence[Verdict], *, every: bool = False) -> str:
    """The verdicts as a table; numbers not attempted are counted by model unless ``every`` one is asked for."""
    shown = [verdict for verdict in verdicts if every or verdict.status != "not attempted"]
    parts = []
    if shown:
        said = [f"{verdict.source} ({verdict.note})" if verdict.note else verdict.source for verdict in shown]
        numbered = {words: f"[{number}]" for number, words in enumerate(dict.fromkeys(said), start=1)}
        header = ("Model", "Task", "Metric", "Published", "Source", "Ours [95%]", "n", "Verdict")
        align = ("left", "left", "left", "right", "left", "right", "right", "left")
        rows = [_row(verdict, numbered[words]) for verdict, words in zip(shown, said, strict=True)]
        parts.append(tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True))
        parts += ["", *(f"{number} {words}" for words, number in numbered.items()), ""]
    left = [] if every else [verdict for verdict in verdicts if verdict.status == "not attempted"]
    for model in dict.fromkeys(verdict.model for verdict in left):
        names = list(dict.fromkeys(verdict.task for verdict in left if verdict.model == model))
        more = ", …" if len(names) > 6 else ""
        n = sum(verdict.model == model for verdict in left)
        parts.append(f"{model}: {n} not attempted: {', '.join(names[:6])}{more}")
    tally = {status: sum(verdict.status == status for verdict in verdicts) for status in get_args(Status)}
    counts = ", ".join(f"{n} {status}" for status, n in tally.items() if n)
    if n_open := sum(bool(verdict.unchecked) for verdict in verdicts):
        counts += f"; {n_open} of them with a weights file that could not be checked"
    parts.append(f"{len(verdicts)} published number{'s' * (len(verdicts) != 1)}: {counts or 'none'}.")
    return "\n".join(parts) + "\n"


def _percent(value: float, decimals: int | None = None) -> str:
    """A fraction as percent, with its own printed digits or those of another."""
    decimals = printed_decimals(value) if decimals is None else decimals
    return f"{100 * round(value, decimals):.{decimals - 2}f}"


def as_json(verdicts: Sequence[Verdict], tolerance: float) -> dict[str, Any]:
    """The verdicts as plain values; fractions, not percent."""
    return {"tolerance": tolerance, "rows": [asdict(verdict) for verdict in verdicts]}


def _row(verdict: Verdict, source: str) -> tuple[str, ...]:
    decimals = printed_decimals(verdict.published)
    ours = MISSING if verdict.ours is None else _percent(verdict.ours, decimals)
    return (
        verdict.model,
        verdict.task,
        verdict.metric,
        _percent(verdict.published),
        source,
        ours if verdict.ours is None else f"{ours} {verdict.interval()}",
        MISSING if verdict.n is None else f"{verdict.n:,}",
        "; ".join([verdict.words(), *verdict.remarks]),
    )
