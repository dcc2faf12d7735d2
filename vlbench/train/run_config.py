"""How a run goes, whatever it learns from: its length, its batches, its optimizer, its checkpoints.

Pretraining and fine-tuning share these settings, as they share the loop. Nothing here loads torch.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlbench.core.config import Config


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

    kind: Literal["cosine", "linear", "constant", "step", "milestones"] = "cosine"
    warmup: float = Field(
        default=0.1, ge=0, description="linear rise to the peak: below 1 a share of all steps, else a number of steps"
    )
    start: float = Field(default=0.0, ge=0, le=1, description="where the rise starts, as a share of the peak")
    final: float = Field(default=0.0, ge=0, le=1, description="where cosine and linear end, as a share of the peak")
    drops: int = Field(default=2, ge=0, description="step: how many equally spaced drops")
    milestones: tuple[float, ...] = Field(
        default=(), description="milestones: where the drops are, as shares of all steps, warm-up included, ascending"
    )
    factor: float = Field(
        default=0.1, gt=0, description="step and milestones: what is left of the rate after each drop"
    )

    @model_validator(mode="after")
    def _milestones_are_shares(self) -> Self:
        marks = self.milestones
        if self.kind == "milestones" and not marks:
            raise ValueError("kind=milestones wants milestones, the shares of the steps at which the rate drops")
        if list(marks) != sorted(set(marks)) or any(not 0 < mark < 1 for mark in marks):
            raise ValueError(f"milestones {list(marks)}: expected ascending shares of the steps, between 0 and 1")
        return self


class RunConfig(Config):
    """What the training loop needs to know of a run."""

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
        description="rows of a contrastive loss's logits that are in memory at once; None: all of this rank's. For "
        "recipes and variants with such a loss",
    )
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
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

    @property
    def loads(self) -> int:
        """Parts in which a batch comes from the loader. A batch that ``grad_cache`` joins comes whole."""
        return 1 if self.grad_cache else self.accumulate

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after ``step`` steps."""
        return step % self.checkpoint_every == 0 or step == self.steps


def learner(recipe: str, config: RunConfig) -> str:
    """What a message calls a recipe: its name, and the variant's where it has variants."""
    variant = getattr(config, "variant", None)
    return recipe if variant is None else f"{recipe} (variant {variant})"


# Settings that change how fast a run goes or what it writes, never its weights: a resumed run may change them.
FREE_ON_RESUME = frozenset({"workers", "checkpoint_every", "log_every", "max_bad", "checkpoint_activations"})
