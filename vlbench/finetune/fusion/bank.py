"""Frozen features of a set of images, as arrays from which batches are gathered.

What is larger than ``IN_MEMORY`` lies in a file of the cache, mapped into memory: batches then read what they need.

Shapes: N questions, V images of each, K distinct images, M regions of all of them together, B questions of a batch,
R regions of an image at most, F width of a region's feature, P of the whole image's.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlbench.core.paths import cache_dir

IN_MEMORY = 1 << 30
"""Bytes of an array that is kept in memory."""
_CHUNK = 1 << 27
"""Bytes that are moved at once."""


@dataclass(frozen=True)
class RegionBank:
    """Regions of distinct images and which image each question is about."""

    features_MF: np.ndarray
    pooled_KP: np.ndarray | None
    box_M5: np.ndarray
    """Relative: see ``data.regions.features.box_vector``."""
    start_K1: np.ndarray
    """The regions of image k are ``start_K1[k]`` to ``start_K1[k + 1]``."""
    image_NV: np.ndarray
    """The image, of the K, of each view of each question."""
    parts: tuple[int, ...]
    """Widths of the maps that a feature was read from."""

    def counts(self) -> np.ndarray:
        """``(N, V)``: regions of each image of each question."""
        counts: np.ndarray = np.diff(self.start_K1)[self.image_NV]
        return counts

    def gather(self, questions: Sequence[int], *, most: int) -> dict[str, np.ndarray]:
        """``features_BVRF``, ``box_BVR5``, ``valid_BVR`` and, where there is one, ``pooled_BVP``.

        R is the largest number of regions of these images, at least 1 and at most ``most``; padding is 0.
        """
        image_BV = self.image_NV[np.asarray(questions, dtype=np.int64)]
        count_BV = np.minimum(np.diff(self.start_K1)[image_BV], most)
        place_R = np.arange(max(1, int(count_BV.max(initial=0))))
        valid_BVR = place_R < count_BV[..., None]
        row_BVR = np.where(valid_BVR, self.start_K1[image_BV][..., None] + place_R, 0)
        found = {"valid_BVR": valid_BVR}
        for name, rows in (("features_BVRF", self.features_MF), ("box_BVR5", self.box_M5)):
            values = np.zeros((*valid_BVR.shape, rows.shape[1]), dtype=np.float32)
            values[valid_BVR] = rows[row_BVR[valid_BVR]]
            found[name] = values
        if self.pooled_KP is not None:
            found["pooled_BVP"] = np.asarray(self.pooled_KP[image_BV], dtype=np.float32)
        return found


def room(rows: int, width: int) -> np.ndarray:
    """An empty float32 array: in memory or, where it is large, in a file that goes with the process."""
    if 4 * rows * width <= IN_MEMORY:
        return np.empty((rows, width), dtype=np.float32)
    folder = cache_dir() / "finetune"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"features-{uuid.uuid4().hex}.f32"
    array: np.ndarray = np.memmap(path, dtype=np.float32, mode="w+", shape=(rows, width))
    path.unlink()  # what is mapped stays until nobody maps it, however the process ends
    return array


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows that are moved at once."""
    step = max(1, _CHUNK // (4 * max(1, width)))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
