from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from tests.verbs.toy_adapter import TOYS, store_toy
from vlbench.core.errors import UserError
from vlbench.store.results import ResultStore
from vlbench.verbs.explain import run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultStore:
    monkeypatch.setattr("vlbench.verbs.outcomes.ADAPTERS", TOYS)
    store = ResultStore(tmp_path / "results")
    for task in ("linear/x", "knn/x"):
        store_toy(store, "timm:a", task, 150)
        store_toy(store, "b", task, 90, config={"threshold": 0.25})
    store_toy(store, "b", "linear/alone", 90)
    return store


def call(store: ResultStore, a: str | Path, b: str | Path, task: str | None = None) -> int:
    return run(argparse.Namespace(a=str(a), b=str(b), task=task, results=str(store.root)))


def test_explain_tells_settings_before_numbers(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(store, "timm:a", "b") == 0
    out = capsys.readouterr().out
    assert out.startswith("A = timm:a, B = b\n")
    assert out.index("setting: threshold") < out.index("+30.0")
    assert out.count("exact McNemar") == 1
    assert out.endswith("\nOnly B has linear/alone.\n")


def test_explain_takes_files_from_elsewhere(
    store: ResultStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    other = ResultStore(tmp_path / "other")
    store_toy(other, "timm:a", "linear/x", 120)
    shutil.copytree(other.path("timm:a", "linear/x", 1).parent, theirs)
    (theirs / "x@v1.json").rename(theirs / "renamed.json")
    mine = store.path("timm:a", "linear/x", 1)
    assert call(store, mine, theirs / "renamed.json") == 0
    out = capsys.readouterr().out
    assert f"A = timm:a ({mine}), B = timm:a ({theirs / 'renamed.json'})" in out
    assert "+15.0" in out
    (theirs / "x@v1.parquet").unlink()
    assert call(store, "timm:a", theirs / "renamed.json") == 0
    out = capsys.readouterr().out
    assert "no test: " in out
    assert "x@v1.parquet: missing" in out
    assert "+15.0" not in out


def test_results_that_are_not_comparable_are_explained(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"spec": "y", "split": "test", "n": 200, "fingerprint": "e"}
    store_toy(store, "c", "linear/x", 100, data=data)
    assert call(store, "timm:a", "c") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].startswith("- linear/x: not comparable: other data")
    assert "McNemar" not in out


def test_versions_that_both_have_are_paired(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    store_toy(store, "b", "linear/x", 60, task_version=2)
    call(store, "timm:a", "b", "linear/x")
    assert "+30.0" in capsys.readouterr().out
    store_toy(store, "c", "linear/x", 60, task_version=2)
    call(store, "timm:a", "c")
    assert "not comparable: task versions 1 and 2" in capsys.readouterr().out


def test_errors_name_the_nearest(store: ResultStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown model 'timm:b'; did you mean 'timm:a'"):
        call(store, "timm:b", "b")
    with pytest.raises(UserError, match="unknown task 'linear/y'; did you mean 'linear/x'"):
        call(store, "timm:a", "b", "linear/y")
    with pytest.raises(UserError, match="both words name the same, b"):
        call(store, "b", "b")
    with pytest.raises(UserError, match="there is no such file"):
        call(store, "b", tmp_path / "gone.json")
    store_toy(store, "c", "linear/only", 60)
    with pytest.raises(UserError, match="no common task: A has linear/only; B has knn/x"):
        call(store, "c", "b")
    with pytest.raises(UserError, match="no stored result; `vlbench eval"):
        call(ResultStore(tmp_path / "nothing"), "a", "b")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"x\.json: not a stored result"):
        call(store, tmp_path / "x.json", "b")
