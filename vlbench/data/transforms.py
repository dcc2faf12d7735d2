"""From an RGB image to a tensor: the exact evaluation transform, and seeded training augmentation.

Both give ``uint8``, a quarter of the bytes to move from a loader process to the device; ``normalise`` then makes the
floats there. B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator

from vlbench.core.cards import Preprocess
from vlbench.core.config import Config
from vlbench.core.later import compiler_later
from vlbench.core.types import Region
from vlbench.data.rand_augment import check_words, rand_augment

with compiler_later():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tf

_CROP_ATTEMPTS = 10
_MAX_HUE = 0.5  # half the colour wheel: all hues there are


class Augment(Config):
    """Training augmentation. The defaults suit contrastive pretraining: a crop, and nothing that changes colours."""

    crop_scale: tuple[float, float] = Field(default=(0.5, 1.0), description="area of the random crop, as a fraction")
    crop_ratio: tuple[float, float] = Field(default=(0.75, 4 / 3), description="its width over height")
    resize_to: int | None = Field(
        default=None,
        ge=1,
        description="squash the image to a square of this side and cut the input's size out of it, at random, instead "
        "of the crop that crop_scale and crop_ratio describe",
    )
    flip: bool = Field(default=False, description="mirror half the images; wrong where a text says left or right")
    color_jitter: tuple[float, float, float, float] = Field(
        default=(0.0, 0.0, 0.0, 0.0), description="strength of brightness, contrast, saturation, hue (at most 0.5)"
    )
    jitter_p: float = Field(default=1.0, ge=0, le=1, description="share of the images whose colours are jittered")
    rand_augment: str | None = Field(
        default=None,
        description="RandAugment in timm's words, for instance rand-m9-mstd0.5-inc1, before color_jitter; it changes "
        "colours and places, so it is wrong where a text names them; None: none",
    )
    random_erasing: float = Field(default=0.0, ge=0, le=1, description="share of the images with an erased rectangle")
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    @model_validator(mode="after")
    def _are_possible(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: expected 0 < smallest <= largest <= 1, got {list(self.crop_scale)}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf:
            raise ValueError(f"crop_ratio: expected 0 < smallest <= largest, got {list(self.crop_ratio)}")
        if not all(0 <= strength < math.inf for strength in self.color_jitter):
            raise ValueError(f"color_jitter: strengths are not negative, got {list(self.color_jitter)}")
        if self.color_jitter[3] > _MAX_HUE:
            raise ValueError(f"color_jitter: the hue's strength is at most {_MAX_HUE}, got {self.color_jitter[3]}")
        if self.rand_augment is not None:
            check_words(self.rand_augment)
        return self


class EvalTransform:
    """Resize and centre crop as torchvision and open_clip do on PIL images, pixel for pixel."""

    def __init__(self, pre: Preprocess) -> None:
        self.pre = pre
        self._mode = InterpolationMode(pre.interpolation)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """An RGB image as ``uint8`` CHW."""
        pre = self.pre
        size = self._resized(image)
        if (image.height, image.width) != tuple(size):
            image = tf.resize(image, size, interpolation=self._mode)
        if (image.height, image.width) != pre.image_size:
            image = tf.center_crop(image, list(pre.image_size))
        return tf.pil_to_tensor(image)

    def view(self, image: Image.Image) -> View:
        """Which part of ``image`` the tensor shows: what moves its boxes along."""
        height, width = self._resized(image)
        size = high, wide = self.pre.image_size
        # torchvision's centre: rounded to even. An image smaller than the crop is padded, by less than zero here.
        top, left = (round((whole - part) / 2) for whole, part in ((height, high), (width, wide)))
        down, across = image.height / height, image.width / width
        return View(left * across, top * down, wide * across, high * down, size, flipped=False)

    def _resized(self, image: Image.Image) -> list[int]:
        """Height and width after the resize."""
        pre, (height, width) = self.pre, (image.height, image.width)
        target_h, target_w = pre.image_size
        if pre.resize == "squash":
            return [pre.resize_to, pre.resize_to] if pre.resize_to else [target_h, target_w]
        if pre.resize_to is None and target_h != target_w:
            # open_clip's rule for a rectangle: the smallest image that covers it.
            ratio = min(height / target_h, width / target_w)
            return [round(height / ratio), round(width / ratio)]
        short = pre.resize_to or target_h
        # torchvision's rounding: the long side is cut, not rounded.
        return [short, int(short * width / height)] if height <= width else [int(short * height / width), short]


def eval_transform(pre: Preprocess) -> EvalTransform:
    """The transform that belongs to a backbone: RGB PIL image → ``uint8`` CHW. It can be pickled."""
    return EvalTransform(pre)


def normalise(images_BCHW: torch.Tensor, pre: Preprocess) -> torch.Tensor:
    """``uint8`` images as normalised ``float32``, on the device where they are; equal to ToTensor, then Normalize."""
    mean = torch.tensor(pre.mean, dtype=torch.float32, device=images_BCHW.device).view(-1, 1, 1)
    std = torch.tensor(pre.std, dtype=torch.float32, device=images_BCHW.device).view(-1, 1, 1)
    return images_BCHW.to(torch.float32).div_(255).sub_(mean).div_(std)


@dataclass(frozen=True, slots=True)
class View:
    """Which part of an image a training sample shows."""

    left: float
    top: float
    width: float
    height: float
    """The crop, in pixels of the image; whole ones unless the image was squashed first."""
    size: tuple[int, int]
    """Height and width that it was resized to."""
    flipped: bool
    """Whether it was then mirrored."""

    def box(self, box_xyxy: Sequence[float]) -> tuple[float, float, float, float]:
        """A box of the image in pixels of the view, cut at its edges: empty where the crop has left nothing of it."""
        high, wide = self.size
        x1, x2 = (min(max((x - self.left) / self.width, 0.0), 1.0) * wide for x in (box_xyxy[0], box_xyxy[2]))
        y1, y2 = (min(max((y - self.top) / self.height, 0.0), 1.0) * high for y in (box_xyxy[1], box_xyxy[3]))
        return (wide - x2, y1, wide - x1, y2) if self.flipped else (x1, y1, x2, y2)

    def regions(self, regions: Iterable[Region]) -> tuple[Region, ...]:
        """Those of which the view shows at least a pixel each way, with their boxes there; masks stay behind."""
        moved = (replace(region, box_xyxy=self.box(region.box_xyxy), segmentation=None) for region in regions)
        return tuple(region for region in moved if _least_side(region.box_xyxy) >= 1)


def _least_side(box_xyxy: Sequence[float]) -> float:
    return min(box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1])


def augment(
    image: Image.Image,
    rng: np.random.Generator,
    augment: Augment,
    size: tuple[int, int],
    *,
    fill: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> tuple[torch.Tensor, View]:
    """One random view of an RGB image. All randomness comes from ``rng``.

    Args:
        image: RGB.
        rng: the generator of this sample.
        augment: what to do.
        size: height, width of the view.
        fill: the colour, from 0 to 1, that ``rand_augment`` puts where nothing of the view is left.

    Returns:
        The view as ``uint8`` CHW, and which part of the image it is, but for what ``rand_augment`` has moved.
    """
    resample = Image.Resampling.BICUBIC if augment.interpolation == "bicubic" else Image.Resampling.BILINEAR
    if augment.resize_to is None:
        top, left, height, width = _crop(image, rng, augment)
        view = image.crop((left, top, left + width, top + height)).resize((size[1], size[0]), resample)
        crop: tuple[float, float, float, float] = (left, top, width, height)
    else:
        view, crop = _crop_of_square(image, rng, augment.resize_to, size, resample)
    flipped = augment.flip and rng.random() < 0.5
    if flipped:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.rand_augment is not None:
        view = rand_augment(view, rng, augment.rand_augment, resample=resample, fill=fill)
    if any(augment.color_jitter) and rng.random() < augment.jitter_p:
        view = _jitter(view, rng, augment.color_jitter)
    view_CHW = tf.pil_to_tensor(view)
    if augment.random_erasing and rng.random() < augment.random_erasing:
        _erase(view_CHW, rng)
    return view_CHW, View(*crop, size=size, flipped=bool(flipped))


def _crop(image: Image.Image, rng: np.random.Generator, augment: Augment) -> tuple[int, int, int, int]:
    """Top, left, height, width of torchvision's RandomResizedCrop: area uniform, aspect log-uniform, ten attempts."""
    area = image.height * image.width
    log_ratio = (math.log(augment.crop_ratio[0]), math.log(augment.crop_ratio[1]))
    for _ in range(_CROP_ATTEMPTS):
        target = area * rng.uniform(*augment.crop_scale)
        ratio = math.exp(rng.uniform(*log_ratio))
        width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            top = int(rng.integers(image.height - height + 1))
            left = int(rng.integers(image.width - width + 1))
            return top, left, height, width
    # Where nothing fits: the largest centred crop whose aspect is allowed.
    ratio = min(max(image.width / image.height, augment.crop_ratio[0]), augment.crop_ratio[1])
    width = max(1, min(image.width, round(image.height * ratio)))
    height = max(1, min(image.height, round(width / ratio)))
    return (image.height - height) // 2, (image.width - width) // 2, height, width


