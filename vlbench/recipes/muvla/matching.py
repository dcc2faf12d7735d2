"""Scoring image-text pairs with a trained mu-VLA model: what its export calls ``match``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vlbench.core.errors import UserError
from vlbench.core.types import Region
from vlbench.data.regions.features import box_vector
from vlbench.models.single_stream import Regions
from vlbench.recipes.muvla.batch import Vocabulary
from vlbench.recipes.muvla.model import RegionTextModel

_PAIRS = 256  # in the stream at once


class Matcher:
    """``p(match)`` from the ITM head.

    A model with a tower reads what boxes there are and its token of the whole image; without boxes that token alone. A
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
        batch, _, height, width = images_BCHW.shape
        most, fixed = self.config.max_regions, self.model.visual is None
        rows = [list(row)[:most] for row in regions] if regions is not None else [[] for _ in range(batch)]
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

    def _check(self, rows: Sequence[Sequence[Region]]) -> None:
        if self.model.visual is None:
            if not all(rows) or not all("feature" in region.attributes for row in rows for region in row):
                raise UserError(
                    "this mu-VLA model reads fixed region features and has none of some image: name the file of them "
                    "(the task's setting 'features')"
                )
        elif self.model.text_stream.image is None and not all(rows):
            raise UserError("this mu-VLA model reads regions only (roi.image_token was off), and an image has no boxes")
