"""The results that the repository publishes: every file is sound, and the leaderboard is what they say."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from vlbench.cli import main
from vlbench.report.columns import Protocol
from vlbench.store.results import ResultStore

RESULTS = Path(__file__).resolve().parent.parent / "results"


def test_published_leaderboard_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", "--check", "--results", str(RESULTS)]) == 0, capsys.readouterr()


@pytest.mark.parametrize("table", sorted((RESULTS / "studies").glob("*.md")), ids=lambda path: path.stem)
def test_published_table_of_a_study_is_current(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = RESULTS.parent / "benchmarks" / "studies" / f"{table.stem}.yaml"
    assert main(["study", str(study), "--check", "--results", str(RESULTS)]) == 0, capsys.readouterr()


def test_published_results_fit_the_published_schema() -> None:
    schema = json.loads((RESULTS / "schema" / "result.v1.json").read_text())
    for result in ResultStore(RESULTS).all():
        jsonschema.validate(result.model_dump(mode="json"), schema)


def test_published_results_have_a_random_row_for_every_task() -> None:
    results = ResultStore(RESULTS).all()
    assert results
    random = {result.task for result in results if result.model.random}
    assert {result.task for result in results} <= random


def test_published_results_of_a_task_share_one_protocol() -> None:
    """Else they lie in tables of their own, and no two of them are compared."""
    protocols: dict[str, set[Protocol]] = {}
    for result in ResultStore(RESULTS).all():
        protocols.setdefault(result.task, set()).add(Protocol.of(result))
    assert [task for task, found in protocols.items() if len(found) > 1] == []
