"""mu-VLA's own mode from the command line: images to regions, regions to sentences, both to training."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.data.making import png, write_files
from tests.data.regions.calibrated import NAME, calibrated
from tests.data.regions.test_regions import b64
from vlbench.cli import build_parser, main
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.data.regions.extract import Extracted
from vlbench.data.regions.npz import NpzFolder
from vlbench.data.regions.open import open_regions
from vlbench.data.weak.corpus import open_corpus
from vlbench.models.weights import read_checkpoint
from vlbench.verbs.regions import summary_lines

N = 9
DETECTOR = ("--detector", NAME, "--min-size", "64", "--max-size", "96", "--min-score", "0", "--max-regions", "4")
HERE = ("--device", "cpu", "--workers", "0")
TINY = ("steps=2", "batch_size=4", "workers=0", "precision=fp32", "bert=null", "vocabulary.size=120", "log_every=1")
STREAM = ("stream.width=16", "stream.layers=1", "stream.heads=2", "visual.image_size=32", "mask_regions=0.5")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(calibrated()._net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Images without boxes, captions or classes that matter, one of them broken."""
    root = tmp_path_factory.mktemp("images")
    write_files(root, {f"any/{i}.png": png(i, 40 + 8 * (i % 2), 56) for i in range(N)})
    write_files(root, {"any/broken.png": b"no image"})
    return f"imagefolder:{root}"


