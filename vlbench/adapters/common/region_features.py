"""Frozen features of parts of images, each distinct image once: at the cells of a grid, or at given boxes.

As with whole images (``adapters/encoder.py``), what was ever computed for a backbone and the content of an image is
read from the feature store, and what is missing is decoded, encoded and appended shard by shard, divided over the
processes of a call. The image is squashed to the backbone's input, so that nothing of it is cut away.

A grid is one row of a table by image, its cells one after the other; a box is a row by image and box, so that a set of
images with other boxes finds those that it has in common with an earlier one.

Shapes: N questions, V images of each, K distinct images, M regions of all of them, B batch, R regions of an image, F
width of a region's feature, P of the whole image's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vlbench.adapters.encoder import SHARD_SECONDS
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest
from vlbench.core.types import Source

if TYPE_CHECKING:
    import torch

    from vlbench.finetune.fusion.bank import RegionBank
    from vlbench.finetune.fusion.views import Squash
    from vlbench.models.roi import DeepestMaps

SHARD_BYTES = 1 << 26
"""Features are appended to the store at this size: a shard is held in memory, and a kill loses one."""


@dataclass(frozen=True)
class _Image:
    """One image with its boxes, and where it can be read."""

    digest: str
    source: Source
    index: int
    boxes: np.ndarray | None
    """``(R, 4)`` in pixels of the stored image; None: a grid."""

    @property
    def key(self) -> str:
        """What tells it from every other entry."""
        return self.digest if self.boxes is None else digest(f"{self.digest} {self.boxes.tolist()}".encode())

    def rows(self) -> list[str]:
        """The keys of its rows in the table of regions."""
        if self.boxes is None:
            return [self.digest]
        return [digest(f"{self.digest} {box}".encode()) for box in self.boxes.tolist()]


def region_features(
    encoder: Any,
    views: Sequence[Source],
    *,
    levels: int,
    cells: int,
    grid: int,
    boxes: Sequence[Sequence[np.ndarray]] | None = None,
    pooled: bool = True,
) -> RegionBank:
    """Features at the regions of all images of ``views``, and of the whole images.

    Args:
        encoder: the Encoder: its backbone, precision, device, workers, store, share and progress.
        views: V sources of N entries each.
        levels: the deepest maps that a region is read from.
        cells: RoIAlign's bins each way, whose mean is taken.
        grid: cells of the image each way, where there are no ``boxes``.
        boxes: of each of the N questions, those of each of its V images, ``(R, 4)`` in pixels of the stored image.
        pooled: whether the feature of the whole image goes along.

    Raises:
        BadExample: where an image cannot be read.
        UserError: for a backbone without feature maps, and for features that are not finite.
    """
    from vlbench.finetune.fusion.bank import RegionBank, chunks, room
    from vlbench.finetune.fusion.views import grid_boxes

    visual = visual_reader(encoder.backbone, levels=levels, cells=cells)
    images, image_NV = _distinct(encoder, views, boxes)
    how = {"levels": levels, "cells": cells} | ({"grid": grid} if boxes is None else {})
    of_regions = encoder.table("cells" if boxes is None else "boxes", **how)
    of_images = encoder.table("squashed images")
    _encode_missing(encoder, visual, images, of_regions, of_images, grid=grid)

    width = sum(visual.parts)
    keys = [row for image in images for row in image.rows()]
    a_row = 1 if boxes is not None else grid**2
    features = room(len(keys), a_row * width)
    places = np.tile(grid_vectors(grid_boxes(grid, width=1, height=1)), (len(images), 1)) if boxes is None else None
    box_M5 = places if places is not None else np.zeros((len(keys), 5), dtype=np.float32)
    for part in chunks(len(keys), a_row * width):
        columns = ("feature",) if boxes is None else ("feature", "box")
        found = of_regions.gather(keys[part], columns)
        features[part] = found["feature"]
        if boxes is not None:
            box_M5[part] = found["box"]
    counts = [a_row if image.boxes is None else len(image.boxes) for image in images]
    return RegionBank(
        features_MF=features.reshape(-1, width),
        pooled_KP=of_images.gather([image.digest for image in images], ("pooled",))["pooled"] if pooled else None,
        box_M5=box_M5,
        start_K1=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        image_NV=image_NV,
        parts=visual.parts,
    )


def visual_reader(backbone: Any, *, levels: int, cells: int) -> DeepestMaps:
    """The backbone's tower, read at boxes; it shares the backbone's weights and is in evaluation mode.

    Raises:
        UserError: where the backbone has no image tower, or no maps.
    """
    from vlbench.models.roi import DeepestMaps
    from vlbench.models.tower_of import tower_of

    size = backbone.card.preprocess.image_size
    return DeepestMaps(tower_of(backbone), levels=levels, cells=cells, image_size=size).eval()


def grid_vectors(boxes_R4: np.ndarray) -> np.ndarray:
    """``box_R5`` of boxes in a square of side 1."""
    from vlbench.data.regions.features import box_vector

    return box_vector(boxes_R4, 1, 1)


def _distinct(
    encoder: Any, views: Sequence[Source], boxes: Sequence[Sequence[np.ndarray]] | None
) -> tuple[list[_Image], np.ndarray]:
    """The different images (with different boxes), in the order in which they come first, and which each view is."""
    digests = [encoder.image_digests(source) for source in views]
    place_of: dict[str, int] = {}
    images: list[_Image] = []
    image_NV = np.zeros((len(views[0]), len(views)), dtype=np.int64)
    for question in range(len(views[0])):
        for v, source in enumerate(views):
            own = None if boxes is None else boxes[question][v]
            image = _Image(digests[v][question], source, question, own)
            if image.key not in place_of:
                place_of[image.key] = len(images)
                images.append(image)
            image_NV[question, v] = place_of[image.key]
    return images, image_NV


def _encode_missing(
    encoder: Any, visual: DeepestMaps, images: Sequence[_Image], of_regions: Any, of_images: Any, *, grid: int
) -> None:
    """Append what the two tables lack of the images of this process's share, and wait for the others.

    All images are shared out, not those that are missing: a process that looks later sees less missing, and all must
    divide the same.
    """
    columns = ("feature",) if not images or images[0].boxes is None else ("feature", "box")
    by_key = {image.key: image for image in images}
    with encoder.share("regions", list(by_key)) as mine:
        own = {key: by_key[key].rows() for key in mine}
        absent = set(of_regions.missing([row for rows in own.values() for row in rows], columns))
        whole = set(of_images.missing([by_key[key].digest for key in mine], ("pooled",)))
        queue = [
            by_key[key]
            for key, rows in own.items()
            if by_key[key].digest in whole or any(row in absent for row in rows)
        ]
        encoder.stats.images_reused += len(own) - len(queue)
        began = time.perf_counter()
        if queue:
            _encode(encoder, visual, queue, of_regions, of_images, grid=grid)
            encoder.stats.images_encoded += len(queue)
            encoder.stats.image_seconds += time.perf_counter() - began
    if len(mine) < len(images):
        encoder.require(of_regions, [row for image in images for row in image.rows()], columns)
        encoder.require(of_images, [image.digest for image in images], ("pooled",))


def _encode(
    encoder: Any, visual: DeepestMaps, images: Sequence[_Image], of_regions: Any, of_images: Any, *, grid: int
) -> None:
    from vlbench.data.regions.features import box_vector
    from vlbench.data.transforms import normalise
    from vlbench.finetune.fusion.views import padded

    card, done = encoder.backbone.card, 0
    height, width = card.preprocess.image_size
    shard = _Shard(of_regions, of_images)
    visual = visual.to(encoder.device)
    for images_BCHW, boxes in _decoded(encoder, images, grid):
        here = images[done : done + len(boxes)]
        boxes_BR4, _ = padded(boxes)
        with encoder.mode():
            pixels_BCHW = normalise(images_BCHW.to(encoder.device, non_blocking=True), card.preprocess)
            features_BRF, pooled_BP = visual(pixels_BCHW, boxes_BR4.to(encoder.device))
        features, pooled = features_BRF.float().cpu().numpy(), pooled_BP.float().cpu().numpy()
        for image, own, feature_RF, pooled_P in zip(here, boxes, features, pooled, strict=True):
            _check_finite(card.id, image, feature_RF[: len(own)], pooled_P)
            if image.boxes is None:
                shard.add(image, feature_RF.reshape(1, -1), None, pooled_P)
            else:
                shard.add(image, feature_RF[: len(own)], box_vector(own, width, height), pooled_P)
        done += len(here)
        if shard.is_full() or done == len(images):
            shard.write()
        if encoder.progress:
            encoder.progress(done, len(images))


def _decoded(encoder: Any, images: Sequence[_Image], grid: int) -> Iterator[tuple[torch.Tensor, list[np.ndarray]]]:
    """uint8 ``images_BCHW`` in order, and each one's boxes in their pixels."""
    from vlbench.data.loading import in_batches, loaded
    from vlbench.finetune.fusion.views import Squash

    # Places, not images: each of those would take its source along to the loader process.
    batches = in_batches(range(len(images)), encoder.batch_size)
    return loaded(
        partial(_squashed, images, Squash(encoder.backbone.card.preprocess), grid),
        batches,
        workers=min(encoder.workers, len(batches)),
        pin=encoder.device.startswith("cuda"),
    )


