"""Frozen features of grids and boxes: once an image, in any batches, as a trained tower sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters.fakes import FakeSource
from tests.finetune.fusion.quadrants import (
    SIDE,
    backbone,
    boxes,
    colours_of,
    left_or_right,
    picture,
    settings,
    source,
    which_colour,
    which_place,
)
from vlbench.adapters.common import region_features as module
from vlbench.adapters.common.fusion import ViewsOf
from vlbench.adapters.common.region_features import region_features, visual_reader
from vlbench.adapters.encoder import Encoder
from vlbench.core.errors import BadExample, UserError
from vlbench.finetune.fusion.questions import Questions
from vlbench.models.export import export_visual
from vlbench.models.vision import VisualConfig, build_visual
from vlbench.store.features import FeatureStore

HOW: dict[str, Any] = {"levels": 2, "cells": 2, "grid": 3}


def encoder(store: FeatureStore | None = None, **more: Any) -> Encoder:
    return Encoder(backbone(), store, **more)


def boxes_of(questions: Questions) -> list[list[np.ndarray]]:
    return [
        [np.array([r.box_xyxy for r in view[i].regions]) for view in questions.views] for i in range(len(questions))
    ]


def resnet() -> Any:
    """A real network, whose maps have four strides."""
    torch.manual_seed(0)
    tower = build_visual(VisualConfig(arch="timm:test_resnet", image_size=64))
    return export_visual(tower, model_id="r", recipe="none", preprocess=replace_size(backbone().card.preprocess, 64))


def replace_size(preprocess: Any, side: int) -> Any:
    return preprocess.model_copy(update={"image_size": (side, side)})


@pytest.mark.parametrize("regions", [False, True])
def test_features_do_not_depend_on_the_batches_that_they_came_in(regions: bool) -> None:
    questions = which_place(12)
    given = boxes_of(questions) if regions else None
    found = [
        region_features(Encoder(resnet(), None, batch_size=size), questions.views, boxes=given, **HOW)
        for size in (1, 7, 64)
    ]
    for other in found[1:]:
        assert np.abs(other.features_MF - found[0].features_MF).max() < 1e-6
        assert other.pooled_KP is not None
        assert np.abs(other.pooled_KP - found[0].pooled_KP).max() < 1e-6
        assert np.array_equal(other.box_M5, found[0].box_M5)
    assert found[0].features_MF.shape == (12 * (4 if regions else 9), sum(found[0].parts))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("net", ["quadrants", "resnet"])
def test_frozen_features_are_what_a_trained_tower_computes_at_its_first_step(regions: bool, net: str) -> None:
    """Images of another size and aspect than the input, so that squashing and boxes count."""
    colours = colours_of(6, 0)
    images = [picture(row, number, width=50, height=36) for number, row in enumerate(colours)]
    questions = which_place(6) if regions else which_colour(6)
    real = source(colours, 0)
    own = [tuple(replace(r, box_xyxy=box) for r, box in zip(real.regions[i], boxes(50, 36))) for i in range(6)]
    view = FakeSource(images, split="train", regions=own)
    questions = replace(questions, views=(view,))
    eyes = backbone() if net == "quadrants" else resnet()
    coder = Encoder(eyes, None, batch_size=4)
    config = settings(grid=3)
    bank = ViewsOf(coder, config, None)(questions)
    visual = visual_reader(eyes, levels=config.levels, cells=config.cells)
    decoded = ViewsOf(coder, config, visual)(questions)
    assert bank.sight == decoded.sight
    frozen, images_side = bank(range(6)), decoded(range(6))
    assert torch.equal(frozen["valid_BVR"], images_side["valid_BVR"])
    torch.testing.assert_close(frozen["box_BVR5"], images_side["box_BVR5"], atol=1e-6, rtol=0)
    from vlbench.data.transforms import normalise

    pixels = normalise(images_side["images_BVCHW"].flatten(0, 1), eyes.card.preprocess)
    with torch.no_grad():
        features, pooled = visual(pixels, images_side["boxes_BVR4"].flatten(0, 1))
    torch.testing.assert_close(frozen["features_BVRF"][:, 0], features, atol=1e-6, rtol=0)
    torch.testing.assert_close(frozen["pooled_BVP"][:, 0], pooled, atol=1e-6, rtol=0)


def test_a_cell_reads_its_own_part_of_the_image() -> None:
    bank = region_features(encoder(), (source(np.array([[0, 1, 2, 3], [0, 1, 2, 2]]), 0),), levels=1, cells=1, grid=2)
    one, other = bank.features_MF.reshape(2, 4, -1)
    change = np.abs(one - other).max(axis=1)
    assert change[3] > 5 * change[:3].max()
    assert bank.box_M5[:4] == pytest.approx(
        np.array([[0, 0, 0.5, 0.5, 0.25], [0.5, 0, 1, 0.5, 0.25], [0, 0.5, 0.5, 1, 0.25], [0.5, 0.5, 1, 1, 0.25]])
    )


def test_equal_images_are_encoded_once_over_views_and_calls(tmp_path: Path) -> None:
    whole = left_or_right(8)
    twice = Questions((whole.views[0], whole.views[0]), whole.texts, whole.targets)
    coder = encoder(FeatureStore(tmp_path))
    bank = region_features(coder, twice.views, **HOW)
    assert coder.stats.images_encoded == len(set(whole.views[0].images)) == len(bank.start_K1) - 1
    assert np.array_equal(bank.image_NV[:, 0], bank.image_NV[:, 1])
    again = encoder(FeatureStore(tmp_path))
    later = region_features(again, whole.views, **HOW)
    assert again.stats.images_encoded == len(set(whole.views[1].images) - set(whole.views[0].images))
    same = (
        bank.features_MF[bank.start_K1[bank.image_NV[3, 0]]],
        later.features_MF[later.start_K1[later.image_NV[3, 0]]],
    )
    assert np.array_equal(*same)
    other_grid = encoder(FeatureStore(tmp_path))
    region_features(other_grid, whole.views, **(HOW | {"grid": 2}))
    assert other_grid.stats.images_reused == 0


def test_without_a_store_splits_still_share_their_images() -> None:
    coder = encoder()
    questions = which_colour(5)
    region_features(coder, questions.views, **HOW)
    region_features(coder, questions.views, **HOW)
    assert coder.stats.images_encoded == 5


def test_a_killed_encoding_loses_one_shard_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    questions = which_colour(12)

    class Killed(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise Killed

    with pytest.raises(Killed):
        region_features(encoder(FeatureStore(tmp_path), batch_size=4, progress=stop), questions.views, **HOW)
    coder = encoder(FeatureStore(tmp_path), batch_size=4)
    found = region_features(coder, questions.views, **HOW)
    assert (coder.stats.images_reused, coder.stats.images_encoded) == (8, 4)
    whole = region_features(encoder(), questions.views, **HOW)
    assert np.array_equal(found.features_MF, whole.features_MF)


def test_several_processes_deal_the_images_out(tmp_path: Path) -> None:
    questions = which_place(9)
    given = boxes_of(questions)

    @contextlib.contextmanager
    def share(what: str, keys: Sequence[str]) -> Iterator[Sequence[str]]:
        asked.append(what)
        # The other one does its part before this one leaves the block.
        other = encoder(FeatureStore(tmp_path), share=lambda _, k: contextlib.nullcontext(k[4:]))
        with contextlib.suppress(UserError):  # it waits for nobody here, and so misses the first one's part
            region_features(other, questions.views, boxes=given, **HOW)
        yield keys[:4]

    asked: list[str] = []
    coder = encoder(FeatureStore(tmp_path), share=share)
    found = region_features(coder, questions.views, boxes=given, **HOW)
    assert asked == ["regions"]
    assert coder.stats.images_encoded == 4
    assert np.array_equal(
        found.features_MF, region_features(encoder(), questions.views, boxes=given, **HOW).features_MF
    )


def test_a_process_whose_part_is_lost_says_so(tmp_path: Path) -> None:
    coder = encoder(FeatureStore(tmp_path), share=lambda what, keys: contextlib.nullcontext(keys[:2]))
    with pytest.raises(UserError, match="not in the feature store"):
        region_features(coder, which_colour(5).views, **HOW)


def test_images_of_unequal_numbers_of_boxes_are_padded() -> None:
    questions = which_place(4)
    given = boxes_of(questions)
    given[1][0], given[2][0] = given[1][0][:1], given[2][0][:0]
    bank = region_features(encoder(), questions.views, boxes=given, **HOW)
    assert bank.counts()[:, 0].tolist() == [4, 1, 0, 4]
    found = bank.gather([2, 1, 0], most=3)
    assert found["valid_BVR"].sum(-1)[:, 0].tolist() == [0, 1, 3]
    assert (found["features_BVRF"][0] == 0).all()
    assert np.array_equal(found["features_BVRF"][2, 0], bank.features_MF[:3])


def test_large_features_lie_in_a_file_that_is_not_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vlbench.finetune.fusion import bank

    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path))
    questions = which_colour(6)
    small = region_features(encoder(), questions.views, **HOW)
    monkeypatch.setattr(bank, "IN_MEMORY", 100)
    monkeypatch.setattr(bank, "_CHUNK", 4 * 9 * 18 * 4)
    large = region_features(encoder(), questions.views, **HOW)
    assert isinstance(large.features_MF.base, np.memmap) or isinstance(large.features_MF, np.memmap)
    assert np.array_equal(large.features_MF, small.features_MF)
    assert not list(tmp_path.rglob("*.f32"))


def test_a_broken_image_is_named() -> None:
    questions = which_colour(4)
    questions.views[0].images[2] = b"broken"
    with pytest.raises(BadExample, match="train/2"):
        region_features(encoder(), questions.views, **HOW)


def test_features_that_are_not_finite_are_refused() -> None:
    eyes = backbone()
    with torch.no_grad():
        eyes.module.deep.weight[0] = torch.nan
    with pytest.raises(UserError, match="'train/0' are not finite"):
        region_features(Encoder(eyes, None), which_colour(3).views, **HOW)


def test_a_backbone_without_maps_is_refused_in_one_line() -> None:
    from vlbench.models.backbone import wrap

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, 4))
    with pytest.raises(UserError, match="maps"):
        region_features(Encoder(wrap(net, preprocess=SIDE, name="flat"), None), which_colour(3).views, **HOW)


@pytest.mark.parametrize("arch", ["torchvision:convnext_tiny", "timm:test_vit", "timm:test_convnext"])
def test_towers_of_other_kinds_give_as_many_cells(arch: str) -> None:
    torch.manual_seed(0)
    side = 160 if "vit" in arch or "test_" in arch else 64
    tower = build_visual(VisualConfig(arch=arch, image_size=side))
    eyes = export_visual(tower, model_id="t", recipe="none", preprocess=replace_size(backbone().card.preprocess, side))
    bank = region_features(Encoder(eyes, None), which_colour(2).views, **HOW)
    assert bank.features_MF.shape == (2 * 9, sum(bank.parts))
    assert np.isfinite(bank.features_MF).all()
