from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.verbs.toy_adapter import store_toy
from vlbench.core import cards
from vlbench.core.cards import ModelCard
from vlbench.core.errors import UserError
from vlbench.store.results import ResultStore
from vlbench.verbs import session
from vlbench.verbs.verify import run


def card(name: str, *values: float) -> ModelCard:
    published = [{"task": "linear/x", "metric": "acc1", "value": value, "source": "the paper"} for value in values]
    words = {"id": name, "loader": "timm", "arch": "a", "preprocess": {"image_size": 224}, "published": published}
    return ModelCard.model_validate(words)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultStore:
    known = [card("ref-a", 0.75, 0.4), card("ref-b", 0.5), card("ref-c")]
    monkeypatch.setattr(cards, "model_cards", lambda: {each.id: each for each in known})
    monkeypatch.setattr(cards, "task_cards", dict)
    store = ResultStore(tmp_path / "results")
    store_toy(store, "own", "linear/x", 90)
    return store


def call(store: ResultStore, *models: str, **changes: Any) -> int:
    words = {"model": list(models), "all": False, "tolerance": 0.005, "json": None, "results": str(store.root)}
    return run(argparse.Namespace(**(words | changes)))


def test_verify_takes_the_models_that_have_a_result(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(store) == 0
    assert "none of its 1 models is a reference model" in capsys.readouterr().out
    store_toy(store, "ref-a", "linear/x", 120)
    assert call(store) == 1
    out = capsys.readouterr().out
    assert "off by -15.0 points (interval [53.1, 66.5]); of 2 published numbers 75.0 is the nearest" in out
    assert "2 published numbers: 2 off." in out
    assert "ref-b" not in out


def test_sources_that_disagree_are_shown_and_fail_nothing(
    store: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store_toy(store, "ref-a", "linear/x", 150)
    assert call(store) == 0
    out = capsys.readouterr().out
    assert "sources disagree (+35.0 points): 40.0 here; 75.0, published too, is reproduced" in out
    assert "2 published numbers: 1 reproduced, 1 sources disagree." in out


def test_verify_named_and_all(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(store, "ref-b") == 0
    assert capsys.readouterr().out == ("ref-b: 1 not attempted: linear/x\n1 published number: 1 not attempted.\n")
    assert call(store, all=True) == 0
    assert capsys.readouterr().out.count("there is no such task here") == 3
    assert call(store, "ref-c") == 0
    assert capsys.readouterr().out == "no number is known to be published of ref-c\n"


def test_tolerance_decides_and_is_checked(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    store_toy(store, "ref-a", "linear/x", 150)
    assert call(store, tolerance=0.36) == 0
    for tolerance in (-0.1, float("nan"), 5.0):
        with pytest.raises(UserError, match=r"write a fraction, for instance 0\.005"):
            call(store, tolerance=tolerance)


def test_other_weights_under_the_cards_name_are_refused(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"name": "ref-a", "spec": "runs/a", "weights_hash": "w", "backbone_fingerprint": "b", "random": False}
    store_toy(store, "ref-a", "linear/x", 150, model=model)
    assert call(store) == 0
    assert "refused: made from runs/a" in capsys.readouterr().out
    store_toy(store, "ref-b@file", "linear/x", 150, model=model | {"name": "ref-b@file"})
    assert call(store) == 0
    assert "refused: made from runs/a" in " ".join(capsys.readouterr().out.split())
    store_toy(
        store, "ref-b@file", "linear/x", 100, model=model | {"name": "ref-b@file", "spec": "ref-b --weights f.pt"}
    )
    assert call(store, "ref-b") == 0
    assert "reproduced; f.pt could not be checked" in " ".join(capsys.readouterr().out.split())


def test_json_is_written(store: ResultStore, tmp_path: Path) -> None:
    store_toy(store, "ref-a", "linear/x", 150)
    call(store, json=str(tmp_path / "v.json"))
    rows = json.loads((tmp_path / "v.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["reproduced", "sources disagree"]


def test_unknown_models_propose_the_nearest(store: ResultStore) -> None:
    with pytest.raises(UserError, match="unknown reference model 'ref-d'; did you mean 'ref-"):
        call(store, "ref-d")
    with pytest.raises(UserError, match="own is no reference model"):
        call(store, "own")


def test_a_damaged_result_is_said_and_fails(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.path("own", "linear/x", 1).write_text("{")
    assert call(store, "ref-b") == 1
    assert "not a stored result" in capsys.readouterr().err


def test_verify_and_explain_load_no_torch() -> None:
    code = (
        "import sys, vlbench.verbs.verify, vlbench.verbs.explain, vlbench.report.verify, vlbench.report.explain\n"
        "import vlbench.report.html\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_folder_called_like_a_card_is_not_named_like_it_in_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert session._asked_for("virtex-r50", "f.pt") == "virtex-r50 --weights f.pt"
    (tmp_path / "virtex-r50").mkdir()
    (tmp_path / "mine").mkdir()
    assert session._asked_for("virtex-r50", None) == "./virtex-r50"
    assert session._asked_for("mine", None) == "mine"
