from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.verbs.toy_adapter import ADAPTER, TOYS, store_toy
from vlbench.core.catalog import ADAPTERS
from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.stats.intervals import estimate
from vlbench.store.results import ResultStore
from vlbench.verbs.leaderboard import run
from vlbench.verbs.outcomes import adapter_peer


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultStore:
    monkeypatch.setattr("vlbench.verbs.outcomes.ADAPTERS", TOYS)
    store = ResultStore(tmp_path / "results")
    store_toy(store, "a", "linear/x", 150)
    store_toy(store, "b", "linear/x", 90)
    return store


def call(store: ResultStore, *, check: bool = False, html: Path | None = None) -> int:
    return run(argparse.Namespace(results=str(store.root), check=check, html=None if html is None else str(html)))


def test_leaderboard_is_written_and_is_current(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(store) == 0
    text = (store.root / "LEADERBOARD.md").read_text()
    assert "| **75.0** [68.6, 80.5] ¹ |" in text
    assert "2 results of 2 models" in capsys.readouterr().out
    assert call(store, check=True) == 0
    before = (store.root / "LEADERBOARD.md").read_bytes()
    assert call(store) == 0
    assert (store.root / "LEADERBOARD.md").read_bytes() == before


def test_check_says_missing_and_stale_and_writes_nothing(
    store: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store.root / "LEADERBOARD.md"
    assert call(store, check=True) == 1
    assert not path.exists()
    assert f"{path}: missing; run: vlbench leaderboard" in capsys.readouterr().err
    call(store)
    before = path.read_bytes()
    store_toy(store, "c", "linear/x", 100)
    capsys.readouterr()
    assert call(store, check=True) == 1
    assert capsys.readouterr().err == f"{path}: stale; run: vlbench leaderboard --results {store.root}\n"
    assert path.read_bytes() == before
    call(store)
    assert call(store, check=True) == 0


def test_html_holds_the_same_tables(store: ResultStore, tmp_path: Path) -> None:
    assert call(store, html=tmp_path / "board.html") == 0
    text = (tmp_path / "board.html").read_text()
    assert "<b>75.0</b> [68.6, 80.5] ¹</td>" in text
    assert "45.0 [38.3, 51.9] ²</td>" in text
    with pytest.raises(UserError, match="--check writes nothing"):
        call(store, check=True, html=tmp_path / "board.html")


def test_notes_and_settings_stand_under_the_table(store: ResultStore) -> None:
    rows = Rows({"id": ["i", "j"], "score": np.array([0.0, 1.0], dtype=np.float32)}, {"notes": ["N.B. a leak"]})
    estimates = {"acc1": estimate(ADAPTER.outcomes(rows, ADAPTER.Config())["acc1"])}
    result = store.load("a", "linear/x").model_copy(update={"task": "linear/y", "estimates": estimates})
    store.save(result, rows)
    store_toy(store, "a", "linear/z", 100, config={"threshold": 0.25})
    assert call(store) == 0
    text = (store.root / "LEADERBOARD.md").read_text()
    assert "- (a) N.B. a leak\n" in text
    assert "] (a) |" in text
    assert "- **y: acc1**: `toy` with its default settings, 200 examples. Without a task card." in text
    assert "- **z: acc1**: `toy` with threshold = 0.25 (default 0.5), 200 examples." in text
    assert call(store, check=True) == 0


def test_protocols_of_other_harnesses_are_known_by_their_adapters() -> None:
    peers = {name: peer for name in ADAPTERS.names() if (peer := adapter_peer(name)) is not None}
    assert peers == {"clip_benchmark_probe": "CLIP_benchmark", "elevater_probe": "ELEVATER", "svm": "VirTex"}


def test_check_notices_an_edited_page(store: ResultStore) -> None:
    call(store)
    path = store.root / "LEADERBOARD.md"
    path.write_text(path.read_text().replace("75.0", "76.0"))
    assert call(store, check=True) == 1


@pytest.mark.parametrize("damage", ["json", "rows", "changed rows", "number"])
def test_damaged_results_are_listed_and_fail(
    store: ResultStore, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call(store)
    path = store.path("b", "linear/x", 1)
    parquet = path.with_name("x@v1.parquet")
    match damage:
        case "json":
            path.write_text(path.read_text()[:100])
        case "rows":
            parquet.unlink()
        case "changed rows":
            parquet.write_bytes(parquet.read_bytes() + b" ")
        case "number":
            path.write_text(path.read_text().replace('"value": 0.45', '"value": 0.46'))
    capsys.readouterr()
    assert call(store, check=True) == 1
    assert str(path).removesuffix(".json") in capsys.readouterr().err
    assert call(store) == 1
    text = (store.root / "LEADERBOARD.md").read_text()
    assert "## Left out" in text
    assert "- b/linear/x@v1." in text
    assert str(store.root) not in text
    assert "| a " in text
    assert "| b " not in text
    assert call(store, check=True) == 1


def test_page_does_not_depend_on_how_the_folder_is_named(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.path("b", "linear/x", 1).write_text("{")
    call(store)
    before = (store.root / "LEADERBOARD.md").read_bytes()
    for folder, name in ((store.root, "."), (store.root.parent, "results"), (store.root.parent, "./results/")):
        monkeypatch.chdir(folder)
        run(argparse.Namespace(results=name, check=False))
        assert (store.root / "LEADERBOARD.md").read_bytes() == before


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no stored result; `vlbench eval"):
        call(ResultStore(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_an_unknown_adapter_is_listed(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    store_toy(store, "c", "linear/x", 100, adapter="tony")
    assert call(store) == 1
    path = store.path("c", "linear/x", 1)
    assert f"{path}: unknown adapter 'tony'; did you mean 'toy'?" in capsys.readouterr().err


def test_rows_that_lack_a_column_are_listed(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    result = store.load("a", "linear/x")
    store.save(result, Rows({"id": ["x"]}))
    assert call(store) == 1
    assert "its rows lack the column 'score'" in capsys.readouterr().err


def test_leaderboard_and_compare_load_no_torch() -> None:
    code = (
        "import sys, vlbench.verbs.leaderboard, vlbench.verbs.compare, vlbench.verbs.outcomes\n"
        "import vlbench.report.leaderboard, vlbench.report.compare, vlbench.store.features\n"
        "from vlbench.core.catalog import ADAPTERS\n"
        "[ADAPTERS.get(name) for name in ADAPTERS.names()]\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
