"""A report as blocks: what it says, apart from how that is written down (Markdown here, HTML in ``report.html``).

Blocks hold plain words with two marks of Markdown, ``**bold**`` and `` `code` ``; a name in them needs no escaping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from vlbench.report.tables import escape, markdown_table


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """One paragraph. Its line breaks are kept in Markdown."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list, one line an item."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Words and numbers; ``foot`` stays below the rest, however a reader sorts the rows."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    foot: tuple[tuple[str, ...], ...] = ()
    left: int = 1
    """How many columns, from the left, are words."""


Block: TypeAlias = Heading | Text | Bullets | Table

_WIDEST = 8
"""Columns of numbers in one table: more cannot be read side by side."""


def table_parts(columns: int) -> list[range]:
    """The columns of a wide table in groups that can be read, in order and as even as they come."""
    tables = -(-columns // _WIDEST)
    edges = [round(columns * table / tables) for table in range(tables + 1)] if tables else []
    return [range(first, last) for first, last in pairwise(edges)]


def markdown(blocks: Sequence[Block]) -> str:
    """The page as GitHub's Markdown, the same bytes for the same blocks."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape(text)}"
        case Text(text):
            return "\n".join(escape(line) for line in text.split("\n"))
        case Bullets(items):
            return "\n".join(f"- {escape(item)}" for item in items)
        case Table(header, rows, foot, left):
            return markdown_table(header, [*rows, *foot], left=left)