def _crop_of_square(
    image: Image.Image, rng: np.random.Generator, side: int, size: tuple[int, int], resample: Image.Resampling
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A crop of ``size`` out of the image squashed to a square; and its left, top, width, height in the image."""
    assert max(size) <= side, f"a crop of {size} is not in a square of {side}"
    height, width = size
    top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
    view = image.resize((side, side), resample).crop((left, top, left + width, top + height))
    across, down = image.width / side, image.height / side
    return view, (left * across, top * down, width * across, height * down)


def _jitter(image: Image.Image, rng: np.random.Generator, strength: tuple[float, ...]) -> Image.Image:
    """ColorJitter as torchvision's: brightness, contrast, saturation and hue in random order."""
    adjust = (tf.adjust_brightness, tf.adjust_contrast, tf.adjust_saturation, tf.adjust_hue)
    for which in rng.permutation(4):
        amount = strength[which]
        if amount:
            centre = 0.0 if which == 3 else 1.0
            image = adjust[which](image, float(rng.uniform(max(centre - amount, centre - 1.0), centre + amount)))
    return image


def _erase(image_CHW: torch.Tensor, rng: np.random.Generator) -> None:
    """Fill one rectangle with uniform noise, in place (Zhong et al. 2020: area 2 to 33%, aspect 0.3 to 3.3)."""
    _, height, width = image_CHW.shape
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = rng.integers(0, 256, size=(image_CHW.shape[0], h, w), dtype=np.uint8)
            image_CHW[:, top : top + h, left : left + w] = torch.from_numpy(noise)
            return
