"""Pairs of images and texts that a model reads together, with the images' regions in the pixels that it is given.

Shape suffixes: B batch, M texts, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.types import Example, Region

if TYPE_CHECKING:
    import torch

    from vlbench.core.cards import Preprocess
    from vlbench.core.types import Source

RegionsOf: TypeAlias = Callable[[Example], Sequence[Region]]
"""The regions of an example, boxes in pixels of its image."""


def match_scores(
    encoder: Any,
    mode: Callable[[], AbstractContextManager[None]],
    source: Source,
    indices: Sequence[int],
    texts: Sequence[Sequence[str]],
    *,
    features: str | None,
) -> list[np.ndarray]:
    """``p(match)`` as ``Encoder.match`` gives it.

    Args:
        encoder: the Encoder: its backbone, batch size, device, workers and progress.
        mode: its arithmetic.
        source: the images, whose regions go along.
        indices: which images.
        texts: what each is compared with.
        features: a file of region features, or None.
    """
    from vlbench.data.transforms import normalise

    card = encoder.backbone.card
    batches = viewed_batches(
        source, indices, card.preprocess, _regions_from(features), size=encoder.batch_size, workers=encoder.workers
    )
    found: list[np.ndarray] = []
    for images_BCHW, regions in batches:
        rows = texts[len(found) : len(found) + len(images_BCHW)]
        image_of = [image for image, row in enumerate(rows) for _ in row]
        with mode():
            images_BCHW = normalise(images_BCHW.to(encoder.device), card.preprocess)
            p_M = encoder.backbone.match(
                images_BCHW, [text for row in rows for text in row], image_of=image_of, regions=regions
            )
        scores = p_M.cpu().numpy()
        if scores.shape != (len(image_of),) or not np.isfinite(scores).all():
            raise UserError(
                f"{card.id}: p(match) of {len(image_of)} pairs has shape {scores.shape} or is not finite; check the "
                "weights, or run with --precision fp32"
            )
        found += np.split(scores, np.cumsum([len(row) for row in rows])[:-1])
        if encoder.progress:
            encoder.progress(len(found), len(indices))
    return found


def viewed_batches(
    source: Source, indices: Sequence[int], preprocess: Preprocess, regions_of: RegionsOf, *, size: int, workers: int
) -> Iterator[tuple[torch.Tensor, list[tuple[Region, ...]]]]:
    """uint8 ``images_BCHW`` of the examples at ``indices`` and each one's regions, in order, ``size`` at a time.

    A region of which the preprocessing's crop leaves less than a pixel is left out, as in training.

    Raises:
        BadExample: where an image cannot be read.
    """
    from torch.utils.data import DataLoader

    viewed: Any = _Viewed(source, indices, preprocess, regions_of)
    workers = min(workers, -(-len(indices) // size))
    for images_BCHW, regions, error in DataLoader(viewed, size, num_workers=workers, collate_fn=_stack):
        if error is not None:
            raise error
        yield images_BCHW, regions


class _Viewed:
    """One preprocessed image and its regions; a broken example comes back as its error, as in ``encoder``."""

    def __init__(self, source: Source, indices: Sequence[int], preprocess: Preprocess, regions_of: RegionsOf) -> None:
        from vlbench.data.transforms import eval_transform

        self.source, self.indices, self.regions_of = source, indices, regions_of
        self.transform = eval_transform(preprocess)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, tuple[Region, ...]] | UserError:
        from vlbench.data.images import decode

        try:
            example = self.source[self.indices[position]]
            where = f"{self.source.spec} ({self.source.split}): {example.id}"
            if example.image is None:
                return UserError(f"{where}: has no image")
            image = decode(example.image, where=where)
            regions, view = tuple(self.regions_of(example)), self.transform.view(image)
            if any("feature" in region.attributes for region in regions):
                return self.transform(image), regions  # they speak of the whole image, whatever a crop shows of it
            moved = (replace(region, box_xyxy=view.box(region.box_xyxy)) for region in regions)
            return self.transform(image), tuple(region for region in moved if _shows(region.box_xyxy))
        except UserError as error:  # BadExample among them
            return error


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


def _shows(box_xyxy: Sequence[float]) -> bool:
    return min(box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1]) >= 1


def _stack(items: Sequence[Any]) -> tuple[Any, Any, UserError | None]:
    import torch

    for item in items:
        if isinstance(item, UserError):
            return None, None, item
    return torch.stack([image for image, _ in items]), [regions for _, regions in items], None
