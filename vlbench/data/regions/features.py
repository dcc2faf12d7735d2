"""What every source of region features gives, whatever its format, and the box vector that goes with each region.

N regions, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vlbench.core.errors import BadExample

BAD_REGIONS = "bad region features"
_SLACK = 1.0
"""Pixels by which a box may leave its image: detectors round, and some count the last pixel in."""


@dataclass(frozen=True, slots=True)
class RegionFeatures:
    """The regions of one image."""

    features_ND: np.ndarray
    """float32."""
    boxes_N4: np.ndarray
    """float32, corners in pixels: left, top, right, bottom; inside the image."""
    tags: tuple[str, ...]
    """The class of each region; empty where the file does not say."""
    scores_N: np.ndarray | None
    """float32, the detector's confidence; None where the file does not say."""
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.boxes_N4)

    def box_vectors(self) -> np.ndarray:
        """``box_N5`` of the regions: see ``box_vector``."""
        return box_vector(self.boxes_N4, self.width, self.height)


class RegionStore(Protocol):
    """Region features by image id."""

    def __len__(self) -> int: ...

    def __contains__(self, image_id: object) -> bool: ...

    def __getitem__(self, image_id: str) -> RegionFeatures:
        """Raises KeyError for an id that is not there, BadExample for one whose entry is damaged."""

    def tags(self, image_id: str) -> tuple[str, ...]:
        """The class of each region, none where the file says none; no feature is decoded. Raises as ``[image_id]``."""

    def ids(self) -> Sequence[str]:
        """All ids, in the order of the file."""


def box_vector(boxes_N4: Any, width: float, height: float) -> np.ndarray:
    """``box_N5`` float32: [x1/W, y1/H, x2/W, y2/H, area/(WH)], as mu-VLA embeds boxes [M:processors.py].

    Args:
        boxes_N4: corners in pixels: left, top, right, bottom.
        width: of the image in pixels.
        height: of the image in pixels.
    """
    assert width > 0, f"an image is {width} wide"
    assert height > 0, f"an image is {height} high"
    boxes = np.asarray(boxes_N4, dtype=np.float64).reshape(-1, 4)
    sides = np.array([width, height, width, height], dtype=np.float64)
    area_N = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (width * height)
    return np.concatenate([boxes / sides, area_N[:, None]], axis=1).astype(np.float32)


def checked_regions(
    features: Any, boxes: Any, *, size: tuple[Any, Any], where: str, tags: Sequence[str] = (), scores: Any = None
) -> RegionFeatures:
    """Region features that were looked at: lengths agree, numbers are finite, boxes lie in the image.

    Args:
        features: ``(N, D)`` numbers.
        boxes: ``(N, 4)`` corners in pixels. One that leaves the image by a pixel or less is cut to it.
        size: width and height of the image.
        where: file and id, for the error.
        tags: one a region, or none at all.
        scores: one a region, or None.

    Raises:
        BadExample: ``bad region features``, with what is wrong.
    """

    def bad(reason: str) -> BadExample:
        return BadExample(BAD_REGIONS, where, reason)

    features_ND = _numbers(features, "features", bad)
    boxes_N4 = _numbers(boxes, "boxes", bad)
    if not boxes_N4.size:
        boxes_N4 = boxes_N4.reshape(0, 4)
    if features_ND.ndim != 2 or boxes_N4.ndim != 2 or boxes_N4.shape[1] != 4:
        raise bad(f"features of shape {features_ND.shape} and boxes of shape {boxes_N4.shape}, not (N, D) and (N, 4)")
    scores_N = None if scores is None else _numbers(scores, "scores", bad).reshape(-1)
    lengths = {"features": len(features_ND), "boxes": len(boxes_N4)}
    lengths |= {"tags": len(tags)} if len(tags) else {}
    lengths |= {"scores": len(scores_N)} if scores_N is not None else {}
    if len(set(lengths.values())) > 1:
        raise bad("not one of each for every region: " + ", ".join(f"{n} {what}" for what, n in lengths.items()))
    try:
        width, height = (int(side) for side in size)
    except (TypeError, ValueError):
        raise bad(f"the size of the image is {size[0]!r} x {size[1]!r}, not two numbers") from None
    if width <= 0 or height <= 0:
        raise bad(f"an image of {width} x {height} pixels")
    limits = np.array([width, height, width, height], dtype=np.float32)
    for row, box in enumerate(boxes_N4):
        if (box < -_SLACK).any() or (box > limits + _SLACK).any():
            raise bad(f"box {row} {box.tolist()} lies outside the image of {width} x {height} pixels")
        if box[2] < box[0] or box[3] < box[1]:
            raise bad(f"box {row} {box.tolist()} is not left, top, right, bottom")
    boxes_N4 = np.clip(boxes_N4, 0, limits)
    return RegionFeatures(features_ND, boxes_N4, tuple(map(str, tags)), scores_N, width, height)


def _numbers(values: Any, what: str, bad: Any) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise bad(f"its {what} are not numbers, or rows of different lengths") from None
    if not np.isfinite(array).all():
        raise bad(f"its {what} hold {int((~np.isfinite(array)).sum())} numbers that are not finite")
    return array