@pytest.fixture(scope="module")
def features(images, weights, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "regions"
    assert main(["data", "regions", images, "--out", str(out), "--weights", str(weights), *DETECTOR, *HERE]) == 0
    return out


def pool_of(features: str | Path, path: Path) -> Path:
    """Two sentences a tag, in which it is a noun phrase."""
    store = open_regions(features)
    tags = sorted({tag for name in store.ids() for tag in store.tags(name)})
    assert len(tags) > 3
    path.write_text("".join(f"there is a {tag}\nsome {tag} near the {other}\n" for tag, other in pairwise(tags)))
    return path


def trained(spec: str, corpus: Path, features: Path, out: Path, *settings: str) -> list[dict[str, float]]:
    """The log of two steps of the paper's mode, its sizes made small."""
    chosen = (*TINY, *STREAM, f"corpus={corpus}", f"features={features}", *settings)
    words = ["pretrain", "muvla", "--preset", "paper", "--data", spec, "--out", str(out)]
    assert main([*words, *(word for setting in chosen for word in ("--set", setting))]) == 0
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_folder_of_images_becomes_a_run_of_the_papers_mode(images, features, tmp_path, capsys):
    store = NpzFolder(features)
    assert store.ids() == [f"any/{i}.png" for i in range(N)]
    assert all(store[name].features_ND.shape == (4, 1024) for name in store.ids())
    out, pool = tmp_path / "weak.arrow", pool_of(features, tmp_path / "pool.txt")
    words = ("--features", str(features), "--pool", str(pool), "--chunker", "tags", "--out", str(out))
    assert main(["data", "weakly-align", images, *words]) == 0
    printed = capsys.readouterr().out
    assert f"tags from       {features}" in printed
    assert "left out        1 images: no region features" in printed
    corpus = open_corpus(out)
    assert corpus.ids() == list(store.ids())
    for name in store.ids():
        assert corpus.tags(name) == store[name].tags
    assert any(found.links for entry in corpus for found in entry.aligned)
    log = trained(images, out, features, tmp_path / "run", "feature_width=1024", "max_bad=0.5")
    assert [line["step"] for line in log if "loss" in line] == [1, 2]
    assert set().union(*log) >= {"rt_words", "rt_tags", "rt_features", "rn_words", "rn_regions", "is_words", "itm"}
    assert all(math.isfinite(line["loss"]) for line in log if "loss" in line)
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert checkpoint["config"]["mrfr"] == "l2"
    assert list(checkpoint["card"]["provides"]) == ["match"]


def test_regions_are_made_once_and_what_was_done_is_said(images, weights, features, capsys):
    call = ["data", "regions", images, "--out", str(features), "--weights", str(weights), *DETECTOR, *HERE]
    gone = sorted(features.rglob("*.npz"))[2:4]
    kept = {path: path.stat().st_mtime_ns for path in features.rglob("*.npz") if path not in gone}
    for path in gone:
        path.unlink()
    assert main([*call, "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"regions of {N} images, 2 made in" in printed
    assert f"{N - 2} images that were there before" in printed
    assert "left out        1 images: not an image: " in printed
    assert "8; 4.0 an image" in printed
    assert "--set feature_width=1024" in printed
    assert "random" not in printed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert all(path.is_file() for path in gone)
    assert main([*call, "--max-regions", "5"]) == 2
    assert "holds regions made with max_regions 4 (now 5); name another folder" in capsys.readouterr().err


def commands(printed: str) -> dict[str, list[str]]:
    """What ``next:`` and ``then:`` say to do, as a shell would read it."""
    lines = [line.partition(": ") for line in printed.splitlines()]
    return {head: shlex.split(rest, comments=True) for head, _, rest in lines if head in ("next", "then")}


def test_what_to_do_next_runs_as_it_is_printed(images, features, weights, tmp_path, monkeypatch, capsys):
    """But for the sentences, whose file is the reader's, and for a run of 500,000 steps."""
    call = ["data", "regions", images, "--out", str(features), "--weights", str(weights), *DETECTOR, *HERE]
    assert main(call) == 0
    said = commands(capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    pool_of(features, tmp_path / "SENTENCES")
    assert said["next"][0] == said["then"][0] == "vlbench"
    assert main([*said["next"][1:], "--chunker", "tags"]) == 0
    short = [setting for setting in (*TINY, *STREAM, "max_bad=0.5") if not setting.startswith("bert=")]
    words = [*said["then"][1:], "--out", "run", *(word for setting in short for word in ("--set", setting))]
    assert main(words) == 0
    assert read_checkpoint("run/ckpt.pt")["config"]["feature_width"] == 1024


@pytest.mark.parametrize("out", ["it's mine", "2024", "[a]", "/a: b #1", "$HOME/*"])
def test_what_to_do_next_is_quoted(out):
    specs = ["wds:my data/{000..009}.tar", "hf:DIR?label=a&split=b", "shapes:pairs?root=w"]
    detector = SimpleNamespace(identity={"detector": "d", "weights": "w"}, width=7)
    lines = summary_lines(Path(out), specs, detector, Extracted(3), seconds=1.0, split="val")
    said = commands("\n".join(lines))
    parser, _ = build_parser()
    found = parser.parse_args(said["next"][1:])
    assert (found.spec, found.features, found.split) == (specs, out, "val")
    found = parser.parse_args(said["then"][1:])
    assert (found.recipe, found.preset, found.data) == ("muvla", "paper", specs)
    config = override(RECIPES.get("muvla").presets["paper"], found.set)
    assert (config.corpus, config.feature_width, config.bert) == ("weak.arrow", 7, None)
    assert Path(config.features) == Path(out)


def test_random_weights_are_called_so(images, tmp_path, capsys):
    assert main(["data", "regions", images, "--out", str(tmp_path), "--weights", "random", *DETECTOR, *HERE]) == 0
    assert "note: the detector's weights are random" in capsys.readouterr().out


def test_vinvl_features_whose_labels_lie_elsewhere_are_aligned_and_trained_on(images, features, tmp_path, capsys):
    store = NpzFolder(features)
    tsv, labels = tmp_path / "features.tsv", tmp_path / "labels.tsv"
    with tsv.open("w") as whole, labels.open("w") as said:
        for name in store.ids():
            found = store[name]
            wide = torch.nn.functional.pad(torch.from_numpy(found.features_ND), (0, 1024)).numpy()
            objects = [{"rect": box, "class": tag} for box, tag in zip(found.boxes_N4.tolist(), found.tags)]
            whole.write(f"{name}\t{json.dumps({'num_boxes': len(found), 'features': b64(wide)})}\n")
            size = {"image_w": found.width, "image_h": found.height}
            said.write(f"{name}\t{json.dumps(size | {'objects': objects})}\n")
    pool, out = pool_of(features, tmp_path / "pool.txt"), tmp_path / "weak.arrow"
    call = ["data", "weakly-align", images, "--features", str(tsv), "--pool", str(pool), "--out", str(out)]
    capsys.readouterr()
    assert main([*call, "--chunker", "tags"]) == 2
    assert "it has no 'objects'; give the file of labels too: " in capsys.readouterr().err
    assert main([*call, "--chunker", "tags", "--labels", str(labels)]) == 0
    assert f"tags from       {tsv} + {labels}" in capsys.readouterr().out
    assert open_corpus(out).tags(store.ids()[0]) == store[store.ids()[0]].tags
    words = ["pretrain", "muvla", "--preset", "paper", "--data", images, "--out", str(tmp_path / "not")]
    settings = (*TINY, *STREAM, f"corpus={out}", f"features={tsv}")
    assert main([*words, *(word for setting in settings for word in ("--set", setting))]) == 2
    error = capsys.readouterr().err
    assert "it has no 'objects'; give the file of labels too: feature_labels=FILE" in error
    assert error.count("\n") == 1
    log = trained(images, out, tsv, tmp_path / "run", f"feature_labels={labels}", "max_bad=0.5")
    assert [line["step"] for line in log if "loss" in line] == [1, 2]


def test_missing_weights_are_one_line_of_a_real_call(images, tmp_path):
    """A process of its own: what torchvision loads must not speak when it ends."""
    call = [sys.executable, "-m", "vlbench", "data", "regions", images, "--out", str(tmp_path / "f")]
    done = subprocess.run([*call, "--weights", str(tmp_path / "w.pth")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"vlbench: error: {tmp_path}/w.pth: there is no such file of weights; save https://")
    assert "--weights FILE" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--detector", "fasterrcnn_resnet51_fpn"), "did you mean 'fasterrcnn_resnet50_fpn'"),
        (("--max-regions", "0"), "--max-regions 0: at least 1"),
        (("--batch-size", "0"), "--batch-size 0: at least 1"),
        (("--min-score", "2"), "--min-score 2: from 0 to 1"),
        (("--workers", "-1"), "--workers -1: 0 or more"),
        (("--device", "cuda:99"), "--device cuda:99"),
        (("--split", "train"), "there is no split 'train'"),
        (("--detectr", "x"), "did you mean --detector?"),
        (("--out", "FILE"), "this is a file; name a folder"),
    ],
)
def test_wrong_words_are_one_line(words, message, images, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    given = [str(tmp_path / "file") if word == "FILE" else word for word in words]
    call = ["data", "regions", images, "--out", str(tmp_path / "f"), "--detector", NAME, "--weights", "random"]
    assert main([*call, *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "f").exists()
