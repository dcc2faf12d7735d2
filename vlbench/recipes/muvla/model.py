"""What mu-VLA trains: the stream, its heads, and (our adaptation) a tower that gives the regions' features.

One call makes everything that the losses of a batch need, so that distributed training sees every parameter used.
Heads read only the places that are masked; where a batch has none, they read nothing and their gradient is zero.

Shapes: B batch, L words, R regions, F width of a region's feature, M places that a head reads, V words, T tags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from vlbench.models.roi import RegionTower, blank
from vlbench.models.single_stream import IGNORED, Heads, Regions, SingleStream, StreamConfig
from vlbench.recipes.muvla.batch import Objective
from vlbench.recipes.muvla.grid import GridTower

Batch = Mapping[str, torch.Tensor]


class Read(NamedTuple):
    """What a head says of the places that it reads."""

    predicted_MX: torch.Tensor
    target_M: torch.Tensor
    """Classes; of MRFR the features, ``(M, F)``."""
    row_M: torch.Tensor
    """The example that a place belongs to."""


class RegionTextModel(nn.Module):
    """Tower, stream and heads.

    Args:
        stream: sizes of the transformer.
        objectives: what is trained; nothing is built that they do not use: of none, neither stream nor heads.
        words: the vocabulary's size.
        tags: classes of regions.
        visual: where region features come from; None: from the batch.
        feature_width: F, where they come from the batch.
        regress: whether RT regresses features (MRFR).
        regress_seen: whether its target is what the stream was shown, zeros mostly, in place of the feature.
        released_rows: whether RN regresses features too, and IS has a row of its own for MLM, MRC and MRFR.
        image_token: whether the tower's pooled feature is a token of its own.
        mask_pixels: whether the tower sees masked regions blanked out.
        classify: whether the tower's features alone are to name each region's tag, as a detector's are.
    """

    def __init__(
        self,
        stream: StreamConfig,
        *,
        objectives: Sequence[Objective],
        words: int,
        tags: int,
        visual: RegionTower | GridTower | None,
        feature_width: int,
        regress: bool = False,
        regress_seen: bool = False,
        released_rows: bool = False,
        image_token: bool = False,
        mask_pixels: bool = False,
        classify: bool = False,
    ) -> None:
        super().__init__()
        self.objectives = tuple(objectives)
        self.visual = visual
        self.mask_pixels = mask_pixels
        self.regress_seen, self.released_rows = regress_seen, released_rows
        classifies = "rt" in objectives or (released_rows and "is" in objectives)
        width = visual.width if visual is not None else feature_width
        self.detector: nn.Linear | None = None
        if objectives:
            # One name for all that reads words: presets may train it at another rate than the tower.
            self.text_stream = SingleStream(
                stream,
                words=words,
                feature_width=width,
                image_width=visual.tower.width if visual is not None and image_token else None,
                sentences="rn" in objectives or "is" in objectives,
                tags="rt" in objectives,
            )
        if visual is not None and classify:
            self.detector = nn.Linear(width, tags)
        if objectives:
            self.text_heads = Heads(
                stream.width,
                words=words,
                tags=tags if classifies else None,
                feature_width=width if regress and ("rt" in objectives or released_rows) else None,
                match="is" in objectives,
                init_std=stream.init_std,
            )
        self.reads_image = bool(objectives) and self.text_stream.image is not None

    def forward(self, batch: Batch, images_BCHW: torch.Tensor | None = None) -> dict[str, Read]:
        """All predictions of a batch by name; ``match`` and ``rn_match`` hold the logits of each row's pair."""
        regions = self._regions(batch, images_BCHW)
        found: dict[str, Read] = {}
        if self.detector is not None:
            # The last objective's regions: IS sees all pixels, where masked ones are blanked out for others.
            features_BRF = list(regions.values())[-1].features_BRF
            known_BR = batch["valid_BR"] & (batch["tags_BR"] != IGNORED)
            found["roi_tags"] = Read(self.detector(features_BRF[known_BR]), batch["tags_BR"][known_BR], _rows(known_BR))
        if "rt" in regions:
            found |= self._tags(batch, regions["rt"])
        if "rn" in regions:
            found |= self._phrases(batch, regions["rn"])
        if "is" in regions:
            found |= self._pairs(batch, regions["is"])
        return found

    def hidden(
        self, regions: Regions, words_BL: torch.Tensor, *, tags: torch.Tensor | None, zeroed_BR: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream's outputs ``hidden_BLD`` at words and ``hidden_BRD`` at regions.

        Args:
            regions: the image side.
            words_BL: of a sentence, or of tags.
            tags: for tags, the box of each word's region, ``(B, L, 5)``; None for a sentence.
            zeroed_BR: regions whose feature is not seen.
        """
        stream = self.text_stream
        text_BLD = stream.embed_sentence(words_BL) if tags is None else stream.embed_tags(words_BL, tags)
        region_BRD, valid_BR = stream.embed_regions(regions, zeroed_BR)
        return stream(text_BLD, words_BL != 0, region_BRD, valid_BR)

    def match_logits(self, regions: Regions, words_BL: torch.Tensor) -> torch.Tensor:
        """``logits_B2`` of pairs of an image and a sentence, nothing masked."""
        hidden_BLD, _ = self.hidden(regions, words_BL, tags=None, zeroed_BR=None)
        return self.text_heads.match(hidden_BLD[:, 0])

    def read_regions(self, box_BR5: torch.Tensor, valid_BR: torch.Tensor, **given: torch.Tensor) -> Regions:
        """Regions from images and boxes in their pixels, or (no tower) from features."""
        if self.visual is None:
            return Regions(given["features_BRF"], box_BR5, valid_BR)
        features_BRF, pooled_BP = self._see(given["images_BCHW"], given["boxes_BR4"])
        return Regions(features_BRF, box_BR5, valid_BR, pooled_BP)

    def _see(self, images_BCHW: torch.Tensor, boxes_BR4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``features_BRF`` and, where the stream has a token of it, ``pooled_BP``."""
        assert self.visual is not None, "a tower sees"
        features_BRF, pooled_BP = self.visual(images_BCHW, boxes_BR4)
        if self.reads_image:
            return features_BRF, pooled_BP
        # What pools has weights in some towers: ranks wait for their gradients, which are then zero.
        return features_BRF + 0.0 * pooled_BP.sum(), None

    def _regions(self, batch: Batch, images_BCHW: torch.Tensor | None) -> dict[str, Regions]:
        """The image side of each objective, in their order; without any, one for the detector.

        They share it, unless masked regions are blanked out.
        """
        box_BR5, valid_BR = batch["box_BR5"], batch["valid_BR"]
        if self.visual is None:
            regions = self.read_regions(box_BR5, valid_BR, features_BRF=batch["features_BRF"])
            return dict.fromkeys(self.objectives, regions)
        assert images_BCHW is not None, "a tower reads images"
        boxes_BR4 = batch["boxes_BR4"]
        if not self.mask_pixels or not self.objectives:
            regions = self.read_regions(box_BR5, valid_BR, images_BCHW=images_BCHW, boxes_BR4=boxes_BR4)
            return dict.fromkeys(self.objectives or ("tags",), regions)
        views = [
            blank(images_BCHW, boxes_BR4, batch[f"{name}_zeroed"]) if name != "is" else images_BCHW
            for name in self.objectives
        ]
        features, whole = self._see(torch.cat(views), boxes_BR4.repeat(len(views), 1, 1))
        return {
            name: Regions(
                features.chunk(len(views))[number],
                box_BR5,
                valid_BR,
                None if whole is None else whole.chunk(len(views))[number],
            )
            for number, name in enumerate(self.objectives)
        }

    def _tags(self, batch: Batch, regions: Regions) -> dict[str, Read]:
        """RT: MLM of tags, MRC, MRFR."""
        words_BL = batch["rt_words"]
        box_BL5 = regions.box_BR5.gather(1, batch["rt_owners"][..., None].expand(-1, -1, 5))
        text, places = self.hidden(regions, words_BL, tags=box_BL5, zeroed_BR=batch["rt_zeroed"])
        found = {"rt_words": self._words(text, batch["rt_labels"]), "rt_tags": self._classes("rt", places, batch)}
        if self.text_heads.feature is not None:
            found["rt_features"] = self._features("rt", places, batch, regions)
        return found

    def _classes(self, row: str, places_BRD: torch.Tensor, batch: Batch) -> Read:
        """MRC of the masked regions of one kind of row."""
        assert self.text_heads.tag is not None, "built for MRC"
        known_BR = batch[f"{row}_masked"] & batch["valid_BR"] & (batch["tags_BR"] != IGNORED)
        places_BRD = places_BRD[:, : known_BR.shape[1]]
        return Read(self.text_heads.tag(places_BRD[known_BR]), batch["tags_BR"][known_BR], _rows(known_BR))

    def _features(self, row: str, places_BRD: torch.Tensor, batch: Batch, regions: Regions) -> Read:
        """MRFR of the masked regions. The target is the feature as it came, unless ``regress_seen``."""
        assert self.text_heads.feature is not None, "built for MRFR"
        masked_BR = batch[f"{row}_masked"] & batch["valid_BR"]
        target_MF = regions.features_BRF[masked_BR].detach()
        if self.regress_seen:
            target_MF = target_MF.masked_fill(batch[f"{row}_zeroed"][masked_BR][:, None], 0.0)
        places_BRD = places_BRD[:, : masked_BR.shape[1]]
        return Read(self.text_heads.feature(places_BRD[masked_BR]), target_MF, _rows(masked_BR))

    def _phrases(self, batch: Batch, regions: Regions) -> dict[str, Read]:
        """RN: MLM of noun phrases; p-MRTC, which reads a word of the linked phrase off a masked region."""
        text, places = self.hidden(regions, batch["rn_words"], tags=None, zeroed_BR=batch["rn_zeroed"])
        labels_BR = batch["rn_region_labels"]
        found = {
            "rn_words": self._words(text, batch["rn_labels"]),
            "rn_regions": self._words(places[:, : labels_BR.shape[1]], labels_BR),
        }
        if self.released_rows and self.text_heads.feature is not None:
            found["rn_features"] = self._features("rn", places, batch, regions)
        return found | self._weights("rn_match", text)

    def _weights(self, name: str, hidden_BLD: torch.Tensor) -> dict[str, Read]:
        """How well each row's retrieved sentence matches its image, where the head is there."""
        if self.text_heads.matches is None:
            return {}
        match_B = torch.ones(len(hidden_BLD), dtype=torch.long, device=hidden_BLD.device)
        with torch.no_grad():  # only weighs the pairs
            return {name: _pairs(self.text_heads.match(hidden_BLD[:, 0]), match_B)}

    def _pairs(self, batch: Batch, regions: Regions) -> dict[str, Read]:
        """IS: MLM and ITM; of the released rows, regions too."""
        text, _ = self.hidden(regions, batch["is_words"], tags=None, zeroed_BR=None)
        match = {"match": _pairs(self.text_heads.match(text[:, 0]), batch["is_match"].long())}
        if not self.released_rows:
            return {"is_words": self._words(text, batch["is_labels"]), **match}
        text, places = self.hidden(regions, batch["mlm_words"], tags=None, zeroed_BR=batch["mlm_zeroed"])
        found = {"is_words": self._words(text, batch["mlm_labels"]), "is_tags": self._classes("mlm", places, batch)}
        if self.text_heads.feature is not None:
            found["is_features"] = self._features("mlm", places, batch, regions)
        return found | match | self._weights("mlm_match", text)

    def _words(self, hidden_BLD: torch.Tensor, labels_BL: torch.Tensor) -> Read:
        read_BL = labels_BL != IGNORED
        logits_MV = self.text_heads.words(hidden_BLD[read_BL], self.text_stream.word.weight)
        return Read(logits_MV, labels_BL[read_BL], _rows(read_BL))


def _rows(read_BX: torch.Tensor) -> torch.Tensor:
    return read_BX.nonzero()[:, 0]


def _pairs(logits_B2: torch.Tensor, match_B: torch.Tensor) -> Read:
    return Read(logits_B2, match_B, torch.arange(len(match_B), device=match_B.device))
