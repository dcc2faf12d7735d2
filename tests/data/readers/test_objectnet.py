"""ObjectNet's own layout, made small: names, unions, frames, and what is wrong with its mappings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.verbs.test_crew import MODEL
from vlbench.cli import main
from vlbench.core.errors import UserError
from vlbench.data.digests import image_digests, source_fingerprint
from vlbench.data.images import decode
from vlbench.data.sources import open_source
from vlbench.store.results import ResultStore

COLOURS = {"chair": (220, 40, 40), "spatula": (40, 60, 220), "weight": (40, 200, 60)}


def write_objectnet(root: Path, *, unions: dict[str, str] | None = None) -> Path:
    """Two classes that ImageNet has, one of them two of ImageNet's, and one that it has not.

    ImageNet's names are given by numbers of 2012, which run backwards here: label 0 is number 999.
    """
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / "images" / name).mkdir(parents=True)
        for number in range(5):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (40, 50, 3)), 0, 255).astype(np.uint8)
            pixels[:2] = pixels[-2:] = pixels[:, :2] = pixels[:, -2:] = (255, 0, 0)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    mappings = root / "mappings"
    mappings.mkdir()
    labels = {"chair": "Chair", "spatula": "Spatula", "weight": "Weight (exercise)"}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    names = {"Spatula": "spatula", "Chair": "folding chair; rocking chair"} if unions is None else unions
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(names))
    lines = [f"thing {number}" for number in range(1000)]
    lines[999], lines[996], lines[990] = "spatula", "folding chair", "rocking chair"  # labels 0, 3, 9
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    numbers = {str(label): 999 - label for label in range(1000)}
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(numbers))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objectnet(tmp_path_factory.mktemp("data") / "objectnet-1.0")


def test_objectnet_keeps_the_classes_that_imagenet_has_and_says_which_they_are(root: Path) -> None:
    source = open_source(f"objectnet:{root}")
    assert source.classes == ("Chair", "Spatula")
    assert source.unions == ((3, 9), (0,))  # type: ignore[attr-defined]
    assert len(source) == 10
    assert list(source.labels() or ()) == [0] * 5 + [1] * 5
    assert source.ids()[0] == "chair/0.png"


def test_objectnet_cuts_the_frame_and_nothing_else(root: Path) -> None:
    example = open_source(f"objectnet:{root}")[7]
    assert example.image is not None
    found = np.asarray(decode(example.image, where="here"))
    whole = np.asarray(Image.open(root / "images" / example.id))
    assert found.shape == (36, 46, 3)
    assert (found == whole[2:-2, 2:-2]).all()


def test_objectnet_digests_follow_the_pixels_not_the_names(root: Path, tmp_path: Path) -> None:
    before = open_source(f"objectnet:{root}")
    other = write_objectnet(tmp_path / "elsewhere")
    (other / "images" / "chair" / "0.png").rename(other / "images" / "chair" / "renamed.png")
    assert source_fingerprint(open_source(f"objectnet:{other}")) == source_fingerprint(before)
    pixels = np.asarray(Image.open(other / "images" / "chair" / "1.png")).copy()
    pixels[10, 10] = 0
    Image.fromarray(pixels).save(other / "images" / "chair" / "1.png")
    changed = open_source(f"objectnet:{other}")
    assert source_fingerprint(changed) != source_fingerprint(before)
    assert len(set(image_digests(changed)) - set(image_digests(before))) == 1


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("objectnet_to_imagenet_1k.json", '{"Chair": "throne"}', "'Chair' is 'throne' in ImageNet, a name that"),
        ("objectnet_to_imagenet_1k.json", "[1]", "expected an object of texts"),
        ("pytorch_to_imagenet_2012_id.json", '{"a": 1}', "expected an object of whole numbers"),
        ("folder_to_objectnet_label.json", '{"nowhere": "Chair"}', "there is no image in the folders that"),
    ],
)
def test_objectnet_names_the_mapping_that_is_wrong(tmp_path: Path, file: str, content: str, says: str) -> None:
    root = write_objectnet(tmp_path / "objectnet")
    (root / "mappings" / file).write_text(content)
    with pytest.raises(UserError, match=says):
        open_source(f"objectnet:{root}")


def test_probes_learn_the_united_classes_of_imagenet_as_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "objectnet-1.0").symlink_to(root)
    rng = np.random.default_rng(1)
    colour_of = {0: COLOURS["spatula"], 3: COLOURS["chair"], 9: COLOURS["chair"]}
    for label in range(1000):
        folder = data / "imagenet" / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(6 if label in colour_of else 1):
            pixels = np.array(colour_of.get(label, (128, 128, 128))) + rng.normal(0, 40, (16, 16, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    words = ["eval", "--model", f"{MODEL}:build", "--data-root", str(data), "--device", "cpu", "--workers", "0"]
    assert main([*words, "--tasks", "knn/objectnet", "--results", str(tmp_path / "results")]) == 0
    store = ResultStore(tmp_path / "results")
    (result,) = store.scan().results
    rows = store.rows(result)
    assert rows.meta["classes"] == ["Chair", "Spatula"]
    assert result.data.n == 10
    assert result.estimates["acc1"].value >= 0.9, "plain colours"

    unlike = tmp_path / "unlike"
    (unlike / "imagenet" / "train").mkdir(parents=True)
    (unlike / "objectnet-1.0").symlink_to(root)
    (unlike / "imagenet" / "train" / "n00000000").symlink_to(data / "imagenet" / "train" / "n00000000")
    capsys.readouterr()
    words[4] = str(unlike)
    assert main([*words, "--tasks", "knn/objectnet", "--results", str(tmp_path / "other")]) == 1
    assert "unions of ImageNet-1k's 1,000, and the training data have 1 classes" in capsys.readouterr().err
