"""Settings that every fine-tuning has: how the run goes, what of the backbone learns, how the weights are chosen.

A preset's values lie under what is given, and what is stored are the values that result: a stored configuration says
everything, and read back it is itself, whatever has become of the preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from vlbench.core.config import Config
from vlbench.core.names import unknown
from vlbench.train.run_config import RunConfig


class FinetuneConfig(RunConfig):
    """What a fine-tuning needs to know. A subclass adds its own settings and its ``PRESETS``."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"tiny": {}, "paper": {}}
    """Values by preset name; groups of settings may be given in part."""

    preset: str = Field(default="tiny", description="whose values count where none are given: tiny, paper, ...")
    backbone: Literal["frozen", "trained"] = Field(
        default="frozen", description="frozen: the backbone gives features and stays as it is; trained: it learns too"
    )
    backbone_lr: float = Field(
        default=1.0,
        gt=0,
        description="factor on the learning rate of the backbone, where it is trained: of parameters whose names begin "
        "with 'visual', unless optim.lr_factors says otherwise of them",
    )
    select: Literal["best", "last"] = Field(
        default="best", description="the weights that are kept: of the step that is best on held-out data, or the last"
    )
    judge_every: int = Field(
        default=500, ge=1, description="steps between looks at the held-out data, a checkpoint at each; the end is one"
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="share of the training images, drawn by content, that is kept to choose on where the data have no "
        "split for it that is not reported",
    )
    search: tuple[float, ...] = Field(
        default=(),
        description="factors on optim.lr: each is trained, and the best on held-out data is taken; empty: no search",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        name = given.get("preset", cls.model_fields["preset"].default)
        if not isinstance(name, str) or name not in cls.PRESETS:
            raise ValueError(unknown("preset", str(name), cls.PRESETS))
        return _over(given, cls.PRESETS[name], cls)

    @field_validator("search")
    @classmethod
    def _factors_are_rates(cls, search: tuple[float, ...]) -> tuple[float, ...]:
        if any(factor <= 0 for factor in search) or len(set(search)) < len(search):
            raise ValueError("expected different factors above 0, for instance [0.3, 1, 3]")
        return search

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.shard:
            raise ValueError("shard: the first rank judges the whole model, so each rank has all of its weights")
        if self.grad_cache or self.loss_block is not None:
            name = "grad_cache" if self.grad_cache else "loss_block"
            raise ValueError(f"{name}: for losses that compare a batch's images with its texts; leave it out")
        return self

    def judges_at(self, step: int) -> bool:
        """Whether the model is measured on held-out data after ``step`` steps."""
        return step % self.judge_every == 0 or step == self.steps

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after ``step`` steps: a judgement that was interrupted is made again."""
        return super().saves_at(step) or self.judges_at(step)

    def asked_in(self, precision: str) -> Self:
        """The settings under which a tuned model that holds its backbone is asked what is reported.

        ``precision`` is the call's. Training, and every look at the held-out data, are of the protocol's own; where
        that is bf16, the model is asked in it as well.
        """
        return self if precision == "fp32" else self.model_copy(update={"precision": precision})

    def notes_on_asking(self) -> list[str]:
        """What a result says where the call's precision has no part in it."""
        own = self.precision
        return [] if own == "fp32" else [f"asked in {own}, as its protocol trains it: --precision changes nothing here"]

    def at_rate(self, factor: float) -> Self:
        """The settings of one run: ``factor`` times the learning rate, the backbone's own factor, no search."""
        factors = dict(self.optim.lr_factors)
        if self.backbone == "trained":
            factors = factors | {"^visual": factors.get("^visual", self.backbone_lr)}
        optim = self.optim.model_copy(update={"lr": self.optim.lr * factor, "lr_factors": factors})
        return self.model_copy(update={"optim": optim, "search": ()})


def _over(given: Mapping[str, Any], base: Mapping[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """``given`` over ``base``, group of settings by group; anything else that is given replaces the base's whole."""
    whole = dict(base)
    for key, value in given.items():
        field = kind.model_fields.get(key)
        group: Any = field.annotation if field is not None else None
        below = whole.get(key)
        if isinstance(group, type) and issubclass(group, Config) and isinstance(value, Mapping) and below is not None:
            below = below.model_dump() if isinstance(below, Config) else below
            whole[key] = _over(value, below, group)
        else:
            whole[key] = value
    return whole
