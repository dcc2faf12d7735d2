"""How numbers and tables look: the same everywhere, the same bytes for the same input."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

from vlbench.core.types import Estimate

MISSING = "–"
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A GitHub table; the first ``left`` columns are words (flush left), the others numbers (flush right)."""
    align = ["left"] * left + ["right"] * (len(header) - left)
    cells = [[escape(cell) for cell in row] for row in rows]
    return tabulate(cells, [escape(name) for name in header], tablefmt="pipe", colalign=align, disable_numparse=True)


def escape(text: str) -> str:
    """``text`` so that a name cannot break the table or become HTML."""
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def percent(fraction: float, *, signed: bool = False) -> str:
    """0.6214 as ``62.1``, or ``+62.1``; a negative zero loses its sign."""
    rounded = round(100 * fraction, 1) + 0.0
    return f"{rounded:+.1f}" if signed else f"{rounded:.1f}"


def interval(lo: float, hi: float, *, signed: bool = False) -> str:
    """``[60.3, 63.8]`` in percent."""
    return f"[{percent(lo, signed=signed)}, {percent(hi, signed=signed)}]"


def cell(estimate: Estimate, *, rank: int | None = None, bold: bool = False) -> str:
    """``62.1 [60.3, 63.8] ¹``, the value in bold for a winner."""
    value = percent(estimate.value)
    words = [f"**{value}**" if bold else value, interval(estimate.lo, estimate.hi)]
    if rank is not None:
        words.append(str(rank).translate(_SUPERSCRIPTS))
    return " ".join(words)


def p_value(p: float) -> str:
    """Three decimals, or ``<0.001``: never zero."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def count(number: int | None) -> str:
    """25557032 as ``25.6M``, 960000 as ``960k``."""
    if number is None:
        return MISSING
    for size, letter in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.1f}".removesuffix(".0") + letter
    return str(number)
