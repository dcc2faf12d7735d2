"""The fusion model: one stream over a sentence and an image's tokens, and a head.

An image's tokens are cells of a grid or boxes, each with a feature and a place, and one for the whole image. Features
are given (the backbone is frozen) or come from a tower in the model, under the name ``visual``, that is trained along.

Shapes: B questions, V images of each, N = B * V streams, L words, R regions, F width of a region's feature, P of the
whole image's, D width of the stream, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlbench.core.cards import Preprocess
from vlbench.data.transforms import normalise
from vlbench.finetune.fusion.heads import NO_REGION, Head
from vlbench.finetune.fusion.words import Words
from vlbench.models.roi import DeepestMaps
from vlbench.models.single_stream import Regions, SingleStream, initialise

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Sight:
    """What the image side of a model is like."""

    parts: tuple[int, ...]
    """Widths of a region's feature: of each map that it was read from."""
    pooled: int | None
    """P; None where there is no token for the whole image."""
    views: int
    """V."""


class FusionModel(nn.Module):
    """Stream, pooler and head.

    Args:
        config: a FusionConfig.
        head: what is predicted.
        sight: the image side.
        words: the vocabulary; it goes with the model, which answers texts.
        visual: the tower, where it is trained along; it is then part of the model.
        preprocess: how the tower's images are normalised.
    """

    def __init__(
        self,
        config: Any,
        head: Head,
        sight: Sight,
        *,
        words: Words,
        visual: DeepestMaps | None = None,
        preprocess: Preprocess | None = None,
    ) -> None:
        super().__init__()
        self.sight, self.preprocess, self.words = sight, preprocess, words
        self.started: list[str] = []
        """In words, what it began with other than chance."""
        self.reads_regions = head.reads_regions
        self.at_last_word = config.pooler == "last_word"
        self.visual = visual
        # What a tower that learns says drifts; what is frozen has one mean and variance, which all batches tell best.
        momentum = 0.1 if visual is not None else None
        self.region_scale = Scale(sight.parts, momentum) if config.scale_features else None
        self.image_scale = Scale((sight.pooled,), momentum) if config.scale_features and sight.pooled else None
        self.stream = SingleStream(
            config.stream, words=words.size, feature_width=sum(sight.parts), image_width=sight.pooled, tags=False
        )
        width, std = config.stream.width, config.stream.init_std
        self.pooler = nn.Linear(width, width) if not self.reads_regions and not self.at_last_word else None
        if self.pooler is not None:
            initialise(self.pooler, std)
        self.dropout = nn.Dropout(config.stream.dropout)
        self.head = head.build(width, views=sight.views, init_std=std)
        if visual is not None:
            freeze_unreached(visual, pooled=sight.pooled is not None, image_size=_size_of(preprocess))

    def forward(self, batch: Batch) -> torch.Tensor:
        """``logits_BC``; of a head that reads regions ``logits_BR``, ``NO_REGION`` where there is none.

        ``batch``: ``words_BL`` (0: padding), ``box_BVR5`` and ``valid_BVR`` of the regions, and ``features_BVRF`` with
        ``pooled_BVP``, or ``images_BVCHW`` (uint8) with ``boxes_BVR4`` in their pixels.
        """
        words_BL, views = batch["words_BL"], self.sight.views
        words_NL = words_BL.repeat_interleave(views, dim=0)
        region_NRD, valid_NR = self.stream.embed_regions(self._regions(batch))
        text_NLD = self.stream.embed_sentence(words_NL)
        text_NLD, region_NRD = self.stream(text_NLD, words_NL != 0, region_NRD, valid_NR)
        if self.reads_regions:
            boxes_NR = batch["valid_BVR"].flatten(0, 1)  # without the whole image, which comes last
            logits_BR = self._answered(region_NRD[:, : boxes_NR.shape[1]])
            return logits_BR.masked_fill(~boxes_NR, NO_REGION)
        pooled_ND = self.dropout(self._pooled(text_NLD, words_NL))
        return self._answered(pooled_ND.reshape(len(words_BL), -1))

    def _answered(self, hidden_XD: torch.Tensor) -> torch.Tensor:
        # In bfloat16 one in forty questions would have two answers of the same logit, and the first would be taken.
        with torch.autocast(hidden_XD.device.type, enabled=False):
            logits: torch.Tensor = self.head(hidden_XD.float())
        return logits

    def _pooled(self, text_NLD: torch.Tensor, words_NL: torch.Tensor) -> torch.Tensor:
        if self.pooler is not None:
            return torch.tanh(self.pooler(text_NLD[:, 0]))
        # [CLS], words, [SEP]; without a word it is [CLS].
        last_N = (words_NL != 0).sum(1) - 2
        return text_NLD[torch.arange(len(text_NLD), device=text_NLD.device), last_N]

    def _regions(self, batch: Batch) -> Regions:
        box_NR5, valid_NR = batch["box_BVR5"].flatten(0, 1), batch["valid_BVR"].flatten(0, 1)
        pooled_NP: torch.Tensor | None
        if self.visual is None:
            features_NRF = batch["features_BVRF"].flatten(0, 1)
            pooled_NP = batch["pooled_BVP"].flatten(0, 1) if self.sight.pooled is not None else None
        else:
            assert self.preprocess is not None, "a tower's images are prepared as its card says"
            images_NCHW = normalise(batch["images_BVCHW"].flatten(0, 1), self.preprocess)
            images_NCHW = images_NCHW.contiguous(memory_format=torch.channels_last)
            features_NRF, pooled_NP = self.visual(images_NCHW, batch["boxes_BVR4"].flatten(0, 1))
        if self.region_scale is not None:
            features_NRF = self.region_scale(features_NRF, valid_NR)
        if self.image_scale is not None:
            assert pooled_NP is not None, "built with a token for the whole image"
            pooled_NP = self.image_scale(pooled_NP, torch.ones_like(valid_NR[:, 0]))
        return Regions(features_NRF, box_NR5, valid_NR, pooled_NP if self.sight.pooled is not None else None)


