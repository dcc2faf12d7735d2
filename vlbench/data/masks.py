"""COCO's segmentations as bitmaps and back, and what can be wrong with one.

A segmentation is a list of polygons, run lengths as numbers, or run lengths as a string (compressed). What follows
works on the last form alone, ``{"size": [height, width], "counts": str}``: it is small, it is JSON, and every program
that reads COCO's files knows it. faster-coco-eval turns one form into another with COCO's own C code, so that a
polygon covers the very pixels that pycocotools gives it; that code trusts its input, so everything is checked first.

H height, W width, K masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from vlbench.core.errors import BadExample

Rle: TypeAlias = dict[str, Any]
"""Compressed run lengths: ``{"size": [height, width], "counts": str}``."""

FEWEST_NUMBERS = 6
"""Of a polygon: three points."""
BESIDE_IMAGE = 1.0
"""Pixels that a box may reach beyond its image: annotators' corners are rounded."""

BAD_MASK = "bad mask"
BAD_BOX = "bad box"


# ------------------------------------------------------------------------------------------------------ checks


def box_problem(box: Any, height: int | None = None, width: int | None = None) -> str | None:
    """What is wrong with COCO's ``[left, top, width, height]``, in words; None where nothing is.

    A box without area is no mistake: COCO has some. Sides of the image that are not known are not checked against.
    """
    said = f"bbox {box!r:.100}"
    if not isinstance(box, list | tuple) or len(box) != 4 or not set(map(type, box)) <= {int, float}:
        return f"{said} is not [left, top, width, height]"
    left, top, across, down = box
    if not math.isfinite(left + top + across + down):
        return f"{said} has a number that is not finite"
    if across < 0 or down < 0:
        return f"{said} has a negative size"
    right = math.inf if width is None else width + BESIDE_IMAGE
    bottom = math.inf if height is None else height + BESIDE_IMAGE
    if left < -BESIDE_IMAGE or top < -BESIDE_IMAGE or left + across > right or top + down > bottom:
        return f"{said} reaches outside its image of {_size(height, width)}"
    return None


def mask_problem(segmentation: Any, height: int | None = None, width: int | None = None) -> str | None:
    """What is wrong with a segmentation, in words; None where nothing is. Absent and empty ones are right."""
    if not segmentation:
        return None
    if isinstance(segmentation, Mapping):
        return _rle_problem(segmentation, height, width)
    if not isinstance(segmentation, list | tuple):
        return f"segmentation {str(segmentation)[:40]!r} is neither polygons nor run lengths"
    for polygon in segmentation:
        problem = _polygon_problem(polygon, height, width)
        if problem is not None:
            return problem
    return None


def _polygon_problem(polygon: Any, height: int | None, width: int | None) -> str | None:
    if not isinstance(polygon, list | tuple) or not set(map(type, polygon)) <= {int, float}:
        return f"polygon {str(polygon)[:40]!r} is not a list of numbers"
    if len(polygon) < FEWEST_NUMBERS:
        return f"a polygon of {len(polygon)} numbers: three points are the fewest, x and y of each"
    if len(polygon) % 2:
        return f"a polygon of {len(polygon)} numbers: x and y of each point make an even number"
    if not math.isfinite(sum(polygon)):
        return "a polygon with a number that is not finite"
    # Points a little outside are cut off. One far outside is of another image, and drawing to it takes all memory.
    sides = [side for side in (height, width) if side is not None]
    if sides and (min(polygon) < -min(sides) or max(polygon) > 2 * max(sides)):
        return f"a polygon from {min(polygon):g} to {max(polygon):g} in an image of {_size(height, width)}"
    return None


def _rle_problem(rle: Mapping[str, Any], height: int | None, width: int | None) -> str | None:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2 or any(type(n) is not int or n < 0 for n in size):
        return f"run lengths of size {size!r}, which is not [height, width]"
    for found, side in zip(size, (height, width), strict=True):
        if side is not None and found != side:
            return f"run lengths of size {list(size)}, but the image is {_size(height, width)}"
    try:
        runs = run_lengths(counts)
    except ValueError as error:
        return str(error)
    if runs and min(runs) < 0:
        return f"run lengths with a negative run, {min(runs)}"
    if sum(runs) != size[0] * size[1]:
        return f"run lengths that add up to {sum(runs)}, not to {size[0]} x {size[1]} = {size[0] * size[1]} pixels"
    return None


