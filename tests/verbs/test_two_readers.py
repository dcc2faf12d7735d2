"""Captions and matching scores: the same numbers in any batch and over two processes, which divide the pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.verbs.test_crew import _numbers as numbers
from tests.verbs.test_crew import _stored as stored
from tests.verbs.test_crew import _together as together
from vlbench.cli import main
from vlbench.data.shapes.world import TINY
from vlbench.data.shapes.write import write_world
from vlbench.store.results import ResultStore


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "shapes", sizes=TINY, parts=("pairs", "retrieval"), workers=1)


# Captions are written by one process, whatever the batch of the others would be.
@pytest.mark.parametrize(
    ("recipe", "kind", "alone_at", "together_at"),
    [("virtex", "captioning", (64, 7), (5,)), ("muvla", "matching", (64, 7, 1), (64, 7, 1))],
    ids=["captioning", "matching"],
)
def test_numbers_move_neither_with_the_batch_nor_with_the_processes(
    recipe: str,
    kind: str,
    alone_at: tuple[int, ...],
    together_at: tuple[int, ...],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    data = ["--data", f"shapes:pairs?root={world}"]
    quick = ["--steps", "6", "--set", "batch_size=16", "--set", "workers=0"]
    assert main(["pretrain", recipe, *data, *quick, "--out", str(run)]) == 0

    def words(folder: Path, size: int, *more: str) -> list[str]:
        asked = ["eval", "--model", str(run), "--tasks", kind, "--data", f"shapes:retrieval?root={world}"]
        asked += ["--results", str(folder / "results"), "--device", "cpu", "--workers", "0"]
        return [*asked, "--batch-size", str(size), *more]

    found = []
    for size in alone_at:
        folder = tmp_path / f"one-{size}"
        assert main(words(folder, size, "--no-store")) == 0  # or the second would read what the first has scored
        found.append(numbers(stored(folder)))
    for size in together_at:
        folder = tmp_path / f"two-{size}"
        statuses, said = together(words(folder, size), folder)
        assert statuses == [0, 0], said
        assert said[1] == "", "only the first process talks"
        found.append(numbers(stored(folder)))
        if kind == "matching":
            _assert_halved(folder)
    assert found[0]
    assert all(other == found[0] for other in found)


def _assert_halved(folder: Path) -> None:
    """Every pair was scored once, half of the images with their pools by each process."""
    store = ResultStore(folder / "results")
    (result,) = store.all()
    pairs = len(store.rows(result))
    shards = [np.load(path)["digests"] for path in (folder / "cache").rglob("shard-*.npz")]
    scored = np.concatenate(shards)
    assert len(scored) == len(np.unique(scored)) == pairs
    assert list(map(len, shards)) == [pairs // 2] * 2
