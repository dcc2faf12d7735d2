"""``vlbench eval`` of tasks whose adapter trains: alone, under ``torchrun``, and where something goes wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.verbs.test_crew import MODEL, _numbers, _run, _shards, _stored, _together, _words, table
from vlbench.cli import main
from vlbench.core.catalog import ADAPTERS
from vlbench.core.types import Result
from vlbench.store.results import ResultStore

__all__ = ["table"]


@pytest.fixture(autouse=True)
def tuned_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS._table, "tuned", "tests.verbs.tuned_adapter:ADAPTER")


@pytest.fixture
def alone(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Result]:
    (tmp_path / "alone").mkdir()
    return _run(table, tmp_path / "alone", monkeypatch, "--tasks", "tuned")


def _weights(folder: Path) -> dict[str, object]:
    (path,) = (folder / "cache" / "finetune").glob("*/weights.safetensors")
    return {name: tensor.numpy() for name, tensor in load_file(path).items()}


def test_it_says_where_the_model_is_and_does_not_store_it(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = _run(table, tmp_path, monkeypatch, "--tasks", "tuned").values()
    said = capsys.readouterr()
    (place,) = re.findall(r"  note: the fine-tuned model is in (.+)", said.out)
    assert (Path(place) / "weights.safetensors").is_file()
    assert said.err.count("step 10/30  loss") == 1
    assert "on held-out data" in said.err
    assert result.estimates["acc1"].value > 0.5
    assert result.chosen["step"] in (10, 20, 30)
    stored = ResultStore(tmp_path / "results")
    assert place not in stored.path("towers", "tuned/list", 1).read_text()
    assert place not in str(stored.rows(result).meta)


def test_a_finished_model_is_used_again_and_force_trains_it_again(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _run(table, tmp_path, monkeypatch, "--tasks", "tuned")
    capsys.readouterr()
    ResultStore(tmp_path / "results").path("towers", "tuned/list", 1).unlink()
    again = _run(table, tmp_path, monkeypatch, "--tasks", "tuned")
    assert "step 10/30" not in capsys.readouterr().err, "the result was gone, the model was not"
    assert _numbers(again) == _numbers(first)
    forced = _run(table, tmp_path, monkeypatch, "--tasks", "tuned", "--force")
    assert "step 10/30" in capsys.readouterr().err
    assert _numbers(forced) == _numbers(first)


def test_a_forced_call_that_failed_is_gone_on_with_by_the_next(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _run(table, tmp_path, monkeypatch, "--tasks", "tuned")
    monkeypatch.setenv("TUNED_FAILS", "judge")
    assert main([*_words(table, tmp_path, tasks="tuned"), "--force"]) == 1
    monkeypatch.delenv("TUNED_FAILS")
    capsys.readouterr()
    forced = _run(table, tmp_path, monkeypatch, "--tasks", "tuned", "--force")
    said = capsys.readouterr().err
    assert "resuming from step 10 of 30" in said
    assert re.search("going on with what was begun anew; to begin at step 0, delete .*/cache/finetune/", said)
    assert _numbers(forced) == _numbers(first)
    _run(table, tmp_path, monkeypatch, "--tasks", "tuned", "--force")
    assert "step 10/30" in capsys.readouterr().err


def test_force_with_a_precision_spread_trains_one_model_once(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--tasks", "tuned", "--precision-spread")
    _run(table, tmp_path, monkeypatch, *words)
    capsys.readouterr()
    _run(table, tmp_path, monkeypatch, *words, "--force")
    said = capsys.readouterr()
    assert said.err.count("step 10/30  loss") == 1
    assert "  bf16: acc1" in said.out


@pytest.mark.parametrize("start", ["init", "bert"])
def test_a_start_that_is_not_there_is_said_before_the_data_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: str
) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    words = ["eval", "--model", f"{MODEL}:build", "--tasks", "vqa/shapes", "--set", f"{start}={tmp_path}/nowhere"]
    assert main([*words, "--results", str(tmp_path / "results"), "--device", "cpu"]) == 1
    assert re.search(r"FAILED: .*nowhere", capsys.readouterr().err)
    assert not (tmp_path / "cache" / "shapes").exists(), "the embedded world would have been made"


def test_two_processes_train_the_model_of_one(table: Path, tmp_path: Path, alone: dict[str, Result]) -> None:
    """Beside tasks that do not train, before and after it; every image is encoded once."""
    statuses, said = _together(_words(table, tmp_path, tasks="knn,tuned,zeroshot"), tmp_path)
    assert statuses == [0, 0], said
    assert said[1] == ""
    assert said[0].count("step 10/30  loss") == 1
    assert said[0].count("note: the fine-tuned model is in") == 1
    found = _stored(tmp_path)
    assert set(found) == {"knn/list", "tuned/list", "zeroshot/list"}
    assert _numbers({"tuned/list": found["tuned/list"]}) == _numbers(alone)
    for name, value in _weights(tmp_path).items():
        np.testing.assert_allclose(value, _weights(tmp_path / "alone")[name], rtol=1e-12, atol=1e-12)


def test_features_are_dealt_out_without_orders(table: Path, tmp_path: Path) -> None:
    statuses, said = _together([*_words(table, tmp_path, tasks="tuned")], tmp_path)
    assert statuses == [0, 0], said
    sizes = [len(names) for _, names in _shards(tmp_path)]
    assert sum(sizes) == 36
    assert len(sizes) == 4, "train and test, each process its half"
    digests = np.concatenate([names for _, names in _shards(tmp_path)]).tolist()
    assert len(set(digests)) == 36


def test_no_store_trains_together_too(table: Path, tmp_path: Path) -> None:
    statuses, said = _together([*_words(table, tmp_path, tasks="tuned"), "--no-store"], tmp_path)
    assert statuses == [0, 0], said
    assert not _shards(tmp_path)
    assert _stored(tmp_path)["tuned/list"].estimates["acc1"].value > 0.5


@pytest.mark.parametrize(("fails", "line"), [("all", "the same trouble everywhere"), ("judge", "the judge is asleep")])
def test_an_error_that_all_have_fails_the_task_alone(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, line: str
) -> None:
    monkeypatch.setenv("TUNED_FAILS", fails)
    statuses, said = _together(_words(table, tmp_path, tasks="tuned,knn"), tmp_path)
    assert statuses == [1, 1], said
    assert said[1] == ""
    assert f"FAILED tuned/list: {line}" in said[0]
    assert "knn/list" in _stored(tmp_path), "the next task was measured"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_of_one_process_ends_all_with_its_line(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setenv("TUNED_FAILS", rank)
    monkeypatch.setattr("vlbench.verbs.crew.GRACE", 1.0)
    statuses, said = _together(_words(table, tmp_path, tasks="knn,tuned,zeroshot"), tmp_path)
    assert statuses == [1, 1], said
    (line,) = [line for line in "".join(said).splitlines() if "drop of water" in line]
    assert line == f"vlbench: error: a drop of water in the machine (process {rank} of 2)"
    assert said[1] == (line + "\n" if rank == "1" else ""), "it says so itself: torchrun may end the first at once"
    assert "Traceback" not in said[0]
    assert set(_stored(tmp_path)) == {"knn/list"}, "what was finished before is stored"
