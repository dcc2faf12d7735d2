"""The image side of a batch of questions: gathered from a bank, read from a file of region features, or decoded.

All of them answer the same call, so that a feed and a prediction need not know which it is. Images are squashed to the
backbone's input: nothing is cut away that a question may ask about.

Shapes: B questions, V images of each, R regions, F width of a region's feature, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vlbench.core.cards import Preprocess
from vlbench.core.errors import UserError
from vlbench.core.types import Example, Source
from vlbench.data.images import image_at
from vlbench.data.regions.features import RegionStore, box_vector
from vlbench.data.sources import without_images
from vlbench.data.transforms import eval_transform
from vlbench.finetune.fusion.bank import RegionBank
from vlbench.finetune.fusion.model import Sight
from vlbench.finetune.fusion.questions import Questions

Part = dict[str, torch.Tensor]


class Views(Protocol):
    """The images of questions."""

    decodes: bool
    """Whether a call is long enough to be worth a loader process."""

    @property
    def sight(self) -> Sight:
        """What the model is built for."""

    def __call__(self, questions: Sequence[int]) -> Part:
        """``box_BVR5``, ``valid_BVR`` and the rest that ``FusionModel`` reads. Raises UserError for a bad image."""

    def counts(self) -> np.ndarray:
        """Regions of each question's first image, the unread ones included."""


@dataclass(frozen=True)
class BankViews:
    """Frozen features."""

    bank: RegionBank
    most: int
    """Regions of an image that are read."""
    decodes = False

    @property
    def sight(self) -> Sight:
        """As the bank was made."""
        pooled = self.bank.pooled_KP
        return Sight(self.bank.parts, None if pooled is None else pooled.shape[1], self.bank.image_NV.shape[1])

    def __call__(self, questions: Sequence[int]) -> Part:
        """A gather."""
        return {name: torch.from_numpy(part) for name, part in self.bank.gather(questions, most=self.most).items()}

    def counts(self) -> np.ndarray:
        """Regions of each question's first image."""
        return self.bank.counts()[:, 0]


@dataclass(frozen=True)
class FixedViews:
    """Region features of a file, read as they are asked for."""

    store: RegionStore
    keys_NV: Sequence[Sequence[str]]
    """The image's name in the file."""
    width: int
    most: int
    where: str
    decodes = True

    @property
    def sight(self) -> Sight:
        """One part, and no token for the whole image: a detector has none."""
        return Sight((self.width,), None, len(self.keys_NV[0]))

    def regions(self, key: str) -> Any:
        """The regions of an image. Raises UserError where it is not there, does not fit or has too few numbers."""
        try:
            found = self.store[key]
        except KeyError as error:
            raise UserError(str(error.args[0])) from None
        if found.features_ND.shape[1] < self.width:
            raise UserError(
                f"{self.where}: the features of {key!r} have {found.features_ND.shape[1]} numbers, not {self.width}; "
                "set feature_width"
            )
        return found

    def check(self) -> None:
        """Read every image's regions once. Raises UserError as ``regions``."""
        for key in dict.fromkeys(key for keys in self.keys_NV for key in keys):
            self.regions(key)

    def __call__(self, questions: Sequence[int]) -> Part:
        """The leading numbers of each region."""
        found = [[self.regions(key) for key in self.keys_NV[question]] for question in questions]
        counts = [[min(len(one), self.most) for one in row] for row in found]
        rows = max(1, max(map(max, counts)))
        shape = (len(found), len(found[0]), rows)
        features, box = (np.zeros((*shape, width), dtype=np.float32) for width in (self.width, 5))
        valid = np.zeros(shape, dtype=bool)
        for b, row in enumerate(found):
            for v, one in enumerate(row):
                count = counts[b][v]
                features[b, v, :count] = one.features_ND[:count, : self.width]
                box[b, v, :count] = one.box_vectors()[:count]
                valid[b, v, :count] = True
        parts = {"features_BVRF": features, "box_BVR5": box, "valid_BVR": valid}
        return {name: torch.from_numpy(part) for name, part in parts.items()}

    def counts(self) -> np.ndarray:
        """Regions of each question's first image."""
        known = {key: len(self.regions(key)) for key in {row[0] for row in self.keys_NV}}
        return np.array([known[row[0]] for row in self.keys_NV])


