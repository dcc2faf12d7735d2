"""Image-text matching: whether a model that reads image and caption together knows which belong to each other.

Every image gets a pool of captions: its own first one and the first ones of other images, drawn by its id, so that
neither the order of the data nor the size of a batch moves a number. What is measured:

- ``roc_auc``, the headline: the own caption against the first of the others, over all images. It compares across
  images, as a threshold does. Chance 0.5.
- ``accuracy``: the same pairs, called a match above p = 0.5.
- ``right_object``: whether the best caption of the pool names the image's main object (its largest region) by the
  region's tag. Two captions may both name it, and chance is the pool's own share of such captions.
- ``pool_recall@1``: whether the best caption is the own one. Chance is one over the pool.

Captions that tie for the best share the point, so that a model which says the same of everything is exactly at chance.
A caption that the image has too, word for word, is never drawn against it.

Boxes are given to the model where the data have them; what it does without is its own affair (``models/export.py``).

Shape suffixes: N images, M captions of a pool.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from vlbench.adapters.common.classification import IMAGE_DIGITS, estimates, levels
from vlbench.core.config import Config as BaseConfig
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest
from vlbench.core.types import Estimate, Example, Outcomes, Part, Provides, Rows
from vlbench.data.regions.open import stamp
from vlbench.data.sources import without_images
from vlbench.stats.ranked import pseudo_values, roc_auc

_OWN, _AGAINST = 0, 1  # places in a pool: the own caption, and the one that ROC-AUC and accuracy hold against it


class Config(BaseConfig):
    """Settings of matching."""

    pool: int = Field(default=50, ge=2, description="captions that each image is compared with, its own included")
    language: str = Field(default="en", description="language of the captions")
    seed: int = Field(default=0, ge=0, description="of the captions drawn")
    features: str | None = Field(
        default=None,
        description="file of region features of the test images, for models that read such (F.tsv?labels=L.tsv: with "
        "its objects in a second file)",
    )

    def contents(self) -> list[str]:
        """What lies in the file of features: its path alone does not say it."""
        return [] if self.features is None else [stamp(self.features)]


@dataclass(frozen=True)
class _Pool:
    """One image and the captions it is compared with; the own one first."""

    index: int
    id: str
    image: str
    captions: tuple[str, ...]
    names: tuple[bool, ...] | None
    """Whether each caption names the main object; None for an image without regions."""


class Matching:
    """The adapter. The unit of sampling is the image."""

    name: ClassVar[str] = "matching"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "roc_auc"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "text"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"match"})
    splits: ClassVar[tuple[str, ...]] = ("test",)
    together: ClassVar[bool] = True
    """Every process draws the same pools and scores a share of the pairs."""

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """One row a pair: ``id, image, place`` (0: the own caption), ``names, p``."""
        source = data.split("test")
        pools = build_pools(source, encoder.image_digests(source), config)
        scores = encoder.match(
            source, [pool.index for pool in pools], [pool.captions for pool in pools], features=config.features
        )
        places = [range(len(pool.captions)) for pool in pools]
        with_objects = all(pool.names is not None for pool in pools)
        columns: dict[str, Any] = {
            "id": [f"{pool.id}#{place}" for pool, row in zip(pools, places) for place in row],
            "image": [pool.image for pool, row in zip(pools, places) for _ in row],
            "place": np.concatenate([np.asarray(row) for row in places]),
            "p": np.concatenate(scores).astype(np.float32),
        }
        if with_objects:
            columns["names"] = np.concatenate([np.asarray(pool.names) for pool in pools])
        chance = {
            "roc_auc": 0.5,
            "accuracy": 0.5,
            "pool_recall@1": float(np.mean([1 / len(pool.captions) for pool in pools])),
        }
        if with_objects:
            chance["right_object"] = float(np.mean([np.mean(pool.names) for pool in pools if pool.names is not None]))
        notes = [] if with_objects else ["right_object is left out: not every image has a region to name"]
        return Rows(columns, {"images": len(pools), "pool": config.pool, "chance": chance, "notes": notes})

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``roc_auc``, ``accuracy``, ``pool_recall@1`` and, where images have regions, ``right_object``."""
        ids, images = np.asarray(rows["id"], dtype=object), np.asarray(rows["image"], dtype=object)
        place, p = np.asarray(rows["place"]), np.asarray(rows["p"], dtype=np.float64)
        pair = place <= _AGAINST
        own = (place == _OWN)[pair]
        pair_ids, pair_images = ids[pair].tolist(), images[pair].tolist()
        auc = pseudo_values(roc_auc(own.astype(np.int64), levels(p[pair])))
        right = ((p[pair] > 0.5) == own).astype(np.float64)
        found = {
            "roc_auc": Outcomes(pair_ids, auc, pair_images, binary=False, pseudo=True),
            "accuracy": Outcomes(pair_ids, right, pair_images, binary=True),
        }
        start_N = np.flatnonzero(place == _OWN)
        by_image = ids[start_N].tolist(), images[start_N].tolist()
        best = _shares_of_the_best(levels(p), start_N)
        hit_N = np.add.reduceat(best * (place == _OWN), start_N)
        found["pool_recall@1"] = Outcomes(by_image[0], hit_N, by_image[1], binary=_is_binary(hit_N))
        if "names" in rows.columns:
            named_N = np.add.reduceat(best * np.asarray(rows["names"], dtype=np.float64), start_N)
            found["right_object"] = Outcomes(by_image[0], named_N, by_image[1], binary=_is_binary(named_N))
        return found

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def build_pools(source: Any, digests: Sequence[str], config: Config) -> list[_Pool]:
    """The pools of all different images, sorted by id.

    Raises:
        UserError: where an image has no caption in the language, or there are too few different captions.
    """
    examples: dict[str, tuple[int, Example]] = {}
    for index, image in enumerate(digests):
        if image not in examples:
            examples[image] = (index, _captioned(source, index, config.language))
    order = sorted(examples, key=lambda image: examples[image][1].id)
    firsts = [examples[image][1].texts[config.language][0] for image in order]
    pools = []
    for number, image in enumerate(order):
        index, example = examples[image]
        captions = (firsts[number], *_others(example, firsts, config))
        pools.append(_Pool(index, example.id, image[:IMAGE_DIGITS], captions, _named(example, captions)))
    if len(pools) < 2:
        raise UserError(f"{source.spec} ({source.split}): matching needs two different images or more")
    return pools


