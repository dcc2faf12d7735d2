"""The HTML page: well formed, whole in itself, and every value of the tables in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.report.test_leaderboard import example
from tests.report.toy import Toy
from vlbench.report.html import html_page
from vlbench.report.leaderboard import page_of
from vlbench.report.page import Bullets, Heading, Table, Text

VOID = {"meta", "br", "link", "img", "input"}


class Reader(HTMLParser):
    """Cells by table, and whether every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_page_parses_and_holds_every_cell() -> None:
    toy = example()
    blocks = page_of(toy.results, toy.outcomes_of)
    reader = read(html_page(blocks, title="t"))
    tables = [block for block in blocks if isinstance(block, Table)]
    assert len(reader.tables) == len(tables)
    for found, table in zip(reader.tables, tables, strict=True):
        expected = [table.header, *table.rows, *table.foot]
        assert found == [[re.sub(r"\*", "", cell) for cell in row] for row in expected]
    assert "75.0 [70.5, 79.0] ¹" in reader.tables[0][1]


def test_page_needs_no_other_file() -> None:
    toy = example()
    text = html_page(page_of(toy.results, toy.outcomes_of), title="t")
    names = {name for name, _ in read(text).attributes}
    assert not names & {"src", "href", "srcset", "action", "data"}
    assert not re.search(r"https?://|@import|url\(", text)


def test_page_is_the_same_bytes_in_any_order() -> None:
    toy = example()
    pages = {html_page(page_of(results, toy.outcomes_of), title="t") for results in (toy.results, toy.results[::-1])}
    assert len(pages) == 1


def test_names_cannot_become_markup() -> None:
    toy = Toy()
    toy.add("<script>alert(1)</script>", model={"arch": 'a"&<b>'})
    text = html_page(page_of(toy.results, toy.outcomes_of), title="<t>")
    assert text.count("<script>") == 1
    assert "<title>&lt;t&gt;</title>" in text
    assert read(text).tables[0][1][0] == "<script>alert(1)</script>"


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("**62.1** [60.3, 63.8] ²", "62.1"),
        ("-3.2 [a]", "-3.2"),
        ("0.2 [0.0, 0.5] ⁷ (a)", "0.2"),
        ("25.6M", "25600000"),
        ("38.4k", "38400"),
        ("884 cpu", "884"),
        ("–", None),
        ("", None),
    ],
)
def test_numbers_sort_by_value(cell: str, value: str | None) -> None:
    text = html_page([Table(("Name", "N"), (("x", cell),))], title="t")
    assert re.findall(r'data-v="([^"]*)"', text) == ([] if value is None else [value])


def test_marks_become_elements_and_stars_in_names_stay() -> None:
    blocks = [Heading("H", level=1), Text("a `b` **c**\nd"), Bullets(("x < y",)), Table(("N",), (("clip-s*",),))]
    text = html_page(blocks, title="t")
    for part in ("<h1>H</h1>", "<p>a <code>b</code> <b>c</b> d</p>", "<li>x &lt; y</li>", ">clip-s*</td>"):
        assert part in text


_DOM = """
const cell = (text, isWord, v) => ({textContent: text, dataset: {v}, attributes: {}, click: [],
  classList: {contains: () => isWord}, addEventListener(_, f) { this.click.push(f) },
  getAttribute(k) { return this.attributes[k] ?? null }, setAttribute(k, x) { this.attributes[k] = x },
  removeAttribute(k) { delete this.attributes[k] }});
const row = (name, v) => ({cells: [cell(name, true), cell("", false, v)]});
const body = {rows: [row("b10", "2"), row("b9", undefined), row("a", "10"), row("c", "-1")],
  append(...rows) { this.rows = rows }};
const heads = [cell("Name", true), cell("N", false)];
globalThis.document = {querySelectorAll: () => [{tHead: {rows: [{cells: heads}]}, tBodies: [body]}]};
const shown = [], sort = place => {
  heads[place].click[0]();
  shown.push(body.rows.map(r => r.cells[0].textContent).join(" ") + " " + heads[place].getAttribute("aria-sort"));
};
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_a_click_sorts_numbers_by_value_and_words_by_the_alphabet() -> None:
    (script,) = re.findall(r"<script>\n(.*)</script>", html_page([], title="t"), flags=re.S)
    clicks = "sort(1); sort(1); sort(0); sort(0); console.log(JSON.stringify(shown))"
    done = subprocess.run(["node", "-e", _DOM + script + clicks], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        "a b10 c b9 descending",  # the largest first, what was not measured last
        "c b10 a b9 ascending",
        "a b9 b10 c ascending",
        "c b10 b9 a descending",
    ]
