"""What UniCL is compared with: the same tower, data and schedule under another use of captions and labels.

Each variant is a recipe over ``UniclConfig``, called through ``Unicl``, so that one setting is all that two arms of a
comparison differ in. What the paper (Yang et al., 2204.03610) may leave open, the weight of two tasks, is a
setting. Values over several ranks are those of the whole batch, as in ``train/losses.py``.

Shapes: B this rank's batch, N the whole batch, C classes or channels, H height, W width, L tokens, E joint space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlbench.core.errors import UserError
from vlbench.core.types import Backbone, Part, Sample
from vlbench.models.classifier import Classifier
from vlbench.models.export import export_visual
from vlbench.models.two_tower import TwoTower
from vlbench.models.vision import build_visual
from vlbench.recipes.base import BaseRecipe, TwoTowerRecipe
from vlbench.train.blocked import blocked_cross_entropy
from vlbench.train.distributed import gather, gather_constant, mean_over_ranks, ranks
from vlbench.train.losses import cross_entropy, image_to_text_loss, supcon_loss, unicl_loss


class ImageToText(TwoTowerRecipe):
    """Images look for their texts, texts for nothing: the first half of UniCL's loss."""

    name = "unicl (image_to_text)"

    def contrast(
        self,
        image_BE: torch.Tensor,
        text_BE: torch.Tensor,
        logit_scale: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        config: Any,
    ) -> torch.Tensor:
        """One direction over the whole batch of all ranks."""
        return image_to_text_loss(image_BE, text_BE, batch["labels_B"], logit_scale, block=config.loss_block)


