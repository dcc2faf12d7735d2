"""Batches: what is learnt from, where it lies after flips and resizes, and that a position decides it all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.finetune.detection.scenes import CLASSES, Scenes, example, region, small
from vlbench.core.errors import BadExample, RunError, UserError
from vlbench.core.types import Region
from vlbench.data.masks import to_bitmap, to_rle
from vlbench.data.sources import Subset
from vlbench.finetune.detection.batch import Pictured, collate, targets, unpacked
from vlbench.finetune.detection.feed import DetectionFeed, picture
from vlbench.finetune.detection.sizes import resized, target_size
from vlbench.train.distributed import Ranks

ALONE = Ranks()


def batches_of(feed, config, *, start=0, here=ALONE):
    return list(feed.batches(None, config, start=start, here=here, pin=False))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def half(value: int, height: int = 60, width: int = 100) -> np.ndarray:
    """A mask of the left ``value`` columns from row 10 on."""
    mask = np.zeros((height, width), dtype=bool)
    mask[10:, :value] = True
    return mask


def test_packed_masks_come_back_bit_for_bit():
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 2, size=(n, 30, w), dtype=np.uint8) for n, w in ((2, 37), (0, 64), (3, 50))]
    pictured = [
        Pictured(torch.full((3, 30, m.shape[2]), 9, dtype=torch.uint8), np.ones((len(m), 4)), np.arange(len(m)), m)
        for m in masks
    ]
    batch = collate(pictured, divisor=32)
    assert batch["images_BCHW"].shape == (3, 3, 32, 64)
    assert batch["owner_K"].tolist() == [0, 0, 2, 2, 2]
    assert batch["images_BCHW"][0, :, :30, :37].eq(9).all()
    assert not batch["images_BCHW"][0, :, :, 37:].any()
    for wanted, one in zip(masks, targets(batch)):
        back = one["masks"].numpy()
        assert np.array_equal(back[:, :30, : wanted.shape[2]], wanted)
        assert back.sum() == wanted.sum()
    assert unpacked(batch["masks_KHP"], 64).shape == (5, 32, 64)


def test_a_flip_takes_image_box_and_mask_along():
    pixels = np.zeros((60, 100, 3), dtype=np.uint8)
    pixels[half(30)] = 255
    one = example("a", pixels, [region(half(30), "disc")])
    for flip in (False, True):
        seen = picture(one, CLASSES, short_side=120, long_side=400, flip=flip)
        assert seen.image_CHW.shape == (3, 120, 200)
        assert seen.masks_nHW.shape == (1, 120, 200)
        assert seen.boxes_n4[0].tolist() == ([140, 20, 200, 120] if flip else [0, 20, 60, 120])
        assert seen.classes_n.tolist() == [1]
        bright = (seen.image_CHW[0] > 127).numpy()
        assert (bright == seen.masks_nHW[0].astype(bool)).mean() > 0.98
        rows, columns = np.nonzero(seen.masks_nHW[0])
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == seen.boxes_n4[0].tolist()


def test_polygons_are_drawn_at_the_size_that_is_learnt_at():
    polygon = [10.0, 10.0, 50.0, 10.0, 50.0, 50.0]  # a triangle
    one = example("a", np.zeros((60, 100, 3), dtype=np.uint8), [Region("disc", (10, 10, 50, 50), [polygon], {})])
    large = picture(one, CLASSES, short_side=600, long_side=2000, flip=False).masks_nHW[0]
    assert np.array_equal(large, to_bitmap(to_rle([[10 * n for n in polygon]], 600, 1000, where="a")))
    assert abs(large.sum() / 100 - 800) < 15  # half of 40 x 40, which the stored pixels would miss by their steps


def test_crowds_and_images_without_objects_are_left_out():
    blank = np.zeros((60, 100, 3), dtype=np.uint8)
    source = Scenes(0)
    source.examples = [
        example("none", blank, []),
        example("crowd", blank, [region(half(30), "disc", iscrowd=1)]),
        example("line", blank, [Region("disc", (5, 5, 6, 50), {"size": [60, 100], "counts": [6000]}, {})]),
        example("both", blank, [region(half(30), "disc", iscrowd=1), region(half(20), "square")]),
    ]
    feed = DetectionFeed(source, small())
    assert list(feed.source.ids()) == ["both"]
    assert len(feed) == 1
    assert feed.data.sources[0][0].id == "both"
    batch = batches_of(feed, small(steps=1))[0]
    assert batch["classes_K"].tolist() == [0, 0]  # two visits, and the crowd in neither
    kept = DetectionFeed(source, small(empty_images="keep"))
    assert len(kept) == 4
    source.examples = source.examples[:2]
    with pytest.raises(UserError, match="no image of 'train' has an object"):
        DetectionFeed(source, small())


def test_a_batch_is_a_function_of_seed_and_step():
    source, config = Scenes(10), small(steps=5, batch_size=4, short_sides=(64, 96, 128), seed=3)
    whole = batches_of(DetectionFeed(source, config), config)
    assert all(same(a, b) for a, b in zip(whole[2:], batches_of(DetectionFeed(source, config), config, start=2)))
    workers = config.model_copy(update={"workers": 2})
    assert all(same(a, b) for a, b in zip(whole, batches_of(DetectionFeed(source, config), workers)))
    shares = [batches_of(DetectionFeed(source, config), config, here=Ranks(rank, 2)) for rank in range(2)]
    for batch, one, other in zip(whole, *shares):
        assert batch["sizes_B2"].tolist() == one["sizes_B2"].tolist() + other["sizes_B2"].tolist()
        assert torch.equal(batch["boxes_K4"], torch.cat([one["boxes_K4"], other["boxes_K4"]]))
    others = config.model_copy(update={"seed": 4})
    assert not same(whole[0], batches_of(DetectionFeed(source, others), others)[0])


def test_every_scale_is_seen_and_half_are_mirrored():
    source, config = Scenes(4), small(steps=30, batch_size=4, short_sides=(64, 96, 128))
    sides = torch.cat([batch["sizes_B2"][:, 0] for batch in batches_of(DetectionFeed(source, config), config)])
    shares = [float((sides == side).float().mean()) for side in (64, 96, 128)]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0.2
    still = small(steps=2, batch_size=4, flip=False)
    plain = {
        one.tobytes()
        for batch in batches_of(DetectionFeed(source, still), still)
        for one in batch["images_BCHW"].numpy()
    }
    assert len(plain) == 4  # without flips at one scale an image is always the same
    both = still.model_copy(update={"flip": True, "steps": 10})
    seen = {
        one.tobytes() for batch in batches_of(DetectionFeed(source, both), both) for one in batch["images_BCHW"].numpy()
    }
    assert len(seen) == 8


def test_a_bad_mask_is_one_line_with_its_image():
    source = Scenes(3)
    good = source.examples[0]
    source.examples[1] = example(
        "wrong", np.zeros((96, 96, 3), dtype=np.uint8), [Region("disc", (1, 1, 9, 9), [[1.0, 1.0, 9.0, 9.0]], {})]
    )
    config = small(max_bad=0, steps=3)
    with pytest.raises(RunError, match="bad mask: scenes wrong"):
        batches_of(DetectionFeed(source, config), config)
    source.examples = [good]
    source.classes = ("triangle",)
    unknown = small(max_bad=0)
    source.examples = [example("x", np.zeros((96, 96, 3), dtype=np.uint8), good.regions)]
    source.examples[0].extra.pop("categories")
    feed = DetectionFeed(source, unknown)
    with pytest.raises(RunError, match="missing class: scenes x"):
        batches_of(feed, unknown)


def test_sizes_keep_the_aspect_within_the_limits():
    assert target_size(480, 640, 800, 1333) == (800, 1067)
    assert target_size(640, 480, 800, 1333) == (1067, 800)
    assert target_size(300, 1000, 800, 1333) == (400, 1333)
    assert resized(torch.zeros(3, 60, 100, dtype=torch.uint8), 30, 100).shape == (3, 30, 50)
    ramp = torch.arange(100, dtype=torch.uint8).repeat(3, 60, 1)
    assert resized(ramp, 60, 200) is ramp


def test_an_image_of_another_size_than_its_annotations_say_is_a_bad_example():
    good = Scenes(1).examples[0]
    other = example("resized", np.zeros((48, 50, 3), dtype=np.uint8), good.regions)
    other.extra.update(height=96, width=96)
    with pytest.raises(BadExample, match=r"other size: 48 x 50 pixels .* annotations say 96 x 96"):
        picture(other, CLASSES, short_side=96, long_side=192, flip=False)
    silent = replace(other, extra={key: value for key, value in other.extra.items() if key not in ("height", "width")})
    with pytest.raises(BadExample, match="bad mask"):  # its run lengths are of 96 x 96
        picture(silent, CLASSES, short_side=96, long_side=192, flip=False)


def test_boxes_that_are_a_line_in_float32_are_left_out():
    mask = {"size": [60, 100], "counts": [6000]}
    boxes = [(50.0, 5.0, 50.0 + 1e-7, 40.0), (5.0, 9.0, 50.0, 9.009), (5.0, 9.0, 50.0, 9.02)]
    thin = example("a", np.zeros((60, 100, 3), dtype=np.uint8), [Region("disc", box, mask, {}) for box in boxes])
    seen = picture(thin, CLASSES, short_side=60, long_side=200, flip=False)
    assert len(seen.boxes_n4) == len(seen.masks_nHW) == len(seen.classes_n) == 1
    sides = seen.boxes_n4[:, 2:] - seen.boxes_n4[:, :2]
    assert np.isfinite(np.log(sides)).all()


@pytest.mark.parametrize("empty_images", ["drop", "keep"])
def test_data_without_masks_are_one_line(empty_images):
    source = Scenes(3)
    bare = [
        replace(one, regions=tuple(replace(region, segmentation=None) for region in one.regions))
        for one in source.examples
    ]
    objects = sum(len(one.regions) for one in bare)
    source.examples, mixed = bare, [bare[0], source.examples[1]]
    with pytest.raises(UserError, match=rf"'scenes': none of the {objects} objects of 'train' has a mask, and Mask R"):
        DetectionFeed(source, small(empty_images=empty_images))
    source.examples = mixed
    assert len(DetectionFeed(source, small(empty_images=empty_images))) == 2


def test_a_part_of_a_source_that_knows_its_regions_is_not_read_to_be_looked_through():
    class Known(Scenes):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

        def regions_of(self, index):
            return self.examples[index].regions

    source = Known(6)
    feed = DetectionFeed(Subset(source, [4, 1], split="train"), small())
    assert list(feed.source.ids()) == ["train4", "train1"]
    assert source.read == 0
