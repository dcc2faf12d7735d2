"""A number is the model's: no batch size, number of processes or stored feature moves its last digit, for any adapter.

``test_crew`` asks the same of zeroshot, linear, knn and retrieval on convolutions; here the others are asked too, on a
vision transformer, whose matrix products round differently in every batch size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.verbs.test_crew import _numbers as numbers
from tests.verbs.test_crew import _stored as stored
from tests.verbs.test_crew import _together as together
from vlbench.cli import main
from vlbench.core.catalog import ADAPTERS
from vlbench.store.results import ResultStore

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
QUICK = ("clip_benchmark_probe", "elevater_probe", "knn", "knn_multilabel", "zeroshot", "zeroshot_multilabel")
Measure: TypeAlias = Callable[..., dict[str, Any]]
CLASSES = {"amber": (220, 150, 40), "green": (40, 170, 70), "violet": (140, 70, 200)}
ELSEWHERE = {"retrieval", "linear"}
"""In tests of their own: retrieval needs captions, and linear is slow to fit."""
TOWERS = {"pooled", "embed", "text"}
KINDS = sorted(
    kind
    for kind in ADAPTERS.names()
    if ADAPTERS.get(kind).requires <= TOWERS
    and kind not in ELSEWHERE
    and not getattr(ADAPTERS.get(kind), "trains", False)
)
"""What is fine-tuned reads questions; its own tests ask this of batches."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small open_clip model with random weights, as open_clip writes it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    net = open_clip.CLIP(embed_dim=32, vision_cfg=VISION, text_cfg=TEXT)
    settings = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    save_file(net.state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Noisy images of a tinted colour, as a folder a class; with the colours side by side, as VOC's several labels."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 10)):
        for name, rgb in CLASSES.items():
            (root / "folder" / split / name).mkdir(parents=True)
            for number in range(count):
                _draw([rgb], rng).save(root / "folder" / split / name / f"{number}.png")
    for place in ("JPEGImages", "ImageSets/Main"):
        (root / "voc" / place).mkdir(parents=True)
    for split, first, count in (("train", 0, 48), ("test", 48, 30)):
        there_NC = rng.random((count, len(CLASSES))) < 0.5
        for number, row in enumerate(there_NC, start=first):
            shown = [rgb for rgb, there in zip(CLASSES.values(), row) if there]
            _draw(shown or [(128, 128, 128)], rng).save(root / "voc" / "JPEGImages" / f"{number:06}.jpg")
        for c, name in enumerate(CLASSES):
            lines = [f"{first + i:06} {1 if there else -1}" for i, there in enumerate(there_NC[:, c])]
            (root / "voc" / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("\n".join(lines) + "\n")
    return f"imagefolder:{root / 'folder'}", f"voc:{root / 'voc'}"


def _draw(colours: list[tuple[int, int, int]], rng: np.random.Generator) -> Image.Image:
    stripes = np.concatenate([np.broadcast_to(rgb, (36, 36 // len(colours), 3)) for rgb in colours], axis=1)
    noisy = stripes + rng.normal(0, 70, 3) + rng.normal(0, 60, stripes.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def words(model: str, data: tuple[str, str], folder: Path, *more: str, kinds: Sequence[str] = KINDS) -> list[str]:
    """One call that asks every adapter of all the data; which do not suit each other is skipped."""
    found = ["eval", "--model", model, "--name", "vit", "--tasks", ",".join(kinds)]
    found += ["--data", data[0], "--data", data[1], "--results", str(folder / "results")]
    return [*found, "--device", "cpu", "--workers", "0", *more]


@pytest.fixture(scope="module")
def measure(model: str, data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Every number under some options, in this process; the same ``cache`` keeps what was encoded."""

    def run(cache: Path, *more: str, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("measured")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLBENCH_CACHE", str(cache))
            assert main(words(model, data, folder, *more, kinds=kinds)) == 0
        return numbers(stored(folder))

    return run


@pytest.fixture(scope="module")
def alone(measure: Measure, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(tmp_path_factory.mktemp("alone"), "--batch-size", "64")


def test_every_adapter_is_asked_of_images_that_it_can_get_wrong(alone: dict[str, Any]) -> None:
    assert {name.partition("/")[0] for name in alone} == set(KINDS)
    assert {"elevater_probe/folder", "elevater_probe/voc"} <= set(alone)
    for name, (estimates, _, _) in alone.items():
        assert 0 < next(iter(estimates.values())).value < 1, f"{name}: no image is near a border"


def test_batch_size_moves_no_digit(measure: Measure, alone: dict[str, Any], tmp_path: Path) -> None:
    assert measure(tmp_path, "--batch-size", "1", "--no-store") == alone


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noisy images, each with a caption of its own length."""
    root, rng = tmp_path_factory.mktemp("captioned"), np.random.default_rng(1)
    lines = ["filepath\ttitle"]
    for number in range(250):
        names = [list(CLASSES)[colour] for colour in rng.integers(len(CLASSES), size=1 + number % 4)]
        _draw([CLASSES[name] for name in names], rng).save(root / f"{number:03}.png")
        lines.append(f"{number:03}.png\t{number} {' and '.join(names)}, no. {rng.integers(1000)}")
    (root / "all.csv").write_text("\n".join(lines) + "\n")
    return f"csv:{root / 'all.csv'}"


@pytest.mark.parametrize("size", ["1", "7"])
def test_batch_size_moves_no_rank(
    model: str, captioned: str, data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """Every rank, also deep in the list, where neighbours' scores lie closest; and a probe's converged weights."""
    asked = {"retrieval": [captioned, "--set", "k=[1,5,10,20,30,40]"], "linear": [data[0]]}
    found = []
    for batch in ("64", size):
        place = tmp_path / batch
        monkeypatch.setenv("VLBENCH_CACHE", str(place / "cache"))
        for task, options in asked.items():
            words = ["eval", "--model", model, "--name", "vit", "--tasks", task, "--data", *options, "--device", "cpu"]
            assert main([*words, "--results", str(place / "results"), "--workers", "0", "--batch-size", batch]) == 0
        store, results = ResultStore(place / "results"), stored(place)
        columns = {name: store.rows(result).columns.items() for name, result in results.items()}
        rows = {name: {key: list(column) for key, column in pairs} for name, pairs in columns.items()}
        found.append((numbers(results), rows))
    assert len(found[0][0]) == len(asked)
    assert found[0] == found[1]


def test_two_processes_and_the_store_move_no_digit(
    model: str, data: tuple[str, str], measure: Measure, alone: dict[str, Any], tmp_path: Path
) -> None:
    """What two processes measured in batches of 7, and what one makes of the features that they left.

    The features are every adapter's, so a few adapters say whether they are read back as they were.
    """
    statuses, said = together(words(model, data, tmp_path, "--batch-size", "7"), tmp_path)
    assert statuses == [0, 0], said
    assert numbers(stored(tmp_path)) == alone
    read_back = measure(tmp_path / "cache", "--batch-size", "7", kinds=QUICK)
    assert read_back == {name: found for name, found in alone.items() if name.partition("/")[0] in QUICK}
