from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.verbs.toy_adapter import TOYS, store_toy
from vlbench.core.errors import UserError
from vlbench.store.results import ResultStore
from vlbench.verbs.compare import run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultStore:
    monkeypatch.setattr("vlbench.verbs.outcomes.ADAPTERS", TOYS)
    store = ResultStore(tmp_path / "results")
    for task in ("linear/x", "knn/x"):
        store_toy(store, "timm:a", task, 150)
        store_toy(store, "b", task, 90)
    return store


def call(store: ResultStore, a: str, b: str, metric: str | None = None) -> int:
    return run(argparse.Namespace(a=a, b=b, results=str(store.root), metric=metric))


def test_compare_prints_every_shared_task(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(store, "timm:a", "b") == 0
    out = capsys.readouterr().out
    assert "A = timm:a, B = b" in out
    assert out.count("A better") == 2
    assert "+30.0" in out


def test_compare_takes_the_folder_name_too(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(store, "b", "timm-a") == 0
    assert "A = b, B = timm:a" in capsys.readouterr().out


def test_compare_proposes_the_nearest_model_and_metric(store: ResultStore) -> None:
    with pytest.raises(UserError, match="unknown model 'timm:b'; did you mean 'timm:a'"):
        call(store, "timm:b", "b")
    with pytest.raises(UserError, match="did you mean 'acc1'"):
        call(store, "timm:a", "b", "acc5")
    with pytest.raises(UserError, match="the same model"):
        call(store, "b", "b")


def test_compare_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no stored result"):
        call(ResultStore(tmp_path / "nothing"), "a", "b")


def test_compare_goes_on_without_what_is_damaged(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.path("b", "knn/x", 1).with_name("x@v1.parquet").unlink()
    assert call(store, "timm:a", "b") == 1
    said = capsys.readouterr()
    assert "knn/x@v1.parquet: missing" in said.err
    assert said.out.count("A better") == 1
    store.path("b", "linear/x", 1).write_text("{")
    with pytest.raises(UserError, match="nothing is left to compare"):
        call(store, "timm:a", "b")
