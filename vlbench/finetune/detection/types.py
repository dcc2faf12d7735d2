"""What a detector says of one image. Without torch: evaluation and tables read it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Detections:
    """The K objects found in one image, the surest first, in pixels of the STORED image."""

    boxes_K4: np.ndarray
    """float32: left, top, right, bottom."""
    scores_K: np.ndarray
    """float32 in [0, 1]."""
    classes_K: np.ndarray
    """int64: index into the source's ``classes``."""
    masks: Sequence[dict[str, Any]] | None = None
    """K compressed run-length encodings of COCO, ``{"size": [height, width], "counts": str}``; None: boxes only."""

    def __post_init__(self) -> None:
        count = len(self.scores_K)
        assert self.boxes_K4.shape == (count, 4), f"boxes of shape {self.boxes_K4.shape} for {count} scores"
        assert self.classes_K.shape == (count,), f"{self.classes_K.shape} classes for {count} scores"
        assert self.masks is None or len(self.masks) == count, "a mask for each box"

    def __len__(self) -> int:
        return len(self.scores_K)
