from __future__ import annotations

from pathlib import Path

import pytest

from vlbench.core import cards
from vlbench.core.catalog import ADAPTERS
from vlbench.core.config import parse
from vlbench.core.errors import UserError

CARD = {"name": "linear/x", "version": 1, "title": "t", "adapter": "linear", "data": ["hf:x"], "metric": "acc1"}


@pytest.mark.parametrize("name", sorted(cards.task_cards()))
def test_task_card_fits_its_adapter(name: str) -> None:
    card = cards.task_cards()[name]
    adapter = ADAPTERS.get(card.adapter)
    parse(adapter.Config, card.protocol, where=name)
    assert card.kind == card.adapter
    assert card.chance is None or 0 < card.chance < 1
    assert card.how_to_get or all(spec.startswith("shapes") for spec in card.data), (
        f"{name} says not how to get its data"
    )
    assert len(card.fingerprint()) == 16


@pytest.mark.parametrize("name", sorted(cards.model_cards()))
def test_model_card_sources_its_numbers(name: str) -> None:
    for number in cards.model_cards()[name].published:
        assert number.source
        assert 0 < number.value < 1, "fractions, not percentages"


def test_suites_name_known_tasks() -> None:
    assert "smoke" in cards.suites()


def test_card_with_an_unknown_key_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("version: 1\ntitle: t\nadapter: linear\ndata: [a]\nmetrc: acc1\nmetric: acc1\n")
    with pytest.raises(UserError, match=r"x\.yaml: unknown key 'metrc'; did you mean 'metric'\?"):
        cards.read_task_card(path, "linear/x")


def test_card_that_is_no_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("version: 1\ntitle: [t\nadapter: linear\n")
    with pytest.raises(UserError, match=r"x\.yaml, line \d"):
        cards.read_task_card(path, "linear/x")


def test_yaml_cannot_build_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("title: !!python/object/apply:os.system ['touch /tmp/never']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        cards.read_yaml(path)


def test_fingerprint_covers_what_moves_numbers_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    card = parse(cards.TaskCard, {**CARD, "prompts": {"templates": "simple"}}, where="")
    assert card.fingerprint() == card.model_copy(update={"title": "other"}).fingerprint()
    for change in ({"version": 2}, {"protocol": {"k": 3}}, {"metric": "acc5"}, {"data": ("hf:y",)}):
        assert card.fingerprint() != card.model_copy(update=change).fingerprint()
    before = card.fingerprint()
    monkeypatch.setattr(cards, "prompt_lines", lambda name: ("a {}.",))
    assert card.fingerprint() != before