class Scale(nn.Module):
    """Features of one scale: backbones differ in it by orders of magnitude, and their channels among themselves.

    Each part of a feature gets mean 0 and variance 1, then each channel over the training batches: a BatchNorm without
    weights. Most of what a rectified network says of two regions is the same, and what differs is small beside it.

    Args:
        parts: widths.
        momentum: of the running statistics; None: the mean over all batches.
    """

    def __init__(self, parts: Sequence[int], momentum: float | None) -> None:
        super().__init__()
        self.parts = list(parts)
        # Of a part's variance, 1, what is so small is noise that must not be blown up.
        self.norm = nn.BatchNorm1d(sum(parts), eps=1e-3, momentum=momentum, affine=False)

    def forward(self, features_XF: torch.Tensor, valid_X: torch.Tensor) -> torch.Tensor:
        """The same shape; what is not valid has no part in the statistics, and is 0."""
        parts = [F.layer_norm(part.float(), part.shape[-1:]) for part in torch.split(features_XF, self.parts, dim=-1)]
        rows_MF = torch.cat(parts, dim=-1)[valid_X]
        if len(rows_MF) > 1 or not self.training:  # one row has no variance
            rows_MF = self.norm(rows_MF)
        return torch.zeros_like(features_XF, dtype=rows_MF.dtype).masked_scatter(valid_X[..., None], rows_MF)


def freeze_unreached(visual: DeepestMaps, *, pooled: bool, image_size: tuple[int, int]) -> None:
    """Take what the model's output does not depend on out of training: distributed training refuses to wait for it.

    Such are a projection into a joint space, and what pools a feature that is not read.
    """
    training = visual.training
    trained = [parameter for parameter in visual.parameters() if parameter.requires_grad]
    device = trained[0].device if trained else torch.device("cpu")
    image_1CHW = torch.rand(1, 3, *image_size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.enable_grad():
        box_114 = torch.tensor([[[0.0, 0.0, float(image_size[1]), float(image_size[0])]]], device=device)
        features_1RF, pooled_1P = visual.eval()(image_1CHW, box_114)
        said = features_1RF.sum() + (pooled_1P.sum() if pooled else 0.0)
        reached = torch.autograd.grad(said, trained, allow_unused=True) if trained else ()
    for parameter, gradient in zip(trained, reached, strict=True):
        parameter.requires_grad_(gradient is not None)
    visual.train(training)


def _size_of(preprocess: Preprocess | None) -> tuple[int, int]:
    assert preprocess is not None, "a tower's images have a size"
    return preprocess.image_size
