"""Training images with their objects, flipped and resized in loader processes: a pure function of seed and position.

Crowds are no objects to be learnt, and images without objects are left out where the settings say so. Polygons are
scaled and then drawn, so that a mask is as sharp as the resized image is.

Shapes: n objects of an image, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as tf

from vlbench.core.errors import BadExample, UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Example, Region, Source
from vlbench.data.images import decode
from vlbench.data.masks import to_bitmap, to_rle
from vlbench.data.sources import Subset
from vlbench.data.stream import Mixture
from vlbench.finetune.detection.batch import Batch, Pictured, collate
from vlbench.finetune.detection.config import DetectionConfig
from vlbench.finetune.detection.neck import DIVISOR
from vlbench.finetune.detection.sizes import target_size
from vlbench.train.batches import stream
from vlbench.train.distributed import Ranks

_LEAST_SIDE = 1.0
"""Pixels: an image all of whose boxes have a side that is no longer has no objects [TV:coco_utils.py]."""
_THINNEST = 0.01
"""Pixels of the resized image: what is thinner is no object. In float32 a side may be 0, and its log is learnt."""


class DetectionFeed:
    """The images of one source, as the training loop asks for them.

    Args:
        source: with regions and classes.
        config: the settings.

    Raises:
        UserError: for a source without classes, in which no image has an object, or no object a mask.
    """

    def __init__(self, source: Source, config: DetectionConfig) -> None:
        if not source.classes or "regions" not in source.provides:
            raise UserError(f"data {source.spec!r} have no boxes with classes to learn from")
        _refuse_bare_boxes(source)
        if config.empty_images == "drop":
            keep = [index for index in range(len(source)) if _worth_showing(source, index)]
            if not keep:
                raise UserError(f"data {source.spec!r}: no image of {source.split!r} has an object")
            source = Subset(source, keep, split=source.split)
        self.source = source
        self.classes = tuple(source.classes or ())
        self.data = Mixture(
            [source], seed=config.seed, block=config.batch_size, max_bad=config.max_bad, needs=frozenset({"image"})
        )
        self.tally = self.data.tally

    def __len__(self) -> int:
        return len(self.data)

    def identity(self) -> list[dict[str, Any]]:
        """Ids and classes of the images that are learnt from."""
        return [
            {
                "spec": self.source.spec,
                "examples": len(self.source),
                "classes": fingerprint(list(self.classes)),
                "ids": fingerprint(list(self.source.ids())),
            }
        ]

    def batches(self, recipe: Any, config: DetectionConfig, *, start: int, here: Ranks, pin: bool) -> Iterator[Batch]:
        """Batches of this rank from step ``start`` on: see ``batch.py``."""
        return stream(
            partial(self.data.sample, make=partial(_drawn, self.classes, config)),
            partial(collate, divisor=DIVISOR),
            config,
            tally=self.tally,
            start=start,
            here=here,
            pin=pin,
        )


def _drawn(
    classes: Sequence[str], config: DetectionConfig, example: Example, label: int, rng: np.random.Generator
) -> Pictured:
    # Both are drawn whatever is done with them: a setting must not shift the numbers of another.
    flip, short = rng.random() < 0.5, int(rng.integers(len(config.short_sides)))
    return picture(
        example,
        classes,
        short_side=config.short_sides[short],
        long_side=config.long_side,
        flip=bool(flip and config.flip),
    )


def picture(example: Example, classes: Sequence[str], *, short_side: int, long_side: int, flip: bool) -> Pictured:
    """One image of its target size with the objects to be learnt, mirrored with them where ``flip``.

    Raises:
        BadExample: for an image that cannot be decoded or is of another size than its annotations say, a class that is
            unknown, a mask that is malformed or missing.
    """
    assert example.image is not None, "a source of regions has images"
    image = decode(example.image, where=example.id)
    _check_size(example, image)
    height, width = target_size(image.height, image.width, short_side, long_side)
    boxes, labels, masks = [], [], []
    for number, region in enumerate(example.regions):
        if not _is_object(region):
            continue
        box = _box(region, image, (height, width), flip=flip)
        left, top, right, bottom = np.float32(box)
        if min(right - left, bottom - top) < _THINNEST:
            continue
        boxes.append(box)
        labels.append(_class_of(example, number, classes))
        masks.append(_mask(region, image, (height, width), flip=flip, where=example.id))
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    if flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Pictured(
        image_CHW=tf.pil_to_tensor(resized),
        boxes_n4=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        classes_n=np.array(labels, dtype=np.int64),
        masks_nHW=np.stack(masks) if masks else np.zeros((0, height, width), dtype=np.uint8),
    )


def _refuse_bare_boxes(source: Source) -> None:
    """Raises UserError where there are objects and none of them has a mask: each would be one more bad example."""
    bare = 0
    for index in range(len(source)):
        objects = [region for region in _regions(source, index) or () if _is_object(region)]
        if any(region.segmentation for region in objects):
            return
        bare += len(objects)
    if bare:
        raise UserError(
            f"data {source.spec!r}: none of the {bare:,} objects of {source.split!r} has a mask, and Mask R-CNN learns "
            "from masks; give the annotations a 'segmentation'"
        )


def _worth_showing(source: Source, index: int) -> bool:
    regions = _regions(source, index)
    if regions is None:
        return True  # a bad example is met, counted and replaced where it is drawn
    return any(_is_object(region) and min(_sides(region)) > _LEAST_SIDE for region in regions)


def _regions(source: Source, index: int) -> Sequence[Region] | None:
    """The regions of an entry; None of a bad one."""
    look = getattr(source, "regions_of", None)  # COCO's reader knows them without reading the image
    try:
        return look(index) if look is not None else source[index].regions
    except BadExample:
        return None


def _check_size(example: Example, image: Image.Image) -> None:
    said = example.extra.get("height", image.height), example.extra.get("width", image.width)
    if said != (image.height, image.width):
        raise BadExample(
            "other size",
            example.id,
            f"{image.height} x {image.width} pixels (height x width), where its annotations say {said[0]} x {said[1]}",
        )


def _is_object(region: Region) -> bool:
    return not region.attributes.get("iscrowd")


def _sides(region: Region) -> tuple[float, float]:
    left, top, right, bottom = region.box_xyxy
    return right - left, bottom - top


def _class_of(example: Example, number: int, classes: Sequence[str]) -> int:
    known = example.extra.get("categories")  # two categories may have one name
    if known is not None:
        return int(known[number])
    category = example.regions[number].category
    if category not in classes:
        raise BadExample("missing class", example.id, f"{category!r} is not among the classes")
    return classes.index(category)


def _box(region: Region, image: Image.Image, size: tuple[int, int], *, flip: bool) -> tuple[float, ...]:
    """The box in pixels of the resized image, cut at its edges."""
    height, width = size
    across, down = width / image.width, height / image.height
    left, top, right, bottom = region.box_xyxy
    left, right = (min(max(x * across, 0.0), width) for x in (left, right))
    top, bottom = (min(max(y * down, 0.0), height) for y in (top, bottom))
    return (width - right, top, width - left, bottom) if flip else (left, top, right, bottom)


def _mask(region: Region, image: Image.Image, size: tuple[int, int], *, flip: bool, where: str) -> np.ndarray:
    """``mask_HW`` uint8 of the resized image."""
    height, width = size
    segmentation = region.segmentation
    if segmentation and not isinstance(segmentation, Mapping):
        to_rle(segmentation, image.height, image.width, where=where)  # raises what is wrong, in its own pixels
        scale = (width / image.width, height / image.height)
        scaled = [[number * scale[i % 2] for i, number in enumerate(polygon)] for polygon in segmentation]
        mask_HW = to_bitmap(to_rle(scaled, height, width, where=where))
    else:
        stored_HW = to_bitmap(to_rle(segmentation, image.height, image.width, where=where))
        mask_HW = stored_HW[_nearest(image.height, height)][:, _nearest(image.width, width)]
    return (mask_HW[:, ::-1] if flip else mask_HW).astype(np.uint8)


def _nearest(old: int, new: int) -> np.ndarray:
    """For each new row, the old one under its middle."""
    return np.minimum((np.arange(new) + 0.5) * (old / new), math.nextafter(old, 0)).astype(np.int64)
