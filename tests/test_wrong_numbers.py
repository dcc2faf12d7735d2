"""The wrong numbers that CLIP_benchmark 1.6.2 can give, one after another, and that they cannot come about here.

Each was seen by running it. The names of the tests say what happened there.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.adapters.fakes import FakeData, FakeEncoder, label_in, labelled, noise_of
from tests.data.making import encoded
from tests.verbs import toy_backbone
from vlbench.adapters import clip_benchmark_probe, knn, linear, retrieval, zeroshot
from vlbench.cli import main
from vlbench.core.errors import UserError
from vlbench.core.types import Backbone, Features, Result
from vlbench.data import remembered
from vlbench.data.sources import open_source
from vlbench.models.backbone import wrap
from vlbench.store.results import ResultStore
from vlbench.verbs.calls import evaluate

NAMES = tuple(toy_backbone.COLOURS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))


def picture(rgb: tuple[float, ...], rng: np.random.Generator) -> bytes:
    colour = np.clip(60 * np.array(rgb) + 90 + rng.normal(0, 30, 3), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, counts: dict[str, int], *, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for name in NAMES:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (root / split / name / f"{number}.png").write_bytes(picture(toy_backbone.COLOURS[name], rng))
    return root


def write_wds(root: Path, split: str, samples: list[dict[str, bytes]], **files: str) -> Path:
    folder = root / split
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"s{number:07d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "nshards.txt").write_text("1\n")
    for name, text in files.items():
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    return root


def measure(tmp_path: Path, tasks: str, data: str, **changes) -> dict[str, Result]:
    settings = {"model": "tests.verbs.toy_backbone:build", "device": "cpu", "workers": 0, **changes}
    results = tmp_path / "results"
    assert evaluate(tasks=tasks, data=data, results=str(results), **settings) == 0
    return {result.task: result for result in ResultStore(results).all()}


def balanced(n: int, n_classes: int = 10) -> tuple[FakeData, tuple[str, ...]]:
    classes = tuple(f"class {i}" for i in range(n_classes))
    splits = {split: labelled(split, [i % n_classes for i in range(n)], classes) for split in ("train", "val", "test")}
    return FakeData(splits), classes


def noisy(image: bytes, width: int = 24, signal: float = 1.0) -> np.ndarray:
    return signal * noise_of(f"class {label_in(image)}", width) + 2.0 * noise_of(image, width)


# 1. A probe's features were cached under model and data set alone: asked for another split, it silently read the old.


def test_1_features_of_one_split_are_never_taken_for_those_of_another(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "colours", {"train": 20, "val": 8, "test": 8})
    for name in NAMES:  # the same file names in every split, and other pictures behind them: test's classes are rotated
        (folder / "test" / name).rename(folder / "test" / f"_{name}")
    for name, other in zip(NAMES, (*NAMES[1:], NAMES[0])):
        (folder / "test" / f"_{name}").rename(folder / "test" / other)
    on_test = measure(tmp_path, "knn", f"imagefolder:{folder}")["knn/colours"]
    (folder / "test").rename(folder / "was-test")
    on_val = measure(tmp_path, "knn", f"imagefolder:{folder}", force=True)["knn/colours"]
    fresh = measure(tmp_path, "knn", f"imagefolder:{folder}", force=True, no_store=True)["knn/colours"]
    assert on_val.images_per_second is not None, "val's own images were encoded"
    assert on_val.estimates == fresh.estimates
    assert on_test.estimates["acc1"].value < 0.2 < 0.9 < on_val.estimates["acc1"].value


def test_1_other_images_under_the_old_names_are_encoded_anew(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "colours", {"train": 20, "test": 20})
    before = measure(tmp_path, "knn", f"imagefolder:{folder}")["knn/colours"]
    write_folder(folder, {"train": 20, "test": 20}, seed=1)
    after = measure(tmp_path, "knn", f"imagefolder:{folder}", force=True)["knn/colours"]
    assert after.images_per_second is not None, "the new images were encoded"
    assert after.data.fingerprint != before.data.fingerprint


def test_1_an_image_that_was_changed_in_place_is_encoded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MARGIN_NS", 0)  # the images are young, and are to be remembered all the same
    folder = write_folder(tmp_path / "colours", {"train": 4, "test": 4})
    for image in folder.rglob("*.png"):
        image.write_bytes(image.read_bytes().ljust(200, b"\0"))
    image = folder / "test" / NAMES[0] / "0.png"
    before, other = image.stat(), (folder / "test" / NAMES[1] / "0.png").read_bytes()
    first = measure(tmp_path, "knn", f"imagefolder:{folder}")["knn/colours"]
    while image.stat().st_ctime_ns == before.st_ctime_ns:
        with image.open("r+b") as handle:
            handle.write(other)
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert len(list((tmp_path / "cache" / "digests").iterdir())) == 2, "both splits are remembered"
    again = measure(tmp_path, "knn", f"imagefolder:{folder}", force=True)["knn/colours"]
    assert again.data.fingerprint != first.data.fingerprint, "it is another test set"
    assert again.estimates["acc1"].value != first.estimates["acc1"].value


# 2. The same probe with the same seed gave other numbers from the cache than without it.


def test_2_a_probe_from_the_store_and_a_fresh_one_agree_to_the_last_digit(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "colours", {"train": 30, "test": 30})
    tasks = "linear,clip_benchmark_probe,elevater_probe"
    fresh = measure(tmp_path, tasks, f"imagefolder:{folder}", no_store=True)
    cold = measure(tmp_path, tasks, f"imagefolder:{folder}", force=True)
    warm = measure(tmp_path, tasks, f"imagefolder:{folder}", force=True)
    for task in fresh:
        assert fresh[task].estimates == cold[task].estimates == warm[task].estimates
    assert warm["linear/colours"].images_per_second is None, "nothing was encoded again"


# 3. ``--normalize False`` was read as true, and the result said so.


def test_3_there_is_no_switch_for_a_normalisation_that_belongs_to_the_protocol(capsys) -> None:
    call = ["eval", "--model", "timm:resnet18", "--tasks", "zeroshot", "--normalize", "False"]
    assert main(call) == 2
    assert "unknown option --normalize" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", [zeroshot.ADAPTER, linear.ADAPTER, knn.ADAPTER])
def test_3_the_length_of_features_moves_no_number(adapter) -> None:
    data, _ = balanced(60, 6)

    def scores(scale: float):
        encoder = FakeEncoder(lambda image: scale * noisy(image), text=lambda text: noise_of(text[2:-1], 24))
        return adapter.score(adapter.predict(encoder, data, adapter.Config()), adapter.Config())

    assert scores(1.0) == scores(64.0)  # a power of two, so that the features' digits are the same


# 4. Weights that were named on the command line were ignored for some kinds of model, and stored as if they were used.


def test_4_weights_that_are_named_are_the_weights_that_are_used(tmp_path: Path) -> None:
    import timm

    from vlbench.models.load import load_backbone

    torch.manual_seed(5)
    file = tmp_path / "own.pt"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), file)
    from_file = load_backbone("timm:test_resnet", weights=str(file))
    assert from_file.weights_hash != load_backbone("timm:test_resnet", weights="random:0").weights_hash
    images_BCHW = torch.randn(2, 3, 64, 64)
    network = timm.create_model("test_resnet", num_classes=0)
    network.load_state_dict(torch.load(file, weights_only=True))
    with torch.inference_mode():
        torch.testing.assert_close(from_file.encode_image(images_BCHW).pooled_BD, network.eval()(images_BCHW))


def test_4_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    from vlbench.models.load import load_backbone

    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt"):
        load_backbone("timm:test_resnet", weights=str(tmp_path / "other.pt"))


def test_4_weights_named_beside_a_folder_are_used_not_the_folders_own(tmp_path: Path) -> None:
    """The very case: a ``local-dir:`` model had ignored ``--pretrained`` and recorded its path."""
    import open_clip

    from vlbench.models.load import load_backbone

    tower = {"layers": 1, "width": 16}
    config: dict[str, Any] = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {**tower, "context_length": 8, "vocab_size": 49408, "heads": 2},
    }
    folder, file = tmp_path / "mine", tmp_path / "other.pt"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    own, other = open_clip.CLIP(**config), open_clip.CLIP(**config).eval()
    torch.save(own.state_dict(), folder / "open_clip_pytorch_model.bin")
    torch.save(other.state_dict(), file)
    loaded = load_backbone(f"open_clip:local-dir:{folder}", weights=str(file))
    images_BCHW = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_image(images_BCHW).embed_BE, other.encode_image(images_BCHW))


# 5. A language that the data did not have was ignored, and written into the result.


def test_5_a_language_is_used_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [
        {
            "png": picture(rgb, rng),
            "json": json.dumps({"captions": {"en": [f"a {name} thing"], "de": [f"ein Ding {number}"]}}).encode(),
        }
        for number, (name, rgb) in enumerate(toy_backbone.COLOURS.items())
    ]
    folder = write_wds(tmp_path / "captioned", "test", samples, dataset_type="retrieval\n")
    source = open_source(f"wds:{folder}", "test")
    digests = tuple(f"{index:064x}" for index in range(len(source)))
    assert retrieval.build_gallery(source, digests, "en").captions[0] == "a red thing"
    assert retrieval.build_gallery(source, digests, "de").captions[0] == "ein Ding 0"
    with pytest.raises(UserError, match="no caption in language 'jp'"):
        retrieval.build_gallery(source, digests, "jp")


def test_5_zeroshot_has_no_language_that_it_could_ignore(tmp_path: Path, capsys) -> None:
    folder = write_folder(tmp_path / "colours", {"train": 2, "test": 2})
    words = ["--tasks", "zeroshot", "--data", f"imagefolder:{folder}", "--set", "language=de", "--device", "cpu"]
    results = tmp_path / "results"
    assert main(["eval", "--model", "tests.verbs.toy_backbone:build", *words, "--results", str(results)]) != 0
    assert "unknown key 'language'" in capsys.readouterr().err
    assert not list(results.rglob("*.json"))


# 6. Coarse features tie: accuracy by topk and recall by argmax then disagreed on a balanced set.


def test_6_ties_of_coarse_features_leave_one_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = balanced(500)

    def coarse(image: bytes) -> np.ndarray:
        return torch.from_numpy(noisy(image, 2)).sign().numpy()  # four different features in all

    encoder = FakeEncoder(coarse, text=lambda text: torch.from_numpy(noise_of(text, 2)).sign().numpy())
    found = zeroshot.ADAPTER.score(zeroshot.ADAPTER.predict(encoder, data, zeroshot.Config()), zeroshot.Config())
    assert found["acc1"].value == pytest.approx(found["mean_per_class_recall"].value, abs=1e-12)
    assert found["acc1"].lo < 0.1 < found["acc1"].hi, "ties are worth what a guess among them is worth"


CLOSE = tuple(f"thing{number}x" for number in range(10))
"""Classes whose embeddings lie so close together that their cosines, rounded to bfloat16, tie."""


def clean_picture(label: int) -> np.ndarray:
    return np.random.default_rng([6, label]).random((8, 8, 3))


class Close(torch.nn.Module):
    """A projection of the pixels with a large part that all images share, as CLIP's towers have."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(6)
        self.embed = torch.nn.Linear(192, 16)
        with torch.no_grad():
            self.embed.weight.copy_(torch.from_numpy(rng.normal(0, 0.2, (16, 192))))
            self.embed.bias.copy_(torch.from_numpy(rng.choice([-9.0, 9.0], 16)))

    def forward(self, images_BCHW: torch.Tensor) -> Features:
        embed_BE = self.embed(images_BCHW.flatten(1))
        return Features(pooled_BD=embed_BE, embed_BE=embed_BE)