class FromLabels(BaseRecipe):
    """What the variants without a text tower share: images with labels, and an image tower to be measured."""

    needs: frozenset[Part] = frozenset({"image", "label"})

    def collate(self, config: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Images and labels."""
        return {
            "images_BCHW": torch.stack([sample.image_CHW for sample in samples]),
            "labels_B": torch.tensor([sample.label for sample in samples]),
        }

    def export(self, model: torch.nn.Module, config: Any, classes: Sequence[str]) -> Backbone:
        """The image tower alone: without texts a joint space is of no use to a task."""
        assert isinstance(model, Classifier | ImageEmbedder), f"{self.name} trains no {type(model).__name__}"
        return export_visual(
            model.visual,
            model_id=self.name,
            recipe=self.name,
            preprocess=config.preprocess(),
            pretrain_data=config.data,
        )


class CrossEntropy(FromLabels):
    """A linear head on the pooled feature, as in ``supervised``."""

    name = "unicl (cross_entropy)"

    def build(self, config: Any, classes: Sequence[str]) -> Classifier:
        """A fresh tower and head."""
        return Classifier(config.visual, len(classes))

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """Softmax cross-entropy, and accuracy on the augmented batch."""
        logits_BC, labels_B = model(self.images(batch, config)), batch["labels_B"]
        return {
            "loss": cross_entropy(logits_BC, labels_B),
            "train_accuracy": mean_over_ranks((logits_BC.argmax(1) == labels_B).float().mean()),
        }


class SupCon(FromLabels):
    """Images of one class attract each other (Khosla et al., NeurIPS 2020, 2004.11362).

    There every image is seen in two augmented views. Here it is seen once, as under every other variant, and its
    positives are the other images of its class: the number of images seen stays comparable. An image that is alone
    with its class in the batch is a negative only. The temperature is learned, as UniCL's.
    """

    name = "unicl (supcon)"

    def build(self, config: Any, classes: Sequence[str]) -> ImageEmbedder:
        """A fresh tower and projection."""
        return ImageEmbedder(config)

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """The supervised contrastive loss over the whole batch of all ranks."""
        image_BE, logit_scale = model(self.images(batch, config))
        loss = supcon_loss(image_BE, batch["labels_B"], 1 / logit_scale, block=config.loss_block)
        return {"loss": loss, "logit_scale": logit_scale}

    def takes_blocks(self, config: Any) -> bool:
        """Its images are compared with each other."""
        return True


class LabelEmbedding(FromLabels):
    """A vector a class in place of the text tower: UniCL's loss without language."""

    name = "unicl (label_embedding)"

    def build(self, config: Any, classes: Sequence[str]) -> ImageEmbedder:
        """A fresh tower, projection and table of classes."""
        return ImageEmbedder(config, n_classes=len(classes))

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """UniCL's loss; the "text" of an image is its class's vector."""
        image_BE, label_BE, logit_scale = model(self.images(batch, config), batch["labels_B"])
        loss = unicl_loss(image_BE, label_BE, batch["labels_B"], logit_scale, block=config.loss_block)
        return {"loss": of_directions(loss, config), "logit_scale": logit_scale}

    def takes_blocks(self, config: Any) -> bool:
        """Its images are compared with the batch's classes, one a row."""
        return True


def of_directions(mean: torch.Tensor, config: Any) -> torch.Tensor:
    """The loss of both directions as ``config.directions`` joins them, of their mean."""
    return 2 * mean if config.directions == "sum" else mean


class MultiTask(TwoTowerRecipe):
    """Two losses on one image tower: CLIP's on the caption pairs, cross-entropy on the labelled images."""

    name = "unicl (multi_task)"

    def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
        """Nothing; data for one of the two tasks only are refused."""
        labelled = [bool(source.classes) for source in data.sources]
        captioned = [not source.classes or None in (source.labels() or ()) for source in data.sources]
        for there, what in ((labelled, "labels"), (captioned, "captions")):
            if not any(there):
                raise UserError(
                    f"{self.name} learns from labels and from captions, and there are no {what} in "
                    f"{', '.join(source.spec for source in data.sources)}; add --data with {what}"
                )
        return {}

    def build(self, config: Any, classes: Sequence[str]) -> MultiTaskTowers:
        """Two fresh towers and a head."""
        return MultiTaskTowers(config, len(classes))

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """``contrastive + head_weight * cross_entropy``, each the mean over its own examples of the whole batch."""
        images_BCHW, labels_B = self.images(batch, config), batch["labels_B"]
        image_BE, text_BE, logit_scale, logits_BC = model(images_BCHW, batch["tokens_BL"])
        contrastive = caption_loss(image_BE, text_BE, labels_B, logit_scale, block=config.loss_block)
        entropy = labelled_cross_entropy(logits_BC, labels_B)
        return {
            "loss": contrastive + config.head_weight * entropy,
            "contrastive": contrastive,
            "cross_entropy": entropy,
            "logit_scale": logit_scale,
        }

    def takes_blocks(self, config: Any) -> bool:
        """The one of its losses that has a matrix of logits does."""
        return True


def caption_loss(
    image_BE: torch.Tensor,
    text_BE: torch.Tensor,
    labels_B: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    block: int | None = None,
) -> torch.Tensor:
    """CLIP's loss among the caption pairs (label -1) of all ranks; the labelled ones are not even negatives.

    With ``block`` it holds so many rows of logits at once, as ``train/losses.py``; with None, all.

    Returns:
        The mean over the caption pairs of the whole batch, in nats; 0, with a gradient of 0, where there is none.
    """
    captions_N = gather_constant(labels_B) < 0
    own_B = ranks().rank * len(labels_B) + torch.arange(len(labels_B), device=labels_B.device)
    with torch.autocast(image_BE.device.type, enabled=False):  # bfloat16 is too coarse for logits
        if block is not None:
            return mean_over_ranks(_blocked_captions(image_BE, text_BE, captions_N, own_B, logit_scale, block))
        loss_B = torch.zeros_like(own_B, dtype=image_BE.dtype)
        for rows_BE, keys_BE in ((image_BE, text_BE), (text_BE, image_BE)):
            logits_BN = logit_scale * rows_BE @ gather(keys_BE).T
            # The lowest number, not -inf: rows of -inf alone would have no gradient but nan.
            logits_BN = logits_BN.masked_fill(~captions_N, torch.finfo(logits_BN.dtype).min)
            loss_B = loss_B + F.cross_entropy(logits_BN, own_B, reduction="none") / 2
        return _mean_where(labels_B < 0, loss_B)


def _blocked_captions(
    image_BE: torch.Tensor,
    text_BE: torch.Tensor,
    captions_N: torch.Tensor,
    own_B: torch.Tensor,
    logit_scale: torch.Tensor | float,
    block: int,
) -> torch.Tensor:
    """What ``caption_loss`` takes the mean over ranks of: rows and keys of the caption pairs alone."""
    # K: the whole batch's caption pairs, M: this rank's.
    mine_B, places_K = captions_N[own_B], captions_N.nonzero()[:, 0]
    places_M = own_B[mine_B]
    share = ranks().world / max(1, len(places_K)) / 2  # of the whole mean, since ranks may have any number of them
    loss = image_BE.new_zeros(())
    for rows_BE, keys_BE in ((image_BE, text_BE), (text_BE, image_BE)):
        loss = loss + blocked_cross_entropy(
            rows_BE[mine_B],
            gather(keys_BE)[captions_N],
            logit_scale,
            classes_B=places_M,
            classes_N=places_K,
            smoothing=0.0,
            block=block,
            weights_B=image_BE.new_full((len(places_M),), share),
        )
    return loss


def labelled_cross_entropy(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy, its mean over the labelled images of all ranks, in nats; 0 where there is none."""
    return _mean_where(labels_B >= 0, F.cross_entropy(logits_BC.float(), labels_B, ignore_index=-1, reduction="none"))


def _mean_where(counted_B: torch.Tensor, loss_B: torch.Tensor) -> torch.Tensor:
    """The mean over the rows of all ranks that count. Ranks may have any number of them."""
    count = gather_constant(counted_B.long()).sum().clamp(min=1)  # gloo gathers no truth values
    return mean_over_ranks(torch.where(counted_B, loss_B, 0.0).sum() * ranks().world / count)


class MultiTaskTowers(TwoTower):
    """Two towers, and a linear head on the image tower's pooled feature."""

    def __init__(self, config: Any, n_classes: int) -> None:
        super().__init__(
            config.visual,
            config.text,
            embed_dim=config.embed_dim,
            logit_scale_init=config.logit_scale_init,
            logit_scale_max=config.logit_scale_max,
            projection_std=config.projection_std,
        )
        self.head = nn.Linear(self.visual.width, n_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: torch.Tensor, tokens_BL: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``(image_BE, text_BE, logit_scale, logits_BC)``; the image tower runs once."""
        pooled_BD = self.visual(images_BCHW)
        image_BE = F.normalize(self._project(pooled_BD).float(), dim=-1)
        text_BE = F.normalize(self.encode_text(tokens_BL).float(), dim=-1)
        return image_BE, text_BE, self.logit_scale.exp(), self.head(pooled_BD)


class ImageEmbedder(nn.Module):
    """An image tower with a projection and a learned logit scale; with ``n_classes`` also a vector for every class."""

    def __init__(self, config: Any, *, n_classes: int | None = None) -> None:
        super().__init__()
        width, std = config.embed_dim, config.projection_std
        self.visual = build_visual(config.visual, embed_dim=width)
        self.image_projection: nn.Linear | None = None
        if self.visual.embed_dim is None:  # as in TwoTower
            self.image_projection = nn.Linear(self.visual.width, width, bias=False)
            nn.init.normal_(self.image_projection.weight, std=std or self.visual.width**-0.5)
        self.label_embedding: nn.Embedding | None = None
        if n_classes is not None:
            self.label_embedding = nn.Embedding(n_classes, width)
            nn.init.normal_(self.label_embedding.weight, std=std or width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))
        self.logit_scale_max = config.logit_scale_max

    def forward(self, images_BCHW: torch.Tensor, labels_B: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """``(image_BE, logit_scale)``, or with labels ``(image_BE, label_BE, logit_scale)``; of unit norm."""
        pooled_BD = self.visual(images_BCHW)
        projected_BE = (
            self.visual.project(pooled_BD) if self.image_projection is None else self.image_projection(pooled_BD)
        )
        image_BE, scale = F.normalize(projected_BE.float(), dim=-1), self.logit_scale.exp()
        if labels_B is None:
            return image_BE, scale
        assert self.label_embedding is not None, "this model was built without classes"
        return image_BE, F.normalize(self.label_embedding(labels_B).float(), dim=-1), scale

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Hold the scale at its maximum; to be called after every optimizer step."""
        if self.logit_scale_max is not None:
            self.logit_scale.clamp_(max=math.log(self.logit_scale_max))
