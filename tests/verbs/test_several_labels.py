"""A kind asked for by its name on the user's own data whose images have several labels each."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.making import encoded, png, write_files, write_tar
from tests.verbs import toy_backbone
from vlbench.cli import main
from vlbench.core.types import Result
from vlbench.store.results import ResultStore
from vlbench.verbs.calls import evaluate
from vlbench.verbs.selection import is_meant, select

KINDS = ("zeroshot", "linear", "knn", "fewshot")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))


def _npy(labels_C: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, labels_C)
    return buffer.getvalue()


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """CLIP_benchmark's layout of voc2007_multilabel: noisy colours, every fourth image with a second label."""
    root, rng, classes = tmp_path / "voc2007_multilabel", np.random.default_rng(0), list(toy_backbone.COLOURS)
    for split, count in (("train", 60), ("test", 45)):
        members: dict[str, bytes] = {}
        for number in range(count):
            first = number % len(classes)
            shown = [first, (first + 1) % len(classes)] if number % 4 == 0 else [first]
            rgb = sum(np.array(toy_backbone.COLOURS[classes[label]], float) for label in shown)
            colour = np.clip(60 * rgb + 90 + rng.normal(0, 25, 3), 0, 255)
            labels_C = np.zeros(len(classes), np.int64)
            labels_C[shown] = 1
            members[f"s{number:07d}.webp"] = encoded(np.full((8, 8, 3), colour, np.uint8))
            members[f"s{number:07d}.npy"] = _npy(labels_C)
        write_tar(root / split / "0.tar", members)
        write_files(root, {f"{split}/nshards.txt": "1\n"})
    beside = {"classnames.txt": "\n".join(classes) + "\n", "dataset_type.txt": "multilabel\n"}
    write_files(root, beside | {"zeroshot_classification_templates.txt": "a photo of a {c}.\n"})
    return root


def _run(tmp_path: Path, voc: Path, tasks: str, **changes) -> dict[str, Result]:
    words = {"model": "tests.verbs.toy_backbone:build", "tasks": tasks, "data": f"wds:{voc}", "device": "cpu"}
    assert evaluate(**words, workers=0, results=str(tmp_path / "results"), **changes) == 0
    return {result.task: result for result in ResultStore(tmp_path / "results").all()}


def test_kinds_stand_for_those_of_several_labels_and_one_line_says_so(
    tmp_path: Path, voc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run(tmp_path, voc, "zeroshot,linear,knn")
    assert set(found) == {f"{kind}_multilabel/voc2007_multilabel" for kind in ("zeroshot", "linear", "knn")}
    for result in found.values():
        assert result.metric == "map11"
        assert result.adapter == result.task.partition("/")[0]
        assert result.estimates["map11"].value > 0.8, "the colours are easy"
    out = capsys.readouterr().out
    said = "zeroshot, linear, knn stand for zeroshot_multilabel, linear_multilabel, knn_multilabel"
    assert [line for line in out.splitlines() if "several labels" in line] == [
        f"wds:{voc} has several labels an image: {said}"
    ]
    assert "skipped" not in out


def test_it_is_the_same_measurement_as_the_kind_by_its_own_name(
    tmp_path: Path, voc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, voc, "knn_multilabel", set=["k=3"])
    assert "several labels" not in capsys.readouterr().out
    _run(tmp_path, voc, "knn", set=["k=3"])
    assert "knn_multilabel/voc2007_multilabel-k-3: reused" in capsys.readouterr().out


def test_fewshot_and_settings_of_the_kind_that_runs(tmp_path: Path, voc: Path) -> None:
    found = _run(tmp_path, voc, "fewshot", set=["shots=[2]", "seeds=[0]"])
    (result,) = found.values()
    assert (result.adapter, result.config["shots"]) == ("fewshot_multilabel", [2])
    # ``softmax`` is a setting of zeroshot_multilabel and of no other zero-shot kind.
    assert _run(tmp_path, voc, "zeroshot", set=["softmax=true"])


def test_choice_by_data(tmp_path: Path, voc: Path) -> None:
    single = tmp_path / "photos"
    for split in ("train", "test"):
        write_files(single, {f"{split}/{name}/0.png": png() for name in ("cat", "dog")})
    found = select(",".join(KINDS), data=[f"wds:{voc}", f"imagefolder:{single}"], root=tmp_path)
    assert [choice.card.name for choice in found.choices] == [
        name for kind in KINDS for name in (f"{kind}_multilabel/voc2007_multilabel", f"{kind}/photos")
    ]
    assert [choice.asked for choice in found.choices] == [word for kind in KINDS for word in (kind, "")]
    (note,) = found.notes
    assert note.startswith(f"wds:{voc} has several labels an image: zeroshot, linear, knn, fewshot stand for ")
    (note,) = select("linear", data=[f"wds:{voc}"], root=tmp_path).notes
    assert note.endswith(": linear stands for linear_multilabel")


def test_a_kind_without_a_counterpart_and_data_that_cannot_be_read_stay(tmp_path: Path, voc: Path) -> None:
    found = select("svm,elevater_probe,linear_multilabel", data=[f"wds:{voc}"], root=tmp_path)
    assert [choice.card.adapter for choice in found.choices] == ["svm", "elevater_probe", "linear_multilabel"]
    assert found.notes == ()
    (choice,) = select("linear", data=[f"wds:{tmp_path / 'nowhere'}"], root=tmp_path).choices
    assert choice.card.adapter == "linear"


def test_a_card_by_its_full_name_stays_what_it_is(
    tmp_path: Path, voc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = select("linear/cifar10,zeroshot/voc2007", data=[f"wds:{voc}"], root=tmp_path)
    assert [choice.card.adapter for choice in found.choices] == ["linear", "zeroshot_multilabel"]
    assert found.notes == ()
    call = ["eval", "--model", "tests.verbs.toy_backbone:build", "--tasks", "knn/cifar10", "--data", f"wds:{voc}"]
    assert main([*call, "--device", "cpu", "--workers", "0", "--results", str(tmp_path / "results")]) == 1
    assert "has several labels an image: ask for knn_multilabel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "names", "meant"),
    [
        ("knn_multilabel/voc2007_multilabel", "knn", True),
        ("knn_multilabel/voc2007_multilabel", "knn_multilabel", True),
        ("knn_multilabel/voc2007_multilabel", "linear", False),
        ("knn/voc2007_multilabel", "knn_multilabel", False),
    ],
)
def test_a_study_knows_its_results_by_the_kind_it_asked_for(task: str, names: str, meant: bool) -> None:
    assert is_meant(task, names, data=["wds:/nowhere/voc2007_multilabel"]) is meant


def test_looking_at_the_labels_loads_no_torch(voc: Path) -> None:
    code = (
        "import sys, pathlib; from vlbench.verbs.selection import select\n"
        f"found = select('zeroshot,linear', data=[{f'wds:{voc}'!r}], root=pathlib.Path('.'))\n"
        "assert found.notes and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