def _captioned(source: Any, index: int, language: str) -> Example:
    example = without_images(source, index)
    if not example.texts.get(language):
        has = ", ".join(sorted(example.texts)) or "none"
        raise UserError(
            f"{source.spec} ({source.split}): {example.id}: no caption in language {language!r} (there: {has})"
        )
    return example


def _others(example: Example, firsts: Sequence[str], config: Config) -> list[str]:
    """Captions of other images, each once and none that this image has too, in an order drawn by its id."""
    rng = np.random.default_rng([config.seed, int(digest(example.id.encode("utf-8"))[:15], 16)])
    seen, found = set(example.texts[config.language]), []
    for other in rng.permutation(len(firsts)).tolist():
        if firsts[other] not in seen:
            seen.add(firsts[other])
            found.append(firsts[other])
            if len(found) == config.pool - 1:
                return found
    if not found:
        raise UserError(f"{example.id}: there is no caption of another image that is not one of its own")
    return found


def _named(example: Example, captions: Sequence[str]) -> tuple[bool, ...] | None:
    """Whether each caption names the main object, in whole words."""
    if not example.regions:
        return None
    main = max(example.regions, key=lambda region: _area(region.box_xyxy))
    return tuple(_names(main.category).search(caption) is not None for caption in captions)


def _area(box_xyxy: Sequence[float]) -> float:
    return (box_xyxy[2] - box_xyxy[0]) * (box_xyxy[3] - box_xyxy[1])


@cache
def _names(category: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(category)}(?!\w)", re.IGNORECASE)


def _shares_of_the_best(p: np.ndarray, start_N: np.ndarray) -> np.ndarray:
    """What each row has of its image's one point: an equal part for each caption that ties for the best."""
    counts_N = np.diff([*start_N, len(p)])
    at_top = p == np.repeat(np.maximum.reduceat(p, start_N), counts_N)
    shares: np.ndarray = at_top / np.repeat(np.add.reduceat(at_top.astype(np.float64), start_N), counts_N)
    return shares


def _is_binary(values_N: np.ndarray) -> bool:
    return bool(np.isin(values_N, (0.0, 1.0)).all())


ADAPTER = Matching()
