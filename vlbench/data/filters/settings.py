"""The rules of ``vlbench data filter``, their order and their thresholds.

The rules are those of ALIGN's data (Jia et al., ICML 2021, 2102.05918, section 3), in the paper's order. The paper
also drops pornographic images; that needs a classifier which it does not name, so there is no such rule here.
"""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

from pydantic import Field, model_validator

from vlbench.core.config import Config
from vlbench.core.names import unknown

Rule: TypeAlias = Literal[
    "unreadable",
    "incomplete",
    "small",
    "aspect",
    "many-texts",
    "near-duplicate",
    "shared-text",
    "rare-ngram",
    "length",
]

RULES: Final[dict[Rule, str]] = {
    "unreadable": "a part cannot be read",
    "incomplete": "no image, or no text",
    "small": "shorter side at most {min_side} px",
    "aspect": "longer side at least {max_aspect:g} times the shorter",
    "many-texts": "image with more than {max_texts:,} texts",
    "near-duplicate": "near-duplicate of an evaluation image",
    "shared-text": "text of more than {max_images:,} images",
    "rare-ngram": "a word or pair of words outside the {top_ngrams:,} most frequent",
    "length": "not {min_words} to {max_words} words",
}
"""In the order in which a sample is charged to one; with what removes it."""

ALWAYS: Final[tuple[Rule, ...]] = ("unreadable", "incomplete")
"""These cannot be switched off: nothing can train on such samples."""

SKIPPABLE: Final = tuple(rule for rule in RULES if rule not in ALWAYS)

PHASH: Final = "phash"


class FilterConfig(Config):
    """Thresholds; the defaults are the paper's where it has them."""

    # [N-ALIGN]: third-party notes of ALIGN's paper, which reproduce its section 3.
    min_side: int = Field(default=200, ge=0, description="the shorter side must be larger, in pixels")  # [N-ALIGN]
    max_aspect: float = Field(default=3.0, gt=1, description="longer over shorter side must be less")  # [N-ALIGN]
    max_texts: int = Field(default=1000, ge=1, description="largest number of different texts an image")  # [N-ALIGN]
    max_images: int = Field(default=10, ge=1, description="largest number of different images a text")  # [N-ALIGN]
    top_ngrams: int = Field(default=100_000_000, ge=1, description="words and pairs of words kept")  # [N-ALIGN]
    min_words: int = Field(default=3, ge=0, description="fewest words of a text")  # [N-ALIGN]
    max_words: int = Field(default=20, ge=1, description="most words of a text")  # [N-ALIGN]
    near_duplicates: str = Field(default=PHASH, min_length=1, description="'phash', or a model as in --model")
    max_distance: int = Field(default=4, ge=0, le=16, description="differing bits of 64, for phash; ours")
    min_cosine: float = Field(default=0.975, gt=0, lt=1, description="cosine must be larger, for a model")  # [N-ALIGN]
    against: tuple[str, ...] = Field(default=(), description="data specs of evaluation images; the test split of each")
    skip: tuple[str, ...] = Field(default=(), description="rules that are switched off")
    decode: bool = Field(default=False, description="decode every image in full; always so with 'against'")
    allow_truncated: bool = Field(default=False, description="filter what lies before the cut of a shard that is cut")

    @model_validator(mode="after")
    def _makes_sense(self) -> FilterConfig:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words is {self.min_words}, more than max_words, {self.max_words}")
        if not math.isfinite(self.max_aspect):
            raise ValueError("max_aspect must be a number; --skip aspect switches the rule off")
        for rule in self.skip:
            if rule not in SKIPPABLE:
                raise ValueError(f"skip: {unknown('rule', rule, SKIPPABLE)}")
        return self

    def uses(self, rule: Rule) -> bool:
        """Whether ``rule`` is on. Near-duplicates need something to be compared with."""
        return rule not in self.skip and (rule != "near-duplicate" or bool(self.against))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that are on, in order."""
        return tuple(rule for rule in RULES if self.uses(rule))

    @property
    def decodes(self) -> bool:
        """Whether every image is decoded in full, rather than its header alone read."""
        return self.decode or self.uses("near-duplicate")

    @property
    def hashes(self) -> bool:
        """Whether images get a perceptual hash."""
        return self.uses("near-duplicate") and self.near_duplicates == PHASH

    def removes(self, rule: Rule) -> str:
        """What ``rule`` removes, in words, with its threshold."""
        return RULES[rule].format(**self.model_dump())
