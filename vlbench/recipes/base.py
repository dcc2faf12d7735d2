"""What recipes share: pixels to the network, two towers, batches of images and texts.

A recipe's module then holds its settings, with their sources, and its loss.

Source tags in presets (``published``) name the repository or notes that a value was read in; a value marked
"unverified" is from memory of the paper and was not read. Shapes: B batch, C channels, H height, W width, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import Field

from vlbench.core.cards import TextSpec
from vlbench.core.types import Backbone, Part, Recipe, Sample
from vlbench.data.transforms import Augment, normalise
from vlbench.models.export import export_two_tower
from vlbench.models.text import TextConfig, TextReader, Tokenizer
from vlbench.models.two_tower import TwoTower
from vlbench.models.vision import VisualConfig
from vlbench.recipes.published import Preset
from vlbench.train.config import OptimConfig, PretrainConfig, ScheduleConfig


class TwoTowerConfig(PretrainConfig):
    """Settings of a recipe with an image tower and a text tower."""

    text: TextConfig = TextConfig()
    embed_dim: int = Field(description="width of the joint space")
    logit_scale_init: float = Field(description="the stored parameter: the logarithm of the initial scale")
    logit_scale_max: float | None = Field(
        description="largest scale (not its logarithm), held after every step; None: no clamp"
    )
    projection_std: float | None = Field(
        default=None, description="standard deviation of both projections at the start; None: width^-0.5"
    )


class BaseRecipe:
    """The parts of ``core.types.Recipe`` that are the same for all."""

    name: str
    Config: ClassVar[type[PretrainConfig]]
    presets: Mapping[str, Any]
    described: Mapping[str, Preset] = {}
    """The same presets with their sources, for ``vlbench show recipe``; a recipe may do without."""
    needs: frozenset[Part]

    def needs_of(self, config: Any) -> frozenset[Part]:
        """``needs``, whatever the settings."""
        return self.needs

    def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
        """Nothing."""
        return {}

    def with_assets(self, assets: Mapping[str, bytes]) -> Recipe:
        """The recipe itself."""
        return self  # type: ignore[return-value]

    def after_step(self, model: torch.nn.Module) -> None:
        """Nothing."""

    def contrastive(self, config: Any) -> TwoTowerRecipe | None:
        """The recipe whose ``embed`` and ``contrast`` make the whole loss, for ``grad_cache``; None: there is none."""
        return None

    def takes_blocks(self, config: Any) -> bool:
        """Whether the loss heeds ``loss_block``: it compares embeddings across the batch."""
        return False

    def images(self, batch: Mapping[str, torch.Tensor], config: PretrainConfig) -> torch.Tensor:
        """``images_BCHW`` of a batch, normalised, float32, in the channels-last layout that the model has too."""
        images_BCHW = normalise(batch["images_BCHW"], config.preprocess())
        return images_BCHW.contiguous(memory_format=torch.channels_last)


class TwoTowerRecipe(BaseRecipe):
    """Recipes that compare images with texts; a subclass adds its loss."""

    needs: frozenset[Part] = frozenset({"image", "text"})

    def build(self, config: Any, classes: Sequence[str]) -> TwoTower:
        """Two fresh towers."""
        return TwoTower(
            config.visual,
            config.text,
            embed_dim=config.embed_dim,
            logit_scale_init=config.logit_scale_init,
            logit_scale_max=config.logit_scale_max,
            projection_std=config.projection_std,
        )

    def tokenizer(self, config: Any) -> TextReader:
        """What texts are read with, in training and after: CLIP's byte pairs."""
        return _tokenizer(config.text.spec())

    def collate(self, config: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Images, tokens padded to the longest text of the batch, labels (-1: a caption)."""
        texts = [sample.text for sample in samples]
        assert all(text is not None for text in texts), f"{self.name} needs texts"
        return {
            "images_BCHW": torch.stack([sample.image_CHW for sample in samples]),
            "tokens_BL": self.tokenizer(config)(texts),
            "labels_B": torch.tensor([sample.label for sample in samples]),
        }

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """Both towers, then ``contrast``."""
        image_BE, text_BE, logit_scale = self.embed(model, batch, config)
        return {"loss": self.contrast(image_BE, text_BE, logit_scale, batch, config), "logit_scale": logit_scale}

    def embed(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(image_BE, text_BE, logit_scale)``: each row from its own image and text."""
        image_BE, text_BE, logit_scale = model(self.images(batch, config), batch["tokens_BL"])
        return image_BE, text_BE, logit_scale

    def contrast(
        self,
        image_BE: torch.Tensor,
        text_BE: torch.Tensor,
        logit_scale: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        config: Any,
    ) -> torch.Tensor:
        """The loss of unit-norm embeddings: the part that looks at the whole batch."""
        raise NotImplementedError

    def contrastive(self, config: Any) -> TwoTowerRecipe | None:
        """The recipe itself where it has a ``contrast``; one with another kind of loss has none."""
        return self if type(self).contrast is not TwoTowerRecipe.contrast else None

    def takes_blocks(self, config: Any) -> bool:
        """Where it has a ``contrast``."""
        return self.contrastive(config) is not None

    def after_step(self, model: torch.nn.Module) -> None:
        """Hold the logit scale at its maximum, where there is one."""
        assert isinstance(model, TwoTower), "a two-tower recipe trains a TwoTower"
        model.clamp_logit_scale()

    def export(self, model: torch.nn.Module, config: Any, classes: Sequence[str]) -> Backbone:
        """Both towers."""
        assert isinstance(model, TwoTower), "a two-tower recipe trains a TwoTower"
        return export_two_tower(
            model,
            model_id=self.name,
            recipe=self.name,
            preprocess=config.preprocess(),
            tokenizer=self.tokenizer(config),
            pretrain_data=config.data,
        )


@cache
def _tokenizer(spec: TextSpec) -> Tokenizer:
    return Tokenizer(spec)


TINY_TEXT = TextConfig(width=128, layers=2, heads=4, context_length=32)
"""Two layers suffice for captions of a dozen words; the token embedding alone is 6.3M of its 6.8M parameters."""

TINY_RUN: Mapping[str, Any] = {
    "steps": 600,  # one to one and a half minutes on two cores for two towers
    "batch_size": 64,
    "optim": OptimConfig(
        lr=8e-3,
        # At the image tower's rate the text tower reads a caption as a bag of words and never learns who is left of
        # whom.
        lr_factors={"^text": 0.25},
        weight_decay=0.1,
        betas=(0.9, 0.98),
        eps=1e-6,
        clip_norm=1.0,
    ),
    "schedule": ScheduleConfig(warmup=0.1, final=0.0),
    "visual": VisualConfig(arch="timm:test_resnet", image_size=64),
    # Mild: texts name colours, sizes and sides, so nothing may change them.
    "augment": Augment(crop_scale=(0.9, 1.0), crop_ratio=(0.95, 1.05), flip=False),
    "checkpoint_every": 250,
}
"""What the tiny presets of all recipes share, so that they see the same number of images through the same tower."""
ABOUT_TINY = (
    "What two CPU cores learn from the embedded world in about a minute. Values found on that world, none published; "
    "steps, batch, tower and AdamW are those of every recipe's tiny preset, so that recipes are compared under one "
    "optimizer."
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
