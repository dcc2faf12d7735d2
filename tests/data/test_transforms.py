from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.making import pixels
from vlbench.core.cards import Preprocess
from vlbench.core.types import Region
from vlbench.data.transforms import Augment, View, augment, eval_transform, normalise

SIZES = [(64, 64), (48, 97), (301, 199), (7, 120), (224, 225), (33, 20)]


def smooth(height: int, width: int) -> Image.Image:
    return Image.fromarray(pixels(height * width, 9, 11)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_eval_transform_equals_open_clip(size, interpolation, resize):
    import open_clip.transform

    pre = Preprocess(image_size=64, resize=resize, interpolation=interpolation)
    theirs = open_clip.transform.image_transform(
        64, is_train=False, mean=pre.mean, std=pre.std, resize_mode=resize, interpolation=interpolation
    )
    image = smooth(*size)
    ours = eval_transform(pre)(image)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, 64, 64)
    assert torch.equal(normalise(ours[None], pre)[0], theirs(image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
def test_eval_transform_equals_torchvision_with_a_larger_resize(size, interpolation):
    from torchvision import transforms as tv

    pre = Preprocess(
        image_size=56, resize_to=64, interpolation=interpolation, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    mode = tv.InterpolationMode(interpolation)
    theirs = tv.Compose(
        [tv.Resize(64, mode), tv.CenterCrop(56), tv.ToTensor(), tv.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))]
    )
    image = smooth(*size)
    assert torch.equal(normalise(eval_transform(pre)(image)[None], pre)[0], theirs(image))


@pytest.mark.parametrize("size", SIZES)
def test_eval_transform_equals_open_clip_for_a_rectangle(size):
    import open_clip.transform

    pre = Preprocess(image_size=(48, 80))
    theirs = open_clip.transform.image_transform((48, 80), is_train=False, mean=pre.mean, std=pre.std)
    image = smooth(*size)
    assert torch.equal(normalise(eval_transform(pre)(image)[None], pre)[0], theirs(image))


def test_eval_transform_squashes_to_a_larger_square_before_the_crop():
    pre = Preprocess(image_size=56, resize="squash", resize_to=64)
    image = smooth(40, 90)
    expected = image.resize((64, 64), Image.Resampling.BICUBIC).crop((4, 4, 60, 60))
    np.testing.assert_array_equal(eval_transform(pre)(image).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_eval_transform_can_be_pickled():
    pre = Preprocess(image_size=32)
    image = smooth(50, 40)
    transform = pickle.loads(pickle.dumps(eval_transform(pre)))
    assert torch.equal(transform(image), eval_transform(pre)(image))


def test_normalise_leaves_its_input_alone():
    images_BCHW = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    normalise(images_BCHW, Preprocess(image_size=4))
    assert (images_BCHW == 7).all()


EVERYTHING = Augment(flip=True, color_jitter=(0.4, 0.4, 0.4, 0.1), random_erasing=0.5)


def test_augment_is_a_function_of_the_generator():
    image = smooth(70, 90)
    for settings in (Augment(), EVERYTHING):
        once, again, other = (augment(image, np.random.default_rng(seed), settings, (32, 48)) for seed in (1, 1, 2))
        assert once[0].dtype == torch.uint8
        assert once[0].shape == (3, 32, 48)
        assert torch.equal(once[0], again[0])
        assert once[1] == again[1]
        assert not torch.equal(once[0], other[0])


def test_augment_without_anything_to_do_is_a_resize():
    settings = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    image = smooth(64, 64)
    view_CHW, view = augment(image, np.random.default_rng(0), settings, (32, 32))
    expected = image.resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(view_CHW.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert view.flipped is False
    assert (view.left, view.top, view.width, view.height) == (0, 0, 64, 64)


def test_augment_reports_the_flip():
    settings = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=True)
    image = smooth(32, 32)
    plain = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    flips = 0
    for seed in range(200):
        view_CHW, view = augment(image, np.random.default_rng(seed), settings, (32, 32))
        assert torch.equal(view_CHW, plain.flip(2) if view.flipped else plain)
        flips += view.flipped
    assert 70 < flips < 130


def test_augment_view_moves_boxes_with_the_pixels():
    # A white box on black: where its pixels lie in the view is where the view says the box lies.
    image = Image.new("RGB", (120, 80))
    image.paste((255, 255, 255), (40, 20, 90, 60))
    settings = Augment(crop_scale=(0.3, 0.9), crop_ratio=(0.7, 1.4), flip=True, interpolation="bilinear")
    for seed in range(40):
        view_CHW, view = augment(image, np.random.default_rng(seed), settings, (64, 96))
        x1, y1, x2, y2 = view.box((40, 20, 90, 60))
        lit = view_CHW[0] > 127
        if not lit.any():
            continue
        rows, columns = lit.any(1).nonzero()[:, 0], lit.any(0).nonzero()[:, 0]
        found = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        np.testing.assert_allclose(found, (x1, y1, x2, y2), atol=1.0)


def test_augment_view_of_a_box_outside_the_crop_is_empty():
    view = View(left=50, top=50, width=50, height=50, size=(10, 10), flipped=False)
    x1, y1, x2, y2 = view.box((0, 0, 40, 40))
    assert (x2 - x1) * (y2 - y1) == 0


def test_augment_crops_within_the_scale():
    # The red channel holds the row, the green one the column: a view's range shows how much of the image it saw.
    rows, columns = np.meshgrid(np.arange(100), np.arange(100), indexing="ij")
    image = Image.fromarray(np.stack([rows, columns, rows], axis=-1).astype(np.uint8))
    settings = Augment(crop_scale=(0.25, 0.5), crop_ratio=(0.8, 1.25), interpolation="bilinear")
    for seed in range(50):
        view_CHW, _ = augment(image, np.random.default_rng(seed), settings, (100, 100))
        seen = [float(view_CHW[c].max() - view_CHW[c].min() + 1) for c in (0, 1)]
        assert 0.2 < seen[0] * seen[1] / 1e4 < 0.55
        assert 0.75 < seen[1] / seen[0] < 1.33


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1)])
def test_augment_survives_extreme_images(size):
    view_CHW, _ = augment(smooth(*size), np.random.default_rng(0), EVERYTHING, (16, 16))
    assert view_CHW.shape == (3, 16, 16)


