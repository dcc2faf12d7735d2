"""The settings that every recipe shares. A recipe's own Config extends ``PretrainConfig``.

A comment or description says what a setting does; where a preset's value comes from is written beside the preset.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlbench.core.cards import Preprocess
from vlbench.core.config import Config
from vlbench.data.transforms import Augment
from vlbench.models.vision import VisualConfig


class OptimConfig(Config):
    """The optimizer."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, description="at the peak of the schedule")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled for adamw, added to the gradient for sgd")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="adamw")
    eps: float = Field(default=1e-6, gt=0, description="adamw")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd")
    clip_norm: float | None = Field(default=None, gt=0, description="largest gradient norm; None: no clipping")
    decay_vectors: bool = Field(
        default=False, description="also decay biases, gains and other parameters of fewer than two dimensions"
    )
    no_decay: tuple[str, ...] = Field(
        default=("logit_scale$",), description="regular expressions; a parameter whose name one finds is not decayed"
    )

    lr_factors: dict[str, float] = Field(
        default_factory=dict,
        description="regular expression → factor on the learning rate of the parameters whose names it finds; the "
        "first that finds counts",
    )

    @field_validator("no_decay", "lr_factors")
    @classmethod
    def _are_patterns(cls, patterns: Any) -> Any:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns


class ScheduleConfig(Config):
    """The learning rate over the run, as a share of its peak."""

    kind: Literal["cosine", "linear", "constant", "step"] = "cosine"
    warmup: float = Field(
        default=0.1, ge=0, description="linear rise to the peak: below 1 a share of all steps, else a number of steps"
    )
    start: float = Field(default=0.0, ge=0, le=1, description="where the rise starts, as a share of the peak")
    final: float = Field(default=0.0, ge=0, le=1, description="where cosine and linear end, as a share of the peak")
    drops: int = Field(default=2, ge=0, description="step: how many equally spaced drops")
    factor: float = Field(default=0.1, gt=0, description="step: what is left of the rate after each drop")


class EvalImages(Config):
    """How images are prepared when the trained backbone is measured; it travels with the checkpoint."""

    resize_to: int | None = Field(
        default=None, description="shortest side before the centre crop; None: the input size"
    )
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = Field(
        default=(0.48145466, 0.4578275, 0.40821073), description="in training too; CLIP's [C:clip/clip.py]"
    )
    std: tuple[float, float, float] = Field(
        default=(0.26862954, 0.26130258, 0.27577711), description="in training too; CLIP's [C:clip/clip.py]"
    )


class PretrainConfig(Config):
    """What a run of any recipe needs to know."""

    data: tuple[str, ...] = Field(
        default=(), description="data specs; several are mixed by their weights (A@2 B@1), by default equally"
    )
    steps: int = Field(default=500, ge=1, description="optimizer steps")
    batch_size: int = Field(default=64, ge=1, description="examples an optimizer step, over all ranks")
    accumulate: int = Field(
        default=1,
        ge=1,
        description="parts into which a batch is cut to save memory. Gradients are averaged over the parts, so a "
        "contrastive loss sees negatives within a part only",
    )
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    visual: VisualConfig = VisualConfig(arch="timm:test_resnet", image_size=64)
    augment: Augment = Augment()
    eval_images: EvalImages = EvalImages()
    templates: str = Field(
        default="auto",
        description="prompts for examples that have a label and no text: auto (those beside the data, else simple), "
        "simple, imagenet81, or a file with one template a line, {} for the class name",
    )
    languages: tuple[str, ...] = Field(default=("en",), description="languages whose captions are used")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast; weights stay fp32")
    compile: bool = Field(default=False, description="torch.compile the model")
    workers: int = Field(default=1, ge=0, description="loader processes of each rank; 0: load in the main process")
    checkpoint_every: int = Field(default=1000, ge=1, description="steps between checkpoints; the end is always kept")
    log_every: int = Field(default=20, ge=1, description="steps between lines of the log")
    seed: int = Field(default=0, ge=0, description="of initialisation, data order, augmentation and dropout")
    max_bad: float = Field(
        default=0.01,
        ge=0,
        description="bad examples that stop the run: below 1 a share of the samples drawn (from the eleventh on), else "
        "a number of different examples. Each rank counts the samples that it draws itself",
    )

    @model_validator(mode="after")
    def _parts_are_whole(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into accumulate={self.accumulate} equal parts"
            )
        return self

    def preprocess(self) -> Preprocess:
        """What the checkpoint's card says of images."""
        side = self.visual.image_size
        return Preprocess(image_size=(side, side), resize="shortest", **self.eval_images.model_dump())


# Settings that change how fast a run goes or what it writes, never its weights: a resumed run may change them.
FREE_ON_RESUME = frozenset({"workers", "checkpoint_every", "log_every", "max_bad"})
