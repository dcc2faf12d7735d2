"""Pairs of images and texts that a model reads together, with the images' regions in the pixels that it is given.

A pair's score is kept like a feature, so that several processes can divide the pairs, and a killed one loses seconds.

Shape suffixes: B batch, M texts, C channels, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vlbench.adapters.encoder import SHARD_SECONDS
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest
from vlbench.core.types import Example, Region
from vlbench.data.digests import content_digests
from vlbench.data.regions.open import stamp

if TYPE_CHECKING:
    import torch

    from vlbench.core.cards import Preprocess
    from vlbench.core.types import Source
    from vlbench.data.transforms import EvalTransform

RegionsOf: TypeAlias = Callable[[Example], Sequence[Region]]
"""The regions of an example, boxes in pixels of its image."""
SHARD_ROWS = 1 << 16
"""Scores appended to the store at once, at most a batch more."""


@dataclass(frozen=True)
class _Asked:
    """One image and what it is compared with."""

    index: int
    texts: Sequence[str]
    rows: list[str]
    """The key of each pair: of all that the example says, its regions too, and of the text."""

    @property
    def key(self) -> str:
        """What tells it from every other entry."""
        return digest(" ".join(self.rows).encode())


def match_scores(
    encoder: Any, source: Source, indices: Sequence[int], texts: Sequence[Sequence[str]], *, features: str | None
) -> list[np.ndarray]:
    """``p(match)`` as ``Encoder.match`` gives it: each process scores the pairs of its share of the images.

    Args:
        encoder: the Encoder: its backbone, store, share, batch size, device, workers, progress and counts.
        source: the images, whose regions go along.
        indices: which images.
        texts: what each is compared with.
        features: a file of region features, or None.
    """
    table = encoder.table("pairs", regions=None if features is None else stamp(features))
    asked = _asked(source, indices, texts, by_id=features is not None)
    by_key = {one.key: one for one in asked}
    with encoder.share("pairs", list(by_key)) as mine:
        own = [by_key[key] for key in mine]
        absent = set(table.missing([row for one in own for row in one.rows], ("p",)))
        queue = [one for one in own if not absent.isdisjoint(one.rows)]
        encoder.stats.images_reused += len(own) - len(queue)
        began = time.perf_counter()
        if queue:
            _score(encoder, source, queue, table, features=features)
            encoder.stats.images_encoded += len(queue)
            encoder.stats.image_seconds += time.perf_counter() - began
    rows = [row for one in asked for row in one.rows]
    if len(mine) < len(by_key):
        encoder.require(table, rows, ("p",))
    p_M = table.gather(rows, ("p",))["p"][:, 0]
    return np.split(p_M, np.cumsum([len(one.rows) for one in asked])[:-1])


def _asked(source: Source, indices: Sequence[int], texts: Sequence[Sequence[str]], *, by_id: bool) -> list[_Asked]:
    """The images with their texts. Regions of a file are found there by the example's id, a part of the key then."""
    examples, ids = content_digests(source).examples, source.ids()
    found = []
    for index, row in zip(indices, texts, strict=True):
        whole = f"{examples[index]} {ids[index]}" if by_id else examples[index]
        found.append(_Asked(index, row, [digest(f"{whole} {text}".encode("utf-8", "surrogatepass")) for text in row]))
    return found


def _score(encoder: Any, source: Source, queue: Sequence[_Asked], table: Any, *, features: str | None) -> None:
    """Append the scores of these, some seconds' worth at a time."""
    from vlbench.data.transforms import normalise

    card, indices = encoder.backbone.card, [one.index for one in queue]
    batches = viewed_batches(
        source, indices, card.preprocess, _regions_from(features), size=encoder.batch_size, workers=encoder.workers
    )
    waiting: dict[str, float] = {}
    done, began = 0, time.perf_counter()
    for images_BCHW, regions in batches:
        here = queue[done : done + len(images_BCHW)]
        image_of = [image for image, one in enumerate(here) for _ in one.texts]
        with encoder.mode():
            images_BCHW = normalise(images_BCHW.to(encoder.device), card.preprocess)
            p_M = encoder.backbone.match(
                images_BCHW, [text for one in here for text in one.texts], image_of=image_of, regions=regions
            )
        scores = p_M.cpu().numpy()
        if scores.shape != (len(image_of),) or not np.isfinite(scores).all():
            raise UserError(
                f"{card.id}: p(match) of {len(image_of)} pairs has shape {scores.shape} or is not finite; check the "
                "weights, or run with --precision fp32"
            )
        waiting.update(zip((row for one in here for row in one.rows), scores.tolist(), strict=True))
        done += len(here)
        if done == len(queue) or len(waiting) >= SHARD_ROWS or time.perf_counter() - began >= SHARD_SECONDS:
            table.append(list(waiting), {"p": np.array(list(waiting.values()), dtype=np.float32)[:, None]})
            waiting, began = {}, time.perf_counter()
        if encoder.progress:
            encoder.progress(done, len(queue))


def viewed_batches(
    source: Source, indices: Sequence[int], preprocess: Preprocess, regions_of: RegionsOf, *, size: int, workers: int
) -> Iterator[tuple[torch.Tensor, list[tuple[Region, ...]]]]:
    """uint8 ``images_BCHW`` of the examples at ``indices`` and each one's regions, in order, ``size`` at a time.

    A region of which the preprocessing's crop leaves less than a pixel is left out, as in training.

    Raises:
        BadExample: where an image cannot be read.
    """
    from vlbench.data.loading import in_batches, loaded
    from vlbench.data.transforms import eval_transform

    batches = in_batches(indices, size)
    view = partial(_viewed, source, eval_transform(preprocess), regions_of)
    return loaded(view, batches, workers=min(workers, len(batches)))


def _viewed(
    source: Source, transform: EvalTransform, regions_of: RegionsOf, indices: Sequence[int]
) -> tuple[torch.Tensor, list[tuple[Region, ...]]]:
    import torch

    from vlbench.data.images import image_at

    images, regions = [], []
    for index in indices:
        example, image = image_at(source, index)
        own = tuple(regions_of(example))
        # With features they speak of the whole image, whatever a crop shows of it.
        whole = any("feature" in region.attributes for region in own)
        images.append(transform(image))
        regions.append(own if whole else transform.view(image).regions(own))
    return torch.stack(images), regions


def _regions_from(features: str | None) -> RegionsOf:
    """An example's own regions, or those of a file, with the features that they have there."""
    if features is None:
        return lambda example: example.regions
    from vlbench.data.regions.open import open_regions

    store = open_regions(features)

    def regions_of(example: Example) -> Sequence[Region]:
        try:
            found = store[example.id]
        except KeyError as error:
            raise UserError(str(error.args[0])) from None
        tags = found.tags or [""] * len(found)
        parts = zip(tags, found.boxes_N4.tolist(), found.features_ND, found.box_vectors(), strict=True)
        return [
            Region(tag, tuple(box), attributes={"feature": feature, "box_vector": vector})
            for tag, box, feature, vector in parts
        ]

    return regions_of
