"""What stands under the leaderboard's tables: protocols by column, notes on the data by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.report.test_leaderboard import row
from tests.report.toy import Toy
from vlbench.core.cards import TaskCard
from vlbench.core.types import BEST_ON_TEST_GAP, Result
from vlbench.report.columns import make_columns
from vlbench.report.compare import compare_models
from vlbench.report.leaderboard import page_of, render
from vlbench.report.legend import Background, protocol_line, shows_peer
from vlbench.report.page import Table, table_parts

LEAK = "N.B. the model was pretrained on these very images"
SHARED = "8 of 400 captions also belong to another image"


def task_card(name: str = "linear/cifar10", **changes: Any) -> TaskCard:
    words = {"version": 1, "title": "CIFAR-10, linear probe", "adapter": "linear", "data": ["hf:x"], "metric": "acc1"}
    return TaskCard.model_validate({"name": name, **words, **changes})


def noted(notes: Mapping[str, Sequence[str]]) -> Background:
    def notes_of(result: Result) -> Sequence[str]:
        return notes.get(result.model.name, ())

    return Background(notes_of=notes_of)


def line(card: TaskCard | None, **changes: Any) -> str:
    toy = Toy()
    if card is not None:
        changes = {"task_fingerprint": card.fingerprint()} | changes
    toy.add("a", **changes)
    (column,) = make_columns(toy.results, toy.outcomes_of)
    cards = {} if card is None else {card.name: card}
    return protocol_line(column, Background(cards, {"linear": {"c": 1.0, "grid": {"low": 1e-6}}}))


def test_protocol_says_adapter_title_source_and_size() -> None:
    config = {"c": 1.0, "grid": {"low": 1e-6}}
    assert line(task_card(source="arXiv 2103.00020"), config=config) == (
        "**cifar10: acc1**: `linear` with its default settings, 400 examples. "
        "CIFAR-10, linear probe (arXiv 2103.00020)."
    )


def test_protocol_says_what_choosing_by_the_test_set_would_add() -> None:
    toy = Toy()
    plain = toy.add("b", adapter="elevater_probe").estimates
    gap = plain["acc1"].model_copy(update={"value": 0.04, "lo": -0.01, "hi": 0.09})
    toy.add("a", adapter="elevater_probe", estimates=plain | {BEST_ON_TEST_GAP: gap})
    (column,) = make_columns(toy.results, toy.outcomes_of)
    said = protocol_line(column, Background(peers={"elevater_probe": "ELEVATER"}))
    assert said.endswith("as the original does, the numbers would change by: a +4.0 [-1.0, +9.0].")


def test_protocol_says_the_settings_that_differ_from_the_default() -> None:
    said = line(task_card(), config={"c": None, "grid": {"low": 1e-3}})
    assert "`linear` with c = none (default 1), grid.low = 0.001 (default 1e-06)," in said


def test_a_setting_that_came_later_is_no_difference_and_one_that_went_is_said() -> None:
    assert "`linear` with its default settings," in line(task_card(), config={"c": 1.0})
    assert "`linear` with old = 3," in line(task_card(), config={"c": 1.0, "old": 3})


def test_protocol_says_the_prompts() -> None:
    assert "default settings, prompts/cifar10, 400" in line(
        task_card(prompts={"templates": "cifar10"}), config={"c": 1.0, "grid": {"low": 1e-6}}
    )


def test_a_card_that_changed_since_is_said() -> None:
    assert "Measured under an earlier card; today's is v2: CIFAR-10" in line(task_card(version=2), task_version=1)
    assert "Measured under an earlier card; today's is v1" in line(task_card(), task_fingerprint="another")
    assert line(None).endswith("400 examples. Without a task card.")


@pytest.mark.parametrize(("adapter", "is_peer"), [("svm", True), ("linear", False)])
def test_a_peers_protocol_is_marked_at_the_title_and_in_the_legend(adapter: str, is_peer: bool) -> None:
    toy = Toy()
    toy.add("a", adapter=adapter)
    background = Background({"linear/cifar10": task_card(title="CIFAR-10, VirTex's SVM")}, peers={"svm": "VirTex"})
    (column,) = make_columns(toy.results, toy.outcomes_of)
    assert shows_peer(column, background) is is_peer
    text = render(toy.results, toy.outcomes_of, background=background)
    assert ("| cifar10: acc1 † |" in " ".join(text.split())) is is_peer
    assert ("- † **cifar10: acc1**: `svm` (VirTex's own protocol) with" in text) is is_peer


def test_a_note_stands_against_its_cell() -> None:
    toy = Toy()
    toy.add("a", right=300)
    toy.add("b", right=200)
    text = render(toy.results, toy.outcomes_of, background=noted({"b": [LEAK]}))
    assert row(text, "a", "linear")[1].endswith("¹")
    assert row(text, "b", "linear")[1].endswith("² (a)")
    assert f"Notes on the data:\n\n- (a) {LEAK}\n" in text


def test_a_note_of_every_cell_stands_at_the_title() -> None:
    toy = Toy()
    for name in ("a", "b"):
        toy.add(name)
    text = render(toy.results, toy.outcomes_of, background=noted({"a": [SHARED], "b": [LEAK, SHARED]}))
    assert row(text, "Model", "linear")[1] == "cifar10: acc1 (a)"
    assert row(text, "a", "linear")[1].endswith("¹")
    assert row(text, "b", "linear")[1].endswith("(b)")
    assert f"- (a) {SHARED}\n- (b) {LEAK}\n" in text


def test_one_result_keeps_its_note_at_the_cell() -> None:
    toy = Toy()
    toy.add("a")
    text = render(toy.results, toy.outcomes_of, background=noted({"a": [LEAK]}))
    assert row(text, "a", "linear")[1] == "60.0 [55.1, 64.7] (a)"


def test_more_notes_than_letters() -> None:
    toy = Toy()
    toy.add("a")
    text = render(toy.results, toy.outcomes_of, background=noted({"a": [f"note {k}" for k in range(30)]}))
    for letter, k in (("a", 0), ("z", 25), ("aa", 26), ("ad", 29)):
        assert f"- ({letter}) note {k}\n" in text


def test_notes_and_protocols_are_the_same_bytes_in_any_order() -> None:
    toy = Toy()
    for name in ("a", "b", "c"):
        toy.add(name)
        toy.add(name, "linear/other")
    background = noted({"b": [LEAK, SHARED], "c": [SHARED]})
    pages = {render(results, toy.outcomes_of, background=background) for results in (toy.results, toy.results[::-1])}
    assert len(pages) == 1


def test_compare_says_the_notes_of_the_tasks_that_it_compares() -> None:
    toy = Toy()
    for name in ("a", "b"):
        toy.add(name, "linear/x")
    toy.add("a", "linear/alone")
    notes_of = noted({"a": [LEAK, SHARED], "b": [SHARED]}).notes_of
    sides = [[result for result in toy.results if result.model.name == name] for name in ("a", "b")]
    notes = compare_models(*sides, toy.outcomes_of, notes_of=notes_of).notes
    assert notes[-2:] == (f"linear/x, A: {LEAK}", f"linear/x, A and B: {SHARED}")
    assert not any(note.startswith("linear/alone, ") for note in notes)


def test_a_wide_section_becomes_several_tables_in_one_order() -> None:
    toy = Toy()
    for k in range(20):
        toy.add("good", f"linear/{k:02d}", right=300)
        if k < 7:
            toy.add("bad", f"linear/{k:02d}", right=100)
    tables = [block for block in page_of(toy.results, toy.outcomes_of) if isinstance(block, Table)][:-1]
    assert [len(table.header) - 1 for table in tables] == [7, 6, 7]
    assert [[cells[0] for cells in table.rows] for table in tables] == [["good", "bad"], ["good"], ["good"]]
    titles = [title for table in tables for title in table.header[1:]]
    assert titles == [f"{k:02d}: acc1" for k in range(20)]


@pytest.mark.parametrize("columns", range(40))
def test_tables_hold_every_column_once_and_never_too_many(columns: int) -> None:
    parts = table_parts(columns)
    assert [place for part in parts for place in part] == list(range(columns))
    assert all(1 <= len(part) <= 8 for part in parts)
