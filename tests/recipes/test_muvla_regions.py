"""mu-VLA: where a tower is read (a file's boxes, a grid), features without a pixel, and sentences that are shared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.conftest import (
    IDS,
    TAGS,
    batcher,
    config_of,
    entry,
    logged,
    losses_on_ranks,
    samples,
    setting,
)
from tests.train.conftest import on_ranks, stopped_and_resumed
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.core.types import Region, Sample
from vlbench.data.regions.features import RegionFeatures, box_vector
from vlbench.data.regions.npz import npz_path, write_npz
from vlbench.data.sources import open_source
from vlbench.data.weak.align import AlignSettings, weakly_align
from vlbench.data.weak.corpus import Aligned, Corpus, Entry, write_corpus
from vlbench.models.load import load_backbone
from vlbench.models.single_stream import IGNORED
from vlbench.recipes.muvla import MuvlaConfig
from vlbench.recipes.muvla.batch import Masking
from vlbench.train import batches as train_batches
from vlbench.train.batches import Samples, open_mixture
from vlbench.train.loop import fit

NOTHING = Masking(words=0.0, tags=0.0, regions=0.0, linked=0.0)
RECIPE = RECIPES.get("muvla")


# ----------------------------------------------------------------------------------------------- shared sentences


def _corpus(path: Path, sentences: dict[str, str]) -> Corpus:
    entries = [Entry(name, ("red ring",), (Aligned(text, 1.0, ()),)) for name, text in sentences.items()]
    return write_corpus(path, entries, ids=list(sentences), made_of={})


def test_sentence_of_another_image_is_found_where_nearly_all_share_theirs(
    corpus_path: Path, assets: dict[str, bytes], tmp_path: Path
) -> None:
    made = batcher(corpus_path, assets, NOTHING, objectives=("is",))
    shared = {f"{number:04d}": "a red ring" for number in range(3000)}
    for odd in ("0000", "1717", "2999"):
        made.corpus = _corpus(tmp_path / f"{odd}.arrow", shared | {odd: "a blue box"})
        for seed in range(3):
            found = [made._other("0042", np.random.default_rng(seed)) for _ in range(2)]
            assert found == ["a blue box"] * 2
    made.corpus = _corpus(tmp_path / "two.arrow", shared | {"1000": "a blue box", "1001": "a green star"})
    drawn = {made._other("0042", np.random.default_rng(seed)) for seed in range(60)}
    assert drawn == {"a blue box", "a green star"}, "begun at a random row"
    made.corpus = _corpus(tmp_path / "none.arrow", shared)
    with pytest.raises(UserError, match="no sentence of another image that '0042' does not have too"):
        made._other("0042", np.random.default_rng(0))


# --------------------------------------------------------------------------------------------------- RN's masking


def test_words_of_phrases_are_masked_wherever_they_stand(
    corpus_path: Path, assets: dict[str, bytes], tmp_path: Path
) -> None:
    """The released ablation's rule: any word that occurs in a phrase; regions beside; all words without phrases."""
    from vlbench.data.weak.corpus import Link

    text = "a red ring and see the ring with a red"
    start = text.index("red ring")
    links = (Link("red ring", start, start + 8, 0, 1.0),)
    names = IDS[:2]
    corpus = write_corpus(
        tmp_path / "weak.arrow",
        [
            Entry(names[0], TAGS[:2], (Aligned(text, 1.0, links),)),
            Entry(names[1], TAGS[1:3], (Aligned(text, 1.0, ()),)),
        ],
        ids=names,
        made_of={},
    )
    masking = Masking(
        words=1.0, tags=0, regions=0, linked=1.0, linked_only=False, phrase_words=True, hidden=0, random=0
    )
    made = batcher(corpus_path, assets, masking, objectives=("rn",))
    made.corpus = corpus
    linked, without = samples(2)
    words = made.vocabulary.encode(text)
    known = set(made.vocabulary.encode("red ring"))
    found = made([linked])
    assert found["rn_labels"][0, 1:-1].tolist() == [word if word in known else IGNORED for word in words]
    assert sum(word in known for word in words) == 2 * len(made.vocabulary.encode("red ring"))
    assert found["rn_masked"][0].tolist() == [True, False], "linked regions beside"
    # A crop that has left nothing of the linked region: the phrase is still one of the sentence.
    linked.regions = linked.regions[1:]
    cropped = made([linked])
    assert cropped["rn_labels"][0].tolist() == found["rn_labels"][0].tolist()
    assert not cropped["rn_masked"].any()
    assert made([without])["rn_labels"][0, 1:-1].tolist() == words
    config = config_of(corpus_path, "rn_masking=phrases").masking()
    assert (config.linked_only, config.phrase_words) == (False, True)
    uniform = config_of(corpus_path, "rn_masking=uniform").masking()
    assert (uniform.linked_only, uniform.phrase_words) == (False, False)