def _squashed(
    images: Sequence[_Image], squash: Squash, grid: int, places: Sequence[int]
) -> tuple[torch.Tensor, list[np.ndarray]]:
    import torch

    found = [squash(image.source, image.index, image.boxes, grid=grid) for image in (images[place] for place in places)]
    return torch.stack([image_CHW for image_CHW, _ in found]), [boxes_R4 for _, boxes_R4 in found]


class _Shard:
    """Features waiting to be appended to both tables."""

    def __init__(self, of_regions: Any, of_images: Any) -> None:
        self.of_regions, self.of_images = of_regions, of_images
        self._clear()

    def _clear(self) -> None:
        self.rows: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self.images: dict[str, np.ndarray] = {}
        self.bytes = 0
        self.began = time.perf_counter()

    def add(self, image: _Image, features: np.ndarray, box: np.ndarray | None, pooled_P: np.ndarray) -> None:
        for number, (row, feature) in enumerate(zip(image.rows(), features, strict=True)):
            self.rows[row] = feature, None if box is None else box[number]
        self.images[image.digest] = pooled_P
        self.bytes += features.nbytes + pooled_P.nbytes

    def is_full(self) -> bool:
        return self.bytes >= SHARD_BYTES or time.perf_counter() - self.began >= SHARD_SECONDS

    def write(self) -> None:
        """Whole images first: an image whose regions are there is complete."""
        self.of_images.append(list(self.images), {"pooled": np.stack(list(self.images.values()))})
        if self.rows:
            columns: dict[str, Any] = {"feature": np.stack([feature for feature, _ in self.rows.values()])}
            if next(iter(self.rows.values()))[1] is not None:
                columns["box"] = np.stack([box for _, box in self.rows.values() if box is not None])
            self.of_regions.append(list(self.rows), columns)
        self._clear()


def _check_finite(model: str, image: _Image, features_RF: np.ndarray, pooled_P: np.ndarray) -> None:
    if not (np.isfinite(features_RF).all() and np.isfinite(pooled_P).all()):
        raise UserError(
            f"{model}: features of {image.source.ids()[image.index]!r} are not finite; check the weights, or run with "
            "--precision fp32"
        )
