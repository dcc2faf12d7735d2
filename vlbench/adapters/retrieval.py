"""Image-text retrieval in both directions, R@1/5/10, with several captions an image (as on COCO and Flickr30k).

Text to image: a caption is right where its own image is among the first k. Image to text: an image is right where any
of its captions is among the first k. The names are the field's: ``image_retrieval_recall@k`` is text to image.

Ties are resolved pessimistically: a wrong candidate that scores the same as the right one stands before it. A model
that says the same of everything therefore scores 0, never a lucky 100%. Entries with the same image bytes are one
image with all their captions; a caption that two images share stays wrong for the other, as everywhere, and is counted
in the notes.

Scores are made block by block and only ranks are kept (``common.exact_ranks``), so memory is O(N), not O(N x N).

Shape suffixes: N images, M captions, E joint width.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from vlbench.adapters.common.classification import IMAGE_DIGITS, estimates
from vlbench.adapters.common.copies import copies_note
from vlbench.adapters.common.exact_ranks import ranks
from vlbench.core.config import Config as BaseConfig
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows
from vlbench.data.sources import without_images

TEXT_TO_IMAGE, IMAGE_TO_TEXT = "text_to_image", "image_to_text"


class Config(BaseConfig):
    """Settings of retrieval."""

    k: tuple[int, ...] = Field(default=(1, 5, 10), description="ranks at which recall is reported")
    language: str = Field(default="en", description="language of the captions that are used")
    block_bytes: int = Field(default=1 << 26, ge=1, description="scores held at once; changes no number")


@dataclass(frozen=True)
class Gallery:
    """Distinct images and their captions."""

    images: tuple[str, ...]
    """Digest of every distinct image, in the order of first appearance."""
    first: np.ndarray
    """Index of each image's first entry in the source, ``(N,)``."""
    names: tuple[str, ...]
    """Id of that entry."""
    captions: tuple[str, ...]
    caption_ids: tuple[str, ...]
    owner_M: np.ndarray
    """Index of the image that each caption belongs to."""


class Retrieval:
    """The adapter. The unit of sampling is the image: captions of one image are one cluster."""

    name: ClassVar[str] = "retrieval"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "image_retrieval_recall@1"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "text"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"embed", "text"})
    splits: ClassVar[tuple[str, ...]] = ("test",)

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """One row a query, of both directions: ``id, direction, image, rank`` (of the best right candidate, from 1)."""
        source = data.split("test")
        features = encoder.images(source)
        gallery = build_gallery(source, features.digests, config.language)
        text_to_image_M, image_to_text_N = ranks(
            features.embed_NE[gallery.first],
            encoder.texts(gallery.captions),
            owner_M=gallery.owner_M,
            block_bytes=config.block_bytes,
            device=encoder.device,
        )
        images = np.array([image[:IMAGE_DIGITS] for image in gallery.images])
        n_texts, n_images = len(gallery.captions), len(gallery.images)
        columns = {
            "id": [*gallery.caption_ids, *gallery.names],
            "direction": [TEXT_TO_IMAGE] * n_texts + [IMAGE_TO_TEXT] * n_images,
            "image": [*images[gallery.owner_M].tolist(), *images.tolist()],
            "rank": np.concatenate([text_to_image_M, image_to_text_N]),
        }
        meta = {
            "images": n_images,
            "captions": n_texts,
            "language": config.language,
            "chance": _chance(gallery, config.k),
            "notes": [*_shared_captions(gallery), *copies_note(source.ids(), features.digests)],
        }
        return Rows(columns, meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``image_retrieval_recall@k``, ``text_retrieval_recall@k`` and their plain mean, ``mean_recall``."""
        direction = np.asarray(rows["direction"])
        rank = np.asarray(rows["rank"])
        ids, images = np.asarray(rows["id"], dtype=object), np.asarray(rows["image"], dtype=object)
        found: dict[str, Outcomes] = {}
        for metric, wanted in (("image_retrieval", TEXT_TO_IMAGE), ("text_retrieval", IMAGE_TO_TEXT)):
            here = direction == wanted
            for k in config.k:
                hits = (rank[here] <= k).astype(np.float64)
                found[f"{metric}_recall@{k}"] = Outcomes(ids[here].tolist(), hits, images[here].tolist(), binary=True)
        found["mean_recall"] = _mean_recall(found, rows)
        return found

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def build_gallery(source: Any, digests: tuple[str, ...], language: str) -> Gallery:
    """The distinct images of ``source`` with their captions in ``language``.

    Raises:
        UserError: where an image has no caption in that language: leaving it out would change the number.
    """
    owner_of: dict[str, int] = {}
    names, captions, caption_ids = list[str](), list[str](), list[str]()
    first, owners = list[int](), list[int]()
    for index, image in enumerate(digests):
        example = without_images(source, index)
        texts = example.texts.get(language, ())
        if not texts:
            has = ", ".join(sorted(example.texts)) or "none"
            raise UserError(
                f"{source.spec} ({source.split}): {example.id}: no caption in language {language!r} (there: {has})"
            )
        if image not in owner_of:
            owner_of[image] = len(first)
            first.append(index)
            names.append(example.id)
        captions.extend(texts)
        caption_ids.extend(f"{example.id}#{number}" for number in range(len(texts)))
        owners.extend([owner_of[image]] * len(texts))
    return Gallery(
        tuple(owner_of), np.array(first), tuple(names), tuple(captions), tuple(caption_ids), np.array(owners)
    )


def _mean_recall(found: dict[str, Outcomes], rows: Rows) -> Outcomes:
    """The mean of all recalls as one value a query: weights give every recall the same say."""
    ids = [f"{direction}:{name}" for direction, name in zip(rows["direction"], rows["id"])]
    values = np.zeros(len(ids))
    weights = np.zeros(len(ids))
    direction = np.asarray(rows["direction"])
    for metric, wanted in (("image_retrieval", TEXT_TO_IMAGE), ("text_retrieval", IMAGE_TO_TEXT)):
        here = direction == wanted
        values[here] = np.mean([o.values for name, o in found.items() if name.startswith(metric)], axis=0)
        weights[here] = 1.0 / here.sum()
    return Outcomes(ids, values, [str(image) for image in rows["image"]], binary=False, weights=weights)


def _chance(gallery: Gallery, ks: tuple[int, ...]) -> dict[str, float]:
    """Recalls of a random order without ties; image to text, one minus the chance of drawing no own caption."""
    n_images, n_texts = len(gallery.images), len(gallery.captions)
    owned = Counter(gallery.owner_M.tolist()).values()
    chance: dict[str, float] = {}
    for k in ks:
        chance[f"image_retrieval_recall@{k}"] = min(1.0, k / n_images)
        missed = [
            np.prod([max(0.0, (n_texts - count - draw) / (n_texts - draw)) for draw in range(min(k, n_texts))])
            for count in owned
        ]
        chance[f"text_retrieval_recall@{k}"] = 1.0 - float(np.mean(missed))
    return chance | {"mean_recall": float(np.mean(list(chance.values())))}


def _shared_captions(gallery: Gallery) -> list[str]:
    owner_of: dict[str, int] = {}
    shared: set[str] = set()
    for caption, owner in zip(gallery.captions, gallery.owner_M.tolist()):
        if owner_of.setdefault(caption, owner) != owner:
            shared.add(caption)
    count = sum(caption in shared for caption in gallery.captions)
    return (
        [f"{count} of {len(gallery.captions)} captions also belong, word for word, to another image"] if count else []
    )


ADAPTER = Retrieval()
