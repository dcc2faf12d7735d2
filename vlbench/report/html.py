"""The blocks of a report as one HTML file that needs nothing else: no network, no other file.

Tables sort by a click on a column's title (words by the alphabet, numbers by value, the largest first; what was not
measured stays last, and the row of chance stays at the foot). Without JavaScript the page is the same, unsorted.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from vlbench.report.page import Block, Bullets, Heading, Table, Text

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}
_NUMBER = re.compile(r"(?:\*\*)?([+-]?\d+(?:\.\d+)?)(?:\*\*)?([kMB]?)(?=\s|$)")

_STYLE = """\
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem }
p, li { max-width: 60rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; white-space: nowrap; text-align: right }
.w { text-align: left }
thead th { cursor: pointer; border-bottom-width: 2px }
th[aria-sort=ascending]::after { content: " ▲" }
th[aria-sort=descending]::after { content: " ▼" }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas }
tfoot td { font-style: italic }
"""

_SCRIPT = """\
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const isNumber = !head.classList.contains("w");
    const before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : !isNumber;
    const key = row => isNumber ? parseFloat(row.cells[column].dataset.v) : row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (isNumber && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y);
      return (isNumber ? x - y : x.localeCompare(y, undefined, {numeric: true})) * (up ? 1 : -1);
    });
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  }));
}
"""


def html_page(blocks: Sequence[Block], *, title: str) -> str:
    """One self-contained page, the same bytes for the same blocks."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>\n{_STYLE}</style>\n</head>\n<body>\n{body}\n<script>\n{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in items) + "\n</ul>"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col" class="w">{_inline(name)}</th>'
        if place < table.left
        else f'<th scope="col">{_inline(name)}</th>'
        for place, name in enumerate(table.header)
    )
    parts = [f"<thead>\n<tr>{head}</tr>\n</thead>", f"<tbody>\n{_rows(table, table.rows)}</tbody>"]
    if table.foot:
        parts.append(f"<tfoot>\n{_rows(table, table.foot)}</tfoot>")
    return '<div class="wide"><table>\n' + "\n".join(parts) + "\n</table></div>"


def _rows(table: Table, rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for row in rows:
        cells = [
            f'<td class="w">{_inline(cell)}</td>'
            if place < table.left
            else f"<td{_sort_value(cell)}>{_inline(cell)}</td>"
            for place, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return "".join(lines)


def _sort_value(cell: str) -> str:
    """The number that a cell begins with, as an attribute: ``**62.1** [60.3, 63.8]`` is 62.1, ``25.6M`` 25600000."""
    found = _NUMBER.match(cell)
    return f' data-v="{float(found[1]) * _UNITS[found[2]]:.10g}"' if found else ""


def _inline(text: str) -> str:
    """``text`` safe in HTML, with the two marks that blocks may hold."""
    text = html.escape(" ".join(text.split()))
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    return re.sub(r"^\*([^*]+)\*$", r"\1", text)  # *chance*: the foot of a table is in italics as it is
