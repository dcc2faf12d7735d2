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

    name: Literal["adamw", "lamb", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, description="at the peak of the schedule")
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        description="decoupled for adamw; added to Adam's direction, before its norm is taken, for lamb; added to the "
        "gradient for sgd",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="adamw and lamb")
    eps: float = Field(default=1e-6, gt=0, description="adamw and lamb")
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
    lookahead_steps: int = Field(
        default=0,
        ge=0,
        description="k of LookAhead: after every k steps the weights return to lookahead_alpha of the way that these "
        "steps went; 0: no LookAhead",
    )
    lookahead_alpha: float = Field(default=0.5, gt=0, le=1, description="of LookAhead; 1 changes nothing")

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
        "contrastive loss sees negatives within a part only, unless grad_cache",
    )
    grad_cache: bool = Field(
        default=False,
        description="with accumulate: each part is embedded first, without gradients, so that a contrastive loss sees "
        "the negatives of the whole batch, and then once more with those of the loss: one forward pass more. A part "
        "still has BatchNorm statistics of its own",
    )
    loss_block: int | None = Field(
        default=None,
        ge=1,
        description="rows of a contrastive loss's logits that are in memory at once; None: all of this rank's",
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
    order: Literal["shuffle", "shards"] = Field(
        default="shuffle",
        description="shuffle: each epoch is one shuffle of all examples; shards: each rank reads shards of its own, "
        "few at a time, in an order that is new in each epoch, for data that the machine cannot keep in memory",
    )
    open_shards: int = Field(default=8, ge=1, description="order=shards: shards whose examples are shuffled together")
    languages: tuple[str, ...] = Field(default=("en",), description="languages whose captions are used")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast; weights stay fp32")
    compile: bool = Field(default=False, description="torch.compile the model")
    checkpoint_activations: bool = Field(
        default=False,
        description="keep the inputs of blocks only and compute the rest again in the backward pass: the same weights "
        "out of less memory, a third slower",
    )
    shard: bool = Field(
        default=False,
        description="under torchrun: each rank keeps a share of weights, gradients and optimizer state (FSDP), for "
        "towers that one device cannot hold",
    )
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
        if self.grad_cache and self.accumulate == 1:
            raise ValueError("grad_cache joins the parts of a batch, and accumulate=1 leaves it whole; set accumulate")
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        resize_to, side = self.augment.resize_to, self.visual.image_size
        if resize_to is not None and resize_to < side:
            raise ValueError(f"augment.resize_to {resize_to}: a crop of visual.image_size={side} is not in it")
        return self

    @property
    def loads(self) -> int:
        """Parts in which a batch comes from the loader. A batch that ``grad_cache`` joins comes whole."""
        return 1 if self.grad_cache else self.accumulate

    def preprocess(self) -> Preprocess:
        """What the checkpoint's card says of images."""
        side = self.visual.image_size
        return Preprocess(image_size=(side, side), **self.eval_images.model_dump())


# Settings that change how fast a run goes or what it writes, never its weights: a resumed run may change them.
FREE_ON_RESUME = frozenset({"workers", "checkpoint_every", "log_every", "max_bad", "checkpoint_activations"})