def run_lengths(counts: Any) -> list[int]:
    """Runs of 0 and 1 in turn, column by column, from a list of numbers or COCO's string.

    In the string a run is written in groups of five bits, the lowest first, each as one character from ``0`` on, with
    32 added where more follow and the sign in the last; from the third run on, it is what the run has more than the one
    before last.

    Raises:
        ValueError: where it is neither, saying so.
    """
    if isinstance(counts, list | tuple):
        if not set(map(type, counts)) <= {int}:
            raise ValueError("run lengths that are not all whole numbers")
        return list(counts)
    if not isinstance(counts, str | bytes):
        raise ValueError(f"run lengths {str(counts)[:40]!r}: neither a list nor a string")
    data = counts.encode("utf-8") if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for byte in data:
        bits = byte - ord("0")
        if not 0 <= bits < 64:
            raise ValueError(f"run lengths with the character {chr(byte)!r}, which COCO's strings do not have")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("run lengths that end within a number")
    return runs


# --------------------------------------------------------------------------------------------------- conversion


def to_rle(segmentation: Any, height: int, width: int, *, where: str) -> Rle:
    """Any of COCO's three forms as compressed run lengths; several polygons are joined.

    Args:
        segmentation: not empty.
        height: of the image.
        width: of the image.
        where: the file and annotation, for the message.

    Raises:
        BadExample: where it is malformed or of another size.
    """
    from faster_coco_eval.core import mask as api

    problem = mask_problem(segmentation, height, width) if segmentation else "no polygon and no run lengths"
    if problem is not None:
        raise BadExample(BAD_MASK, where, problem)
    if not isinstance(segmentation, Mapping):
        polygons = [[float(number) for number in polygon] for polygon in segmentation]
        return _plain(api.merge(api.frPyObjects(polygons, height, width)))
    counts = segmentation["counts"]
    if isinstance(counts, str | bytes):
        return _plain({"size": [height, width], "counts": counts})
    return _plain(api.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width))


def to_bitmap(rle: Mapping[str, Any]) -> np.ndarray:
    """``mask_HW``, bool."""
    mask_HW: np.ndarray = to_bitmaps([rle])[0]
    return mask_HW


def to_bitmaps(rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """``masks_KHW``, bool, of compressed run lengths of one size. Raises ValueError for none: their size is unknown."""
    from faster_coco_eval.core import mask as api

    if not rles:
        raise ValueError("no mask: its height and width are not known")
    masks_KHW: np.ndarray = np.ascontiguousarray(np.moveaxis(api.decode([dict(rle) for rle in rles]), 2, 0)) != 0
    return masks_KHW


def from_bitmap(mask_HW: np.ndarray) -> Rle:
    """Compressed run lengths of one mask; anything but 0 is inside."""
    return from_bitmaps(np.asarray(mask_HW)[None])[0]


def from_bitmaps(masks_KHW: np.ndarray) -> list[Rle]:
    """Compressed run lengths of K masks."""
    from faster_coco_eval.core import mask as api

    masks = np.asarray(masks_KHW)
    assert masks.ndim == 3, f"masks of shape {masks.shape}, not (K, height, width)"
    if not len(masks):
        return []
    return [_plain(rle) for rle in api.encode(np.asfortranarray(np.moveaxis(masks != 0, 0, 2).astype(np.uint8)))]


def areas_of(rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(K,) int64: pixels inside."""
    from faster_coco_eval.core import mask as api

    return np.asarray(api.area([dict(rle) for rle in rles]) if rles else [], dtype=np.int64)


def boxes_of(rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(K, 4) float64: left, top, right, bottom of each mask's pixels; zeros for an empty mask."""
    from faster_coco_eval.core import mask as api

    boxes_K4 = np.asarray(api.toBbox([dict(rle) for rle in rles]) if rles else np.zeros((0, 4)), dtype=np.float64)
    boxes_K4[:, 2:] += boxes_K4[:, :2]
    return boxes_K4


def _plain(rle: Mapping[str, Any]) -> Rle:
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else str(counts),
    }


def _size(height: int | None, width: int | None) -> str:
    return f"{'?' if height is None else height} x {'?' if width is None else width} pixels (height x width)"