class DecodedViews:
    """Images, for a tower that is trained.

    Args:
        questions: whose images.
        preprocess: the backbone's; its crop is replaced by a squash.
        boxes: of each question's images, in pixels of the stored image; None: the cells of a grid.
        grid: cells each way.
        sight: what the tower gives.
        most: boxes of an image that are read.
    """

    decodes = True

    def __init__(
        self,
        questions: Questions,
        preprocess: Preprocess,
        *,
        boxes: Sequence[Sequence[np.ndarray]] | None,
        grid: int,
        sight: Sight,
        most: int,
    ) -> None:
        self.questions, self.boxes, self.grid, self._sight, self.most = questions, boxes, grid, sight, most
        self.squash = Squash(preprocess)

    @property
    def sight(self) -> Sight:
        """As the tower gives."""
        return self._sight

    def __call__(self, questions: Sequence[int]) -> Part:
        """``images_BVCHW`` uint8 and ``boxes_BVR4`` in their pixels."""
        images, boxes = [], []
        for question in questions:
            for v, source in enumerate(self.questions.views):
                stored = None if self.boxes is None else self.boxes[question][v][: self.most]
                image_CHW, boxes_R4 = self.squash(source, question, stored, grid=self.grid)
                images.append(image_CHW)
                boxes.append(boxes_R4)
        views = len(self.questions.views)
        boxes_NR4, valid_NR = padded(boxes)
        height, width = self.squash.size
        box_NR5 = torch.from_numpy(box_vector(boxes_NR4.reshape(-1, 4).numpy(), width, height)).view(*valid_NR.shape, 5)
        box_NR5 = box_NR5 * valid_NR[..., None]
        flat = {
            "images_BVCHW": torch.stack(images),
            "boxes_BVR4": boxes_NR4,
            "box_BVR5": box_NR5,
            "valid_BVR": valid_NR,
        }
        return {name: part.view(-1, views, *part.shape[1:]) for name, part in flat.items()}

    def counts(self) -> np.ndarray:
        """Regions of each question's first image."""
        if self.boxes is None:
            return np.full(len(self.questions), self.grid**2)
        return np.array([len(row[0]) for row in self.boxes])


class Squash:
    """Stored images to the backbone's input, all of each image. It can be pickled."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.transform = eval_transform(preprocess.model_copy(update={"resize": "squash", "resize_to": None}))
        self.size = preprocess.image_size
        """Height and width."""

    def __call__(
        self, source: Source, index: int, boxes: np.ndarray | None, *, grid: int
    ) -> tuple[torch.Tensor, np.ndarray]:
        """The image as ``uint8`` CHW, and boxes in its pixels: ``boxes`` of the stored image, or a grid's cells.

        Raises:
            UserError: where the image is absent or cannot be decoded, naming it.
        """
        _, image = image_at(source, index)
        height, width = self.size
        if boxes is None:
            return self.transform(image), grid_boxes(grid, width=width, height=height)
        scale = np.array([width / image.width, height / image.height] * 2)
        limits = np.array([width, height] * 2, dtype=np.float64)
        moved = np.clip(np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale, 0, limits)
        return self.transform(image), moved.astype(np.float32)


def grid_boxes(grid: int, *, width: float, height: float) -> np.ndarray:
    """``boxes_R4`` float32: the cells of a ``grid x grid`` grid, row by row, in pixels."""
    x, y = (np.linspace(0, side, grid + 1) for side in (width, height))
    cells = [(x[i], y[j], x[i + 1], y[j + 1]) for j in range(grid) for i in range(grid)]
    return np.array(cells, dtype=np.float32)


def padded(boxes: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """``boxes_NR4`` and ``valid_NR`` of rows of unequal length, R at least 1; padding is a box of one pixel."""
    longest = max(1, max(map(len, boxes)))
    boxes_NR4 = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(boxes), longest, 1)
    valid_NR = torch.zeros(len(boxes), longest, dtype=torch.bool)
    for row_R4, valid_R, found in zip(boxes_NR4, valid_NR, boxes, strict=True):
        row_R4[: len(found)] = torch.from_numpy(found)
        valid_R[: len(found)] = True
    return boxes_NR4, valid_NR


def annotated_boxes(source: Source) -> list[np.ndarray]:
    """The boxes of each example's regions, in pixels of the stored image."""
    return [boxes_of(without_images(source, index)) for index in range(len(source))]


def boxes_of(example: Example) -> np.ndarray:
    """``boxes_R4``, float64."""
    return np.array([region.box_xyxy for region in example.regions], dtype=np.float64).reshape(-1, 4)
