"""What stands behind a column and a cell: which protocol it shows, and what was noted about the data.

A number without its protocol is half a number, and one with a warning (test images among the training images, say)
must not be read without it: both stand under the table that shows the number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

from vlbench.core.cards import TaskCard
from vlbench.core.config import flatten
from vlbench.core.types import BEST_ON_TEST_GAP, Result
from vlbench.report.columns import Column
from vlbench.report.tables import interval, percent

PEER_MARK = "†"

NotesOf: TypeAlias = Callable[[Result], Sequence[str]]
"""The notes on the data that were stored with a result's rows."""


def _no_notes(_: Result) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Background:
    """What is known of stored results beyond themselves."""

    cards: Mapping[str, TaskCard] = field(default_factory=dict)
    """Today's task cards by name."""
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Adapter → its settings where a card says nothing."""
    notes_of: NotesOf = _no_notes
    peers: Mapping[str, str] = field(default_factory=dict)
    """Adapter → the harness or paper whose own protocol it is, where it is one's."""


NOTHING_KNOWN = Background()


def shows_peer(column: Column, background: Background) -> bool:
    """Whether the column's adapter is another harness's or paper's own protocol."""
    return any(result.adapter in background.peers for result in column.results.values())


def protocol_line(column: Column, background: Background) -> str:
    """One line: adapter, the settings that differ from its defaults, examples, title and source of the card."""
    result = next(iter(column.results.values()))
    peer = background.peers.get(result.adapter)
    whose = "" if peer is None else f" ({peer}'s own protocol)"
    words = [f"`{result.adapter}`{whose} {_settings(result, background.defaults.get(result.adapter))}"]
    card = background.cards.get(result.task)
    is_current = card is not None and (card.version, card.fingerprint()) == (
        column.protocol.version,
        column.protocol.card,
    )
    if card is not None and is_current:
        words += [f"prompts/{name}" for name in (card.prompts.templates, card.prompts.classnames) if name]
    words.append(f"{' or '.join(f'{n:,}' for n in sorted({r.data.n for r in column.results.values()}))} examples")
    mark = f"{PEER_MARK} " if shows_peer(column, background) else ""
    line = f"{mark}**{column.title}**: {', '.join(words)}."
    if card is None:
        return f"{line} Without a task card.{_best_on_test(column)}"
    if not is_current:
        line += f" Measured under an earlier card; today's is v{card.version}:"
    return f"{line} {card.title}{f' ({card.source})' if card.source else ''}.{_best_on_test(column)}"


def _best_on_test(column: Column) -> str:
    """How much higher each number would be if the test set itself had done the choosing, where that was measured."""
    gaps = {
        label: result.estimates[BEST_ON_TEST_GAP]
        for label, result in column.results.items()
        if BEST_ON_TEST_GAP in result.estimates
    }
    if not gaps:
        return ""
    said = (f"{label} {percent(g.value, signed=True)} {interval(g.lo, g.hi, signed=True)}" for label, g in gaps.items())
    return f" Chosen by the test set itself, as the original does, the numbers would change by: {', '.join(said)}."


def _settings(result: Result, defaults: Mapping[str, Any] | None) -> str:
    if defaults is None:
        return "with " + ", ".join(f"{key} = {value}" for key, value in sorted(flatten(result.config).items()))
    mine, theirs = flatten(result.config), flatten(defaults)
    # A setting that the result does not have is younger than the result, not another choice.
    changed = [
        f"{key} = {_said(value)}" + (f" (default {_said(theirs[key])})" if key in theirs else "")
        for key, value in sorted(mine.items())
        if key not in theirs or theirs[key] != value
    ]
    return "with " + ", ".join(changed) if changed else "with its default settings"


def _said(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


class Footnotes:
    """The data notes of one section, each lettered once, at the first cell that it belongs to.

    A note that every result of a column carries is about the data rather than a model: it stands at the column's
    title.
    """

    def __init__(self, columns: Sequence[Column], background: Background) -> None:
        self._letters: dict[str, str] = {}
        self._of_column: list[list[str]] = []
        self._of_cell: list[dict[str, list[str]]] = []
        letters = _letters()
        for column in columns:
            by_label = {label: list(background.notes_of(result)) for label, result in column.results.items()}
            lists = list(by_label.values())
            shared = [note for note in lists[0] if len(lists) > 1 and all(note in others for others in lists)]
            self._of_column.append(shared)
            self._of_cell.append({k: [note for note in notes if note not in shared] for k, notes in by_label.items()})
            for note in (*shared, *(note for notes in self._of_cell[-1].values() for note in notes)):
                if note not in self._letters:
                    self._letters[note] = next(letters)

    def at_title(self, column: int) -> str:
        """`` (a)`` for the notes of a whole column, or nothing."""
        return self._marks(self._of_column[column])

    def at_cell(self, column: int, label: str) -> str:
        """`` (b, c)`` for the notes of one model in that column, or nothing."""
        return self._marks(self._of_cell[column].get(label, []))

    def lines(self) -> tuple[str, ...]:
        """Every note with its letter."""
        return tuple(f"({letter}) {note}" for note, letter in self._letters.items())

    def _marks(self, notes: Sequence[str]) -> str:
        return f" ({', '.join(self._letters[note] for note in notes)})" if notes else ""


def _letters() -> Iterator[str]:
    """Letters without end: a, b, … z, aa, ab and so on."""
    for number in count(1):
        word = ""
        while number:
            number, place = divmod(number - 1, 26)
            word = chr(ord("a") + place) + word
        yield word
