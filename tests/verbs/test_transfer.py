"""Probes that learn from ImageNet and are tested on its shifted sets, on folders laid out as theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.verbs.test_crew import MODEL, _numbers, _stored, _together
from vlbench.cli import main
from vlbench.store.results import ResultStore

WNIDS = {
    "n01440764": (220, 30, 30),
    "n02007558": (30, 200, 40),
    "n03888257": (30, 40, 220),
    "n01443537": (200, 200, 30),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of ImageNet, two of them in ImageNet-A's folder."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def write(folder: str, count: int, names: list[str]) -> None:
        for name in names:
            (root / folder / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(WNIDS[name]) + rng.normal(0, 60, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / folder / name / f"{folder.replace('/', '_')}{number}.png")

    write("imagenet/train", 12, list(WNIDS))
    write("imagenet/val", 3, list(WNIDS))
    write("imagenet-a", 5, ["n03888257", "n02007558"])
    return root


def _words(root: Path, folder: Path, tasks: str) -> list[str]:
    words = ["eval", "--model", f"{MODEL}:build", "--tasks", tasks, "--data-root", str(root), "--device", "cpu"]
    return [*words, "--results", str(folder / "results"), "--workers", "0"]


def test_probes_learn_from_imagenet_and_answer_with_the_test_sets_classes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    assert main(_words(root, tmp_path, "linear/imagenet_a,knn/imagenet_a")) == 0
    assert "images: 58 encoded" in capsys.readouterr().out, "48 to learn from, 10 to be tested on, each once"
    store = ResultStore(tmp_path / "results")
    for task, result in _stored(tmp_path).items():
        rows = store.rows(result)
        assert rows.meta["classes"] == ["n02007558", "n03888257"], task
        assert rows.meta["train_images"] == 48
        assert set(np.asarray(rows["pred"])) <= {0, 1}
        assert result.data.n == 10
        assert result.estimates["acc1"].value >= 0.9, "plain colours"
        assert "200 classes expected, 2 found" in " ".join(rows.meta["notes"])


def test_two_processes_encode_both_data_sets(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "alone" / "cache"))
    tasks = "linear/imagenet_a,knn/imagenet_a"
    assert main(_words(root, tmp_path / "alone", tasks)) == 0
    statuses, said = _together(_words(root, tmp_path / "two", tasks), tmp_path / "two")
    assert statuses == [0, 0], said
    assert _numbers(_stored(tmp_path / "two")) == _numbers(_stored(tmp_path / "alone"))


def test_absent_data_to_learn_from_are_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lonely = tmp_path / "data"
    lonely.mkdir()
    (lonely / "imagenet-a").symlink_to(root / "imagenet-a")
    assert main(_words(lonely, tmp_path, "linear/imagenet_a")) == 2
    assert "it learns from imagenet1k: no data under" in capsys.readouterr().err
    assert main(["list", "tasks", "--data-root", str(lonely)]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("linear/imagenet_a "))
    assert "no data" in row
    assert main(_words(lonely, tmp_path, "linear/imagenet_r")) == 2
    assert "imagenet-r.tar" in capsys.readouterr().err
