"""Scoring image-text pairs with a trained mu-VLA model: what its export calls ``match``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlbench.core.errors import UserError
from vlbench.core.types import Region
from vlbench.data.regions.features import box_vector
from vlbench.data.transforms import eval_transform
from vlbench.models.single_stream import Regions
from vlbench.recipes.muvla.batch import Vocabulary
from vlbench.recipes.muvla.grid import cell_boxes
from vlbench.recipes.muvla.model import RegionTextModel

_PAIRS = 256  # in the stream at once


class Matcher:
    """``p(match)`` from the ITM head.

    A model with a tower reads what boxes there are and its token of the whole image; without boxes that token alone.
    One with a grid reads its cells. A
    model of fixed features needs them: ``attributes["feature"]`` and ``["box_vector"]`` of every region.

    Rows are padded to the settings' lengths, not to the longest of a batch, so that a pair's score does not depend on
    the pairs beside it.
    """

    def __init__(self, model: RegionTextModel, vocabulary: Vocabulary, config: Any) -> None:
        self.model, self.vocabulary, self.config = model, vocabulary, config

    def __call__(
        self,
        images_BCHW: torch.Tensor,
        texts: Sequence[str],
        image_of_M: torch.Tensor,
        regions: Sequence[Sequence[Region]] | None,
    ) -> torch.Tensor:
        """``p_M`` of pairs: text m with image ``image_of_M[m]``. Boxes are in pixels of the images.

        Raises:
            UserError: where the model needs regions, or their features, that are not there.
        """
        found = self._regions(images_BCHW, regions)
        words_ML = torch.zeros(len(texts), self.config.max_words, dtype=torch.long)
        for row_L, text in zip(words_ML, texts, strict=True):
            words = self.vocabulary.sentence(text, self.config.max_words)
            row_L[: len(words)] = torch.tensor(words)
        words_ML = words_ML.to(images_BCHW.device)
        scores = []
        for start in range(0, len(texts), _PAIRS):
            pairs = slice(start, start + _PAIRS)
            rows = image_of_M[pairs].to(images_BCHW.device)
            chosen = Regions(*(None if part is None else part[rows] for part in found))  # type: ignore[arg-type]
            scores.append(self.model.match_logits(chosen, words_ML[pairs]).float().softmax(-1)[:, 1])
        return torch.cat(scores) if scores else images_BCHW.new_zeros(0)

    def _regions(self, images_BCHW: torch.Tensor, regions: Sequence[Sequence[Region]] | None) -> Regions:
        if self.config.roi.grid is not None:
            return self._cells(images_BCHW)
        batch, _, height, width = images_BCHW.shape
        most, fixed = self.config.max_regions, self.model.visual is None
        rows = [list(row) for row in regions] if regions is not None else [[] for _ in range(batch)]
        rows = [(row if fixed else self._in_view(row))[:most] for row in rows]
        self._check(rows)
        boxes_BR4 = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(batch, most, 1)
        box_BR5 = torch.zeros(batch, most, 5)
        valid_BR = torch.zeros(batch, most, dtype=torch.bool)
        features_BRF = torch.zeros(batch, most if fixed else 0, self.config.feature_width)
        for number, row in enumerate(rows):
            if not row:
                continue
            here = number, slice(len(row))
            valid_BR[here] = True
            boxes = np.array([region.box_xyxy for region in row], dtype=np.float32)
            boxes_BR4[here] = torch.from_numpy(boxes)
            if fixed:
                box_BR5[here] = torch.from_numpy(np.stack([region.attributes["box_vector"] for region in row]))
                features = np.stack([region.attributes["feature"] for region in row])
                features_BRF[here] = torch.from_numpy(features[:, : self.config.feature_width])
            else:
                box_BR5[here] = torch.from_numpy(box_vector(boxes, width, height))
        device = images_BCHW.device
        given = {"features_BRF": features_BRF} if fixed else {"images_BCHW": images_BCHW, "boxes_BR4": boxes_BR4}
        given = {name: tensor.to(device) for name, tensor in given.items()}
        return self.model.read_regions(box_BR5.to(device), valid_BR.to(device), **given)

    def _in_view(self, row: list[Region]) -> list[Region]:
        """Regions of a file speak of the whole image, as fixed features must; a tower is read at what the crop shows.

        The image's size is in the ratio of the box to its vector.
        """
        large = next((one for one in row if "box_vector" in one.attributes and min(one.box_xyxy[2:]) > 0), None)
        if large is None:
            return row
        width, height = (round(large.box_xyxy[side] / float(large.attributes["box_vector"][side])) for side in (2, 3))
        whole = Image.new("1", (width, height))
        return list(eval_transform(self.config.preprocess()).view(whole).regions(row))

    def _cells(self, images_BCHW: torch.Tensor) -> Regions:
        """Of a grid; what regions there are is no matter."""
        batch, device = len(images_BCHW), images_BCHW.device
        cells_R4 = cell_boxes(self.config.roi.grid)
        boxes_BR4 = torch.from_numpy(cells_R4).to(device).expand(batch, -1, -1)  # shares: the grid looks at none
        box_BR5 = torch.from_numpy(box_vector(cells_R4, 1, 1)).to(device).expand(batch, -1, -1)
        valid_BR = torch.ones(batch, len(cells_R4), dtype=torch.bool, device=device)
        return self.model.read_regions(box_BR5, valid_BR, images_BCHW=images_BCHW, boxes_BR4=boxes_BR4)

    def _check(self, rows: Sequence[Sequence[Region]]) -> None:
        if self.model.visual is None:
            if not all(rows) or not all("feature" in region.attributes for row in rows for region in row):
                raise UserError(
                    "this mu-VLA model reads fixed region features and has none of some image: name the file of them "
                    "(the task's setting 'features')"
                )
        elif not self.model.reads_image and not all(rows):
            raise UserError("this mu-VLA model reads regions only (roi.image_token was off), and an image has no boxes")