def test_augment_resize_to_is_a_crop_of_the_squashed_image():
    image = smooth(70, 110)
    settings = Augment(resize_to=40, flip=True, interpolation="bilinear")
    square_CHW = np.asarray(image.resize((40, 40), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    corners, flips = set(), 0
    for seed in range(200):
        view_CHW, view = augment(image, np.random.default_rng(seed), settings, (36, 32))
        left, top = round(view.left * 40 / image.width), round(view.top * 40 / image.height)
        crop_CHW = square_CHW[:, top : top + 36, left : left + 32]
        np.testing.assert_array_equal(view_CHW.numpy(), crop_CHW[:, :, ::-1] if view.flipped else crop_CHW)
        corners.add((top, left))
        flips += view.flipped
    assert len(corners) > 40, "the crop's place is random"
    assert {top for top, _ in corners} == set(range(5))
    assert {left for _, left in corners} == set(range(9))
    assert 70 < flips < 130


def test_augment_resize_to_moves_boxes_with_the_pixels():
    image = Image.new("RGB", (120, 80))
    image.paste((255, 255, 255), (40, 20, 90, 60))
    settings = Augment(resize_to=80, flip=True, interpolation="bilinear")
    for seed in range(30):
        view_CHW, view = augment(image, np.random.default_rng(seed), settings, (64, 64))
        lit = view_CHW[0] > 127
        rows, columns = lit.any(1).nonzero()[:, 0], lit.any(0).nonzero()[:, 0]
        found = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        np.testing.assert_allclose(found, view.box((40, 20, 90, 60)), atol=1.0)


def test_augment_resize_to_the_input_size_shows_the_whole_image():
    image = smooth(30, 50)
    _, view = augment(image, np.random.default_rng(0), Augment(resize_to=24), (24, 24))
    assert view == View(0, 0, image.width, image.height, (24, 24), flipped=False)


def test_regions_of_a_view_are_those_of_which_a_pixel_shows():
    boxes = {"inside": (12.0, 10.0, 16.0, 20.0), "half": (0.0, 10.0, 14.0, 20.0), "sliver": (0.0, 0.0, 10.4, 40.0)}
    regions = [Region(name, box, segmentation=[[1] * 6], attributes={"name": name}) for name, box in boxes.items()]
    view = View(10, 10, 20, 20, size=(40, 40), flipped=True)
    found = {region.category: region for region in view.regions(regions)}
    assert {name: region.box_xyxy for name, region in found.items()} == {
        "inside": (28, 0, 36, 20),
        "half": (32, 0, 40, 20),
    }, "0.4 pixels of the image are 0.8 of the view"
    assert found["half"].attributes == {"name": "half"}
    assert found["half"].segmentation is None
