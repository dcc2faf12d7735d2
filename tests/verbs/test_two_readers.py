"""Captions and matching scores, which are no stored features: the same numbers in any batch and over two processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.test_crew import _numbers as numbers
from tests.verbs.test_crew import _stored as stored
from tests.verbs.test_crew import _together as together
from vlbench.cli import main
from vlbench.data.shapes.world import TINY
from vlbench.data.shapes.write import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "shapes", sizes=TINY, parts=("pairs", "retrieval"), workers=1)


@pytest.mark.parametrize(("recipe", "kind"), [("virtex", "captioning"), ("muvla", "matching")])
def test_numbers_move_neither_with_the_batch_nor_with_the_processes(
    recipe: str, kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    data = ["--data", f"shapes:pairs?root={world}"]
    quick = ["--steps", "6", "--set", "batch_size=16", "--set", "workers=0"]
    assert main(["pretrain", recipe, *data, *quick, "--out", str(run)]) == 0

    def words(folder: Path, *more: str) -> list[str]:
        asked = ["eval", "--model", str(run), "--tasks", kind, "--data", f"shapes:retrieval?root={world}"]
        return [*asked, "--results", str(folder / "results"), "--device", "cpu", "--workers", "0", *more]

    assert main(words(tmp_path / "one", "--batch-size", "64")) == 0
    alone = numbers(stored(tmp_path / "one"))
    assert alone
    assert main(words(tmp_path / "seven", "--batch-size", "7")) == 0
    assert numbers(stored(tmp_path / "seven")) == alone
    statuses, said = together(words(tmp_path / "two", "--batch-size", "5"), tmp_path / "two")
    assert statuses == [0, 0], said
    assert numbers(stored(tmp_path / "two")) == alone