# ------------------------------------------------------------------------------------ fixed features, the paper's mode


@pytest.fixture(scope="module")
def found(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Detections of the COCO images, made at twice their size."""
    folder = tmp_path_factory.mktemp("found")
    rng = np.random.default_rng(0)
    for number in range(len(IDS)):
        boxes = np.array([[4, 6, 28, 30], [34, 24, 58, 48]], dtype=np.float32)
        features = rng.normal(size=(2, 8)).astype(np.float32)
        write_npz(npz_path(folder, str(number)), RegionFeatures(features, boxes, entry(number).tags, None, 64, 64))
    return folder


@pytest.fixture(scope="module")
def paper_config(run_config: MuvlaConfig, found: Path, tmp_path_factory: pytest.TempPathFactory) -> MuvlaConfig:
    path = tmp_path_factory.mktemp("paper") / "weak.arrow"
    texts = Path(run_config.pool[0]).read_text().splitlines()
    sources = [open_source(spec) for spec in run_config.data]
    weakly_align(sources, texts, out=path, features=found, settings=AlignSettings(chunker="tags"))
    changes = [f"features={found}", "feature_width=8", "mrfr=l2", "pool=[]", f"corpus={path}"]
    return override(run_config, changes)


def test_fixed_features_decode_no_image(
    paper_config: MuvlaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no pixel is needed")

    for name in ("decode", "augment"):
        monkeypatch.setattr(train_batches, name, never)
    fit(RECIPE, override(paper_config, ["steps=2"]), out=tmp_path / "run")
    assert {"rt_features", "rn_words", "itm"} <= set(logged(tmp_path / "run")[-1])


def test_fixed_features_train_without_the_images(paper_config: MuvlaConfig, world: Path, tmp_path: Path) -> None:
    """Absent and damaged files change no bit: the table of the data is enough."""
    fit(RECIPE, override(paper_config, ["steps=2"]), out=tmp_path / "with")
    copy = tmp_path / "copy"
    shutil.copytree(world, copy)
    for number in range(0, len(IDS), 2):
        (copy / "train" / f"{number}.png").unlink()
    (copy / "train" / "1.png").write_bytes(b"\x89PNG cut short")
    config = paper_config.model_copy(update={"data": (f"coco:{copy}",), "steps": 2})
    fit(RECIPE, config, out=tmp_path / "without")
    one, two = logged(tmp_path / "with"), logged(tmp_path / "without")
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
    assert two[-1]["bad_examples"] == 0


def test_images_that_nothing_could_read_are_passed_over(
    paper_config: MuvlaConfig, world: Path, found: Path, tmp_path: Path
) -> None:
    copy, fewer = tmp_path / "copy", tmp_path / "fewer"
    shutil.copytree(world, copy)
    shutil.copytree(found, fewer)
    (copy / "train" / "3.png").write_bytes(b"no image")
    npz_path(fewer, "3").unlink()
    config = paper_config.model_copy(
        update={"data": (f"coco:{copy}",), "features": str(fewer), "steps": 4, "max_bad": 5}
    )
    fit(RECIPE, config, out=tmp_path / "run")
    assert logged(tmp_path / "run")[-1]["bad_examples"] == 1


def test_stopped_run_of_fixed_features_goes_on_to_the_same_bits(paper_config: MuvlaConfig, tmp_path: Path) -> None:
    stopped_and_resumed(paper_config, tmp_path, stop=5, recipe=RECIPE)


def test_two_ranks_of_fixed_features_are_one_process(paper_config: MuvlaConfig, tmp_path: Path) -> None:
    """Loss, every term and the gradient's norm, with unequal numbers of masked places on the ranks."""
    config = override(paper_config, ["steps=3", "stream.dropout=0", "itm_from_epoch=0.5"])
    fit(RECIPE, config, out=tmp_path / "one")
    on_ranks(losses_on_ranks, config, str(tmp_path / "two"))
    terms = ("rt_words", "rt_tags", "rt_features", "rn_words", "rn_regions", "is_words", "itm", "p_match")
    for alone, together in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", *terms):
            assert together[name] == pytest.approx(alone[name], rel=2e-4, abs=1e-6), name
    weights = [torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-4, rtol=1e-3, msg=name)


# ---------------------------------------------------------------------------------------------------- boxes of a file


def test_boxes_of_a_file_are_read_in_the_view(run_config: MuvlaConfig, found: Path, world: Path) -> None:
    """In place of the data's own, moved with the crop; the detector saw images twice as large."""
    config = override(run_config, [f"boxes={found}", "objectives=[rt]"])
    assert RECIPE.needs_of(config) == {"image"}
    mixture = open_mixture(RECIPE, config)
    recipe = RECIPE.with_assets(RECIPE.learn_assets(config, mixture))
    own, given = Samples(RECIPE, run_config, mixture), Samples(recipe, config, mixture)
    own._needs = frozenset({"image", "regions"})
    for position in range(8):
        theirs, sample = own(position)[0], given(position)[0]
        assert torch.equal(theirs.image_CHW, sample.image_CHW)
        assert sample.categories == set(entry(int(sample.id)).tags)
        assert sample.regions, "the detector's boxes lie where the data's do"
        for one, other in zip(theirs.regions, sample.regions):
            assert one.category == other.category
            assert other.box_xyxy == pytest.approx(one.box_xyxy, abs=1e-4)


def test_boxes_of_a_file_train_export_and_match(run_config: MuvlaConfig, found: Path, tmp_path: Path) -> None:
    """Data without a region of their own; the corpus is made by the boxes' tags, and lies apart by the file."""
    plain = _images(tmp_path / "plain")
    config = override(run_config, [f"boxes={found}", f'data=["{plain}"]', "steps=2"])
    path = fit(RECIPE, config, out=tmp_path / "run")
    line = logged(tmp_path / "run")[-1]
    assert {"rt_words", "rt_tags", "rn_words", "is_words", "itm", "roi_tags"} <= set(line)
    backbone = load_backbone(str(path))
    assert backbone.card.provides >= {"pooled", "maps", "match"}
    images = torch.randn(1, 3, 32, 32)
    boxes = np.array([[4, 6, 28, 30]], dtype=np.float32)
    stored = Region("red ring", tuple(boxes[0].tolist()), attributes={"box_vector": box_vector(boxes, 64, 64)[0]})
    here = Region("red ring", (2.0, 3.0, 14.0, 15.0))
    p = [backbone.match(images, ["a red ring"], regions=[[region]]).item() for region in (stored, here)]
    assert p[0] == pytest.approx(p[1], abs=1e-5), "a file's boxes are of the whole image, in its pixels"
    elsewhere = Region("red ring", (20.0, 20.0, 30.0, 30.0))
    assert backbone.match(images, ["a red ring"], regions=[[elsewhere]]).item() != pytest.approx(p[1], abs=1e-7)


def test_boxes_that_lack_an_image_or_a_class_are_one_line(run_config: MuvlaConfig, found: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    shutil.copytree(found, few)
    npz_path(few, "7").unlink()
    config = override(run_config, [f"boxes={few}", "objectives=[rt]"])
    with pytest.raises(UserError, match="1 images of the data have no boxes there, first '7'"):
        RECIPE.learn_assets(config, open_mixture(RECIPE, config))
    bare = tmp_path / "bare"
    for number in range(len(IDS)):
        box = np.array([[0, 0, 5, 5]], dtype=np.float32)
        write_npz(npz_path(bare, str(number)), RegionFeatures(np.ones((1, 8), np.float32), box, (), None, 64, 64))
    config = override(run_config, [f"boxes={bare}", "objectives=[rt]"])
    with pytest.raises(UserError, match="names no classes"):
        RECIPE.learn_assets(config, open_mixture(RECIPE, config))


def _images(folder: Path) -> str:
    """A table of the COCO images' ids, without regions."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    for number in range(len(IDS)):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        with (folder / str(number)).open("wb") as handle:
            Image.fromarray(pixels).save(handle, "PNG")
    rows = "".join(f"{number}\ta picture {number}\n" for number in range(len(IDS)))
    (folder / "all.csv").write_text("filepath\ttitle\n" + rows)
    return f"csv:{folder / 'all.csv'}"


# ---------------------------------------------------------------------------------------------------- cells of a grid

GRID = ["roi.grid=2", "roi.classify=false", 'objectives=["rn","is"]', "visual.image_size=64"]


def _on_grid(corpus_path: Path, *changes: str) -> MuvlaConfig:
    return config_of(corpus_path, *GRID, *changes)


def test_cells_are_means_of_the_last_map_with_their_boxes(corpus_path: Path, assets: dict[str, bytes]) -> None:
    config = _on_grid(corpus_path, "visual.image_size=128")
    recipe = RECIPE.with_assets(assets)
    model = recipe.build(config, ()).eval()
    images = torch.randn(2, 3, 128, 128)
    batch = recipe.collate(config, [_sample(sample, 128) for sample in samples(2)])
    quarter = [[0, 0, 0.5, 0.5, 0.25], [0.5, 0, 1, 0.5, 0.25], [0, 0.5, 0.5, 1, 0.25], [0.5, 0.5, 1, 1, 0.25]]
    torch.testing.assert_close(batch["box_BR5"], torch.tensor([quarter, quarter]))
    assert batch["valid_BR"].all()
    assert (batch["tags_BR"] == IGNORED).all()
    with torch.no_grad():
        found, pooled = model.visual(images, batch["boxes_BR4"])
        last = model.visual.tower.features(images, dense=True).maps[32]
    assert last.shape[2:] == (4, 4)
    means = [last[:, :, y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2) for x in (0, 2)]
    torch.testing.assert_close(found, torch.stack(means, 1))
    assert pooled.shape[0] == 2


def _sample(sample: Sample, side: int) -> Sample:
    return Sample(torch.zeros(3, side, side, dtype=torch.uint8), None, -1, id=sample.id, seed=sample.seed)


def test_phrases_are_masked_beside_cells_in_every_row(corpus_path: Path, assets: dict[str, bytes]) -> None:
    config = _on_grid(corpus_path, "mask_linked=1", "k=1")
    batch = RECIPE.with_assets(assets).collate(config, samples())
    read = batch["rn_labels"] != IGNORED
    assert read.any(1).all(), "no row is left to regions that cannot be masked"
    assert not batch["rn_masked"].any()
    assert (batch["rn_region_labels"] == IGNORED).all()
    known = {word for tag in TAGS for word in RECIPE.with_assets(assets).vocabulary.encode(tag)}
    assert set(batch["rn_labels"][read].tolist()) <= known


@pytest.mark.parametrize("objectives", [["rn"], ["is"], ["rn", "is"]])
def test_grid_uses_every_parameter(objectives: list[str], corpus_path: Path, assets: dict[str, bytes]) -> None:
    changes = [*GRID, f"objectives={objectives}", "visual.image_size=64"]
    recipe, config, model, _ = setting(corpus_path, assets, *changes)
    batch = recipe.collate(config, [_sample(sample, 64) for sample in samples()]) | {"epoch": torch.tensor(2.0)}
    recipe.loss(model, batch, config)["loss"].backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"distributed training would stop: {without}"


def test_grid_trains_on_images_without_boxes_exports_and_matches(
    paper_config: MuvlaConfig, run_config: MuvlaConfig, tmp_path: Path
) -> None:
    plain = _images(tmp_path / "plain")
    config = override(run_config, [*GRID, f'data=["{plain}"]', "pool=[]", f"corpus={paper_config.corpus}", "steps=2"])
    path = fit(RECIPE, config, out=tmp_path / "run")
    assert {"rn_words", "is_words", "itm"} <= set(logged(tmp_path / "run")[-1])
    backbone = load_backbone(str(path))
    assert backbone.card.provides >= {"pooled", "maps", "match"}
    assert "grid 2, an adaptation of mu-VLA" in backbone.card.arch
    images, texts = torch.randn(3, 3, 64, 64), ["a red ring", "a blue box", "nothing"]
    p = backbone.match(images, texts)
    boxes = [[Region("red ring", (1.0, 2.0, 30.0, 30.0))]] * 3
    assert torch.equal(backbone.match(images, texts, regions=boxes), p), "boxes are no matter"
    alone = torch.cat([backbone.match(images[i : i + 1], texts[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(p, alone, atol=1e-6, rtol=1e-5)
    assert len(set(p.tolist())) == 3


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (['objectives=["rt","is"]'], r"give objectives=\[rn,is\], roi.classify=false, rows=paper"),
        (["roi.classify=true"], "cells have no tags"),
        (["rows=released"], "cells have no tags"),
        (["roi.mask_pixels=true"], "nor masked boxes for roi.mask_pixels"),
        (["boxes=found"], "leave features and boxes out"),
        (["features=found"], "leave features and boxes out"),
    ],
)
def test_what_needs_tags_or_boxes_is_refused_on_a_grid(changes: list[str], line: str, corpus_path: Path) -> None:
    with pytest.raises(UserError, match=line) as error:
        _on_grid(corpus_path, *changes)
    assert "\n" not in str(error.value)


def test_grid_finer_than_the_map_is_refused(corpus_path: Path, assets: dict[str, bytes]) -> None:
    config = _on_grid(corpus_path, "roi.grid=3")
    with pytest.raises(UserError, match=r"2 x 2 places at 64 pixels, fewer than roi.grid=3; set roi.grid to 2 at most"):
        RECIPE.with_assets(assets).build(config, ())


@pytest.mark.parametrize("change", ["features=found", "augment.rand_augment=rand-m9"])
def test_boxes_go_with_a_tower_whose_images_stay_upright(change: str, corpus_path: Path) -> None:
    with pytest.raises(UserError, match="boxes are where a tower is read"):
        config_of(corpus_path, "boxes=found", change)
