"""Accuracy of a box that a phrase points to: right where it overlaps the target by more than half (IoU > 0.5).

Boxes are corners ``left, top, right, bottom`` in pixels, of width ``right - left``. The evaluation code around
RefCOCO takes ``left, top, width, height`` and counts pixels inclusively, which is the same area. Some of it counts an
IoU of just 0.5 as a hit; here, as in mu-VLA's code, it must be more.

N phrases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlbench.core.types import Outcomes
from vlbench.stats.grouped import by_group

IOU = 0.5


def box_iou(boxes_N4: ArrayLike, others_N4: ArrayLike) -> NDArray[np.float64]:
    """(N,) intersection over union of each box with its other; 0 where both are empty.

    Args:
        boxes_N4: corners, right not left of left and bottom not above top.
        others_N4: likewise.
    """
    one, other = np.asarray(boxes_N4, dtype=np.float64), np.asarray(others_N4, dtype=np.float64)
    assert one.shape == other.shape, f"boxes {one.shape} and {other.shape} are not in pairs"
    assert one.shape == (len(one), 4), f"boxes are (N, 4), got {one.shape}"
    inner_N2 = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    shared_N = np.clip(inner_N2, 0, None).prod(axis=1)
    union_N = (one[:, 2:] - one[:, :2]).prod(axis=1) + (other[:, 2:] - other[:, :2]).prod(axis=1) - shared_N
    iou_N: NDArray[np.float64] = np.divide(shared_N, union_N, out=np.zeros(len(one)), where=union_N > 0)
    return iou_N


def grounding_outcomes(
    ids: Sequence[str],
    chosen_N4: ArrayLike,
    target_N4: ArrayLike,
    *,
    images: Sequence[str],
    splits: Sequence[str],
) -> dict[str, Outcomes]:
    """``accuracy`` over all phrases and ``accuracy/SPLIT`` for each split (``val``, ``testA``, ``testB``).

    Args:
        ids: N ids of phrases.
        chosen_N4: the box that the model points to.
        target_N4: the box that is meant.
        images: the image of each phrase, which is the sampling unit.
        splits: the split of each phrase.
    """
    right_N = (box_iou(chosen_N4, target_N4) > IOU).astype(np.float64)
    return by_group("accuracy", Outcomes(list(ids), right_N, list(images), binary=True), splits)
