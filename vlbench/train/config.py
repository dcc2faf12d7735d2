"""The settings that every recipe shares. A recipe's own Config extends ``PretrainConfig``.

A comment or description says what a setting does; where a preset's value comes from is written beside the preset.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from vlbench.core.cards import Preprocess
from vlbench.core.config import Config
from vlbench.data.transforms import Augment
from vlbench.models.vision import VisualConfig
from vlbench.train.run_config import FREE_ON_RESUME, OptimConfig, RunConfig, ScheduleConfig

__all__ = ["FREE_ON_RESUME", "EvalImages", "OptimConfig", "PretrainConfig", "RunConfig", "ScheduleConfig"]


class EvalImages(Config):
    """How images are prepared when the trained backbone is measured; it travels with the checkpoint."""

    resize: Literal["shortest", "squash"] = Field(
        default="shortest", description="shortest: keep the aspect; squash: to a square; then crop the centre"
    )
    resize_to: int | None = Field(
        default=None, description="shortest side (of the square, for squash) before that; None: the input size"
    )
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = Field(
        default=(0.48145466, 0.4578275, 0.40821073), description="in training too; CLIP's [C:clip/clip.py]"
    )
    std: tuple[float, float, float] = Field(
        default=(0.26862954, 0.26130258, 0.27577711), description="in training too; CLIP's [C:clip/clip.py]"
    )


class PretrainConfig(RunConfig):
    """What a run of any recipe needs to know."""

    data: tuple[str, ...] = Field(
        default=(), description="data specs; several are mixed by their weights (A@2 B@1), by default equally"
    )
    visual: VisualConfig = VisualConfig(arch="timm:test_resnet", image_size=64)
    augment: Augment = Augment()
    eval_images: EvalImages = EvalImages()
    templates: str = Field(
        default="auto",
        description="prompts for examples that have a label and no text: auto (those beside the data, else simple), "
        "simple, imagenet81, or a file with one template a line, {} for the class name",
    )
    order: Literal["shuffle", "shards"] = Field(
        default="shuffle",
        description="shuffle: each epoch is one shuffle of all examples; shards: each rank reads shards of its own, "
        "few at a time, in an order that is new in each epoch, for data that the machine cannot keep in memory",
    )
    open_shards: int = Field(default=8, ge=1, description="order=shards: shards whose examples are shuffled together")
    languages: tuple[str, ...] = Field(default=("en",), description="languages whose captions are used")

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        resize_to, side = self.augment.resize_to, self.visual.image_size
        if resize_to is not None and resize_to < side:
            raise ValueError(f"augment.resize_to {resize_to}: a crop of visual.image_size={side} is not in it")
        return self

    def preprocess(self) -> Preprocess:
        """What the checkpoint's card says of images."""
        side = self.visual.image_size
        return Preprocess(image_size=(side, side), **self.eval_images.model_dump())