def build_close() -> Backbone:
    network = Close()
    clean_CCHW = torch.from_numpy(np.stack([clean_picture(label) for label in range(10)])).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        class_CE = network(clean_CCHW).embed_BE

    def text(texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([class_CE[next(i for i, name in enumerate(CLOSE) if name in words)] for words in texts])

    return wrap(network, preprocess=toy_backbone.PREPROCESS, name="close", text=text)


def test_6_bfloat16_decides_nothing_by_the_place_of_a_class(tmp_path: Path) -> None:
    rng, n = np.random.default_rng(66), 40
    truth = [number % len(CLOSE) for number in range(n * len(CLOSE))]  # balanced: as many of every class
    pixels = [np.rint(255 * np.clip(clean_picture(label) + rng.normal(0, 0.3, (8, 8, 3)), 0, 1)) for label in truth]
    ours: dict[tuple[str, str], Any] = {}
    predicted: dict[tuple[str, str], list[str]] = {}
    for name, order in (("forwards", CLOSE), ("backwards", CLOSE[::-1])):
        samples = [
            {"png": encoded(image.astype(np.uint8)), "cls": str(order.index(CLOSE[label])).encode()}
            for image, label in zip(pixels, truth, strict=True)
        ]
        files = {"classnames": "\n".join(order) + "\n", "zeroshot_classification_templates": "a {c}.\n"}
        write_wds(tmp_path / name, "test", samples, **files)
        for precision in ("bf16", "fp32"):
            words = {"model": "tests.test_wrong_numbers:build_close", "precision": precision}
            found = measure(tmp_path, "zeroshot", f"wds:{tmp_path / name}", force=True, no_store=True, **words)
            result = found[f"zeroshot/{name}"]
            pred_N = ResultStore(tmp_path / "results").rows(result)["pred"]
            ours[name, precision], predicted[name, precision] = result.estimates, [order[pred] for pred in pred_N]

    # The peer's arithmetic on the same pixels: embeddings, their normalisation and the scores in bfloat16.
    backbone = build_close()
    images_NCHW = torch.from_numpy(np.stack(pixels) / 255).float().permute(0, 3, 1, 2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        image_NE = torch.nn.functional.normalize(backbone.encode_image(images_NCHW).embed_BE, dim=-1)
        class_CE = torch.nn.functional.normalize(backbone.encode_text(CLOSE).float(), dim=-1)
        scores_NC = image_NE @ class_CE.T
    assert scores_NC.dtype == torch.bfloat16
    first_N, last_N = scores_NC.argmax(dim=1), 9 - scores_NC.flip(1).argmax(dim=1)
    assert (first_N != last_N).float().mean() > 0.2, "there ties give a fifth of the images to a class for its place"
    theirs = [(pred_N == torch.tensor(truth)).float().mean().item() for pred_N in (first_N, last_N)]

    for estimates in ours.values():
        assert estimates["acc1"].value == pytest.approx(estimates["mean_per_class_recall"].value, abs=1e-12)
    assert predicted["forwards", "bf16"] == predicted["backwards", "bf16"], "image by image"
    exact, rounded = (ours["forwards", precision]["acc1"].value for precision in ("fp32", "bf16"))
    assert abs(rounded - exact) < 0.02 < exact - max(theirs), "scores are computed in full from bf16 features"


# 7. The probe stopped far from its optimum: ten epochs at one learning rate.


def test_7_the_probe_is_converged_and_no_worse_than_the_peers(tmp_path: Path) -> None:
    data, _ = balanced(600)
    encoder = FakeEncoder(lambda image: 0.05 * noisy(image))
    ours = linear.ADAPTER.predict(encoder, data, linear.Config())
    theirs = clip_benchmark_probe.ADAPTER.predict(encoder, data, clip_benchmark_probe.Config())
    assert ours.meta["fit"]["converged"]
    best = linear.ADAPTER.score(ours, linear.Config())["acc1"]
    assert best.hi >= clip_benchmark_probe.ADAPTER.score(theirs, clip_benchmark_probe.Config())["acc1"].value


# 8. Features that are not numbers came out as chance, and an image without captions as a miss.


def test_8_features_that_are_not_finite_are_an_error(tmp_path: Path, capsys) -> None:
    folder = write_folder(tmp_path / "colours", {"train": 4, "test": 4})
    results = str(tmp_path / "results")
    call = {"model": "tests.verbs.toy_backbone:build_broken", "device": "cpu", "workers": 0, "results": results}
    assert evaluate(tasks="zeroshot", data=f"imagefolder:{folder}", **call) == 1
    assert "not finite" in capsys.readouterr().err
    assert not list(ResultStore(tmp_path / "results").all())


def test_8_an_image_without_captions_is_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [{"png": picture((1, 0, 0), rng), "txt": b"a red thing"}, {"png": picture((0, 1, 0), rng), "txt": b"\n"}]
    folder = write_wds(tmp_path / "captioned", "test", samples, dataset_type="retrieval\n")
    source = open_source(f"wds:{folder}", "test")
    with pytest.raises(UserError, match="s0000001: no caption"):
        retrieval.build_gallery(source, ("a", "b"), "en")


# 9. With fewer than five classes the result held a bare NaN, which is no JSON.


def test_9_results_of_three_classes_are_strict_json(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "colours", {"train": 8, "test": 8})
    measure(tmp_path, "zeroshot,linear,knn", f"imagefolder:{folder}")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    files = list((tmp_path / "results").rglob("*.json"))
    assert len(files) == 3
    for file in files:
        assert "acc5" not in json.loads(file.read_text("utf-8"), parse_constant=refuse)["estimates"]


# 10. A line separator inside a caption made two captions of one.


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85", "\r"])
def test_10_only_a_line_feed_ends_a_caption(tmp_path: Path, inside: str) -> None:
    text = f"a red{inside}thing\na second one"
    sample = {"png": picture((1, 0, 0), np.random.default_rng(0)), "txt": text.encode()}
    folder = write_wds(tmp_path / "captioned", "test", [sample], dataset_type="retrieval\n")
    assert open_source(f"wds:{folder}", "test")[0].texts["en"] == (f"a red{inside}thing", "a second one")


def test_10_a_line_feed_that_was_escaped_in_a_caption_is_read_back(tmp_path: Path) -> None:
    sample = {"png": picture((1, 0, 0), np.random.default_rng(0)), "txt": rb"a red\nthing" + b"\na second one"}
    folder = write_wds(tmp_path / "captioned", "test", [sample], dataset_type="retrieval\n")
    assert open_source(f"wds:{folder}", "test")[0].texts["en"] == ("a red\nthing", "a second one")


# 11. After the work came the crash: a slash in a model's name, fewer shards than workers, half precision in the probe.


def test_11_a_slash_in_a_models_name_is_no_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "colours", {"train": 4, "test": 4})
    found = measure(tmp_path, "zeroshot", f"imagefolder:{folder}", name="some/model:v1")
    assert [result.model.name for result in found.values()] == ["some/model:v1"]
    assert len(list((tmp_path / "results").glob("*/zeroshot/colours@v1.json"))) == 1


def test_11_more_workers_than_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [
        {"png": picture(toy_backbone.COLOURS[name], rng), "cls": str(label).encode()}
        for label, name in enumerate(NAMES)
        for _ in range(3)
    ]
    folder = write_wds(tmp_path / "one-shard", "test", samples, classnames="\n".join(NAMES) + "\n")
    found = measure(tmp_path, "zeroshot", f"wds:{folder}", workers=4)
    assert found["zeroshot/one-shard"].estimates["acc1"].n == 9


def test_11_all_kinds_asked_of_a_retrieval_set(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    captioned = [
        {"png": picture(rgb, rng), "txt": f"a {name} thing\nit is {name}".encode()}
        for name, rgb in toy_backbone.COLOURS.items()
    ]
    folder = write_wds(tmp_path / "captioned", "test", captioned, dataset_type="retrieval\n")
    found = measure(tmp_path, "zeroshot,linear,knn,retrieval", f"wds:{folder}")
    assert set(found) == {"retrieval/captioned"}
    assert "skipped zeroshot/captioned" in capsys.readouterr().out


def test_11_a_probe_in_bfloat16_finishes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "colours", {"train": 12, "val": 6, "test": 6})
    found = measure(tmp_path, "linear,clip_benchmark_probe", f"imagefolder:{folder}", precision="bf16")
    assert set(found) == {"linear/colours", "clip_benchmark_probe/colours"}


# And what was written varied from run to run: the columns of its table were the elements of a set.

_WRITES = """
import sys
from vlbench.cli import main
data, fresh, stored, html = sys.argv[1:]
model = "tests.verbs.toy_backbone:build"
words = ["--tasks", "zeroshot,linear,knn", "--data", data, "--device", "cpu", "--workers", "0", "--results", fresh]
assert main(["eval", "--model", model, *words]) == 0
assert main(["leaderboard", "--results", stored, "--html", html]) == 0
assert main(["compare", "one", "two", "--results", stored]) == 0
"""


def test_11_what_is_written_does_not_depend_on_the_seed_of_hashes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "colours", {"train": 8, "test": 8})
    for name, build in (("one", "build"), ("two", "build_other")):
        model = f"tests.verbs.toy_backbone:{build}"
        measure(tmp_path, "zeroshot,linear,knn,clip_benchmark_probe", f"imagefolder:{folder}", model=model, name=name)
    written = []
    for seed in ("0", "1"):
        fresh, html, environment = tmp_path / f"fresh{seed}", tmp_path / f"{seed}.html", {"PYTHONHASHSEED": seed}
        words = [f"imagefolder:{folder}", str(fresh), str(tmp_path / "results"), str(html)]
        call = [sys.executable, "-c", _WRITES, *words]
        done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, check=True)
        compared = done.stdout[done.stdout.index("sortable, in one file") :]
        results = {}
        for file in sorted(fresh.rglob("*.json")):
            result = json.loads(file.read_text("utf-8"))
            for name in ("created", "seconds", "images_per_second", "peak_memory_mib", "commit"):
                result.pop(name, None)  # what time and machine decide
            results[str(file.relative_to(fresh))] = json.dumps(result)  # in the order of the file
        assert len(results) == 3
        rows = {str(file.relative_to(fresh)): file.read_bytes() for file in sorted(fresh.rglob("*.parquet"))}
        assert len(rows) == 3
        page = (tmp_path / "results" / "LEADERBOARD.md").read_bytes()
        written.append((page, html.read_bytes(), compared, results, rows))
    for one, other in zip(*written, strict=True):
        assert one == other
