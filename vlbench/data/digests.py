"""Content identities of data: the same images and annotations have the same fingerprint wherever they lie.

A source is read once for all of them: what was found stays with the opened source, and the digests of image bytes are
remembered between runs (``remembered``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlbench.core.errors import BadExample
from vlbench.core.fingerprint import canonical_json, digest, digest_all
from vlbench.core.types import Example, Region, Source
from vlbench.data.remembered import RememberedDigests
from vlbench.data.sources import without_images


def image_digests(source: Source) -> list[str]:
    """The digest of each image's bytes, in order.

    Raises:
        BadExample: where an image cannot be read. A test set with a broken example is an error: leaving the example
            out would change the number.
    """
    images = content_digests(source).images
    if None in images:
        bare = source.ids()[images.index(None)]
        raise BadExample("missing image", f"{source.spec} {bare}", "this example has no image")
    return [image for image in images if image is not None]


def source_fingerprint(source: Source) -> str:
    """One fingerprint of images, labels (as class names), texts and regions.

    It does not depend on file names, folders or order. Raises BadExample as ``image_digests`` does.
    """
    return digest_all(content_digests(source).examples)


_SAID = (
    "question",
    "answers",
    "multiple_choice_answer",  # what a vocabulary of answers is counted from
    "answer_type",
    "question_type",
    "right",
    "target",
    "group",
)
"""What an example of a task on an image and a sentence says in ``extra`` that decides a number."""


@dataclass(frozen=True)
class Content:
    """Digests of a source in its order: of each image's bytes, and of each whole example."""

    images: tuple[str | None, ...]
    examples: tuple[str, ...]


def content_digests(source: Source) -> Content:
    """All digests of a source, made on the first call. Images that were read by an earlier run are not read again."""
    known: Content | None = getattr(source, "_content_digests", None)
    if known is None:
        images, examples = [], []
        with RememberedDigests(source) as remembered:
            for index in range(len(source)):
                example, image = _digested(source, index, remembered)
                images.append(image)
                examples.append(example_digest(example, source.classes, image=image, extra=_extra_of(source)))
        known = Content(tuple(images), tuple(examples))
        # A source of the user's own may have no room for it; then it is read again each time.
        with contextlib.suppress(AttributeError):
            source._content_digests = known  # type: ignore[attr-defined]
    return known


def _digested(source: Source, index: int, remembered: RememberedDigests) -> tuple[Example, str | None]:
    """An example and the digest of its image; a further image in its ``extra`` may be a digest as well.

    What was read before is not read again, also within a run: VQA v2 asks five questions of an image.
    """
    look = getattr(source, "image_files", None)
    places = {part: remembered.look(place) for part, place in look(index).items()} if look is not None else {}
    found = {part: place.digest for part, place in places.items() if place.digest is not None}
    if places and len(found) == len(places):
        example = without_images(source, index)
    else:
        example = source[index]
        images = {"image": example.image} | {part: example.extra[part] for part in places if part != "image"}
        found = {part: digest(image) for part, image in images.items() if image is not None}
        for part, place in places.items():
            remembered.learn(place, found[part])
    image = found.pop("image", None)
    return replace(example, extra={**example.extra, **found}), image


def example_digest(
    example: Example, classes: Sequence[str] | None, *, image: str | None, extra: Sequence[str] = ()
) -> str:
    """The digest of everything that an example says, its id left out.

    ``image`` is the digest of its image, ``extra`` the keys of its ``extra`` that count.
    """
    label: Any = None
    if example.label is not None:
        label = classes[example.label] if classes is not None else example.label
    said = {
        "image": image,
        "label": label,
        "texts": {language: list(texts) for language, texts in example.texts.items()},
        "regions": [
            [region.category, list(region.box_xyxy), _plain(region.segmentation), *_counted_as(region)]
            for region in example.regions
        ],
        "labels": _named_labels(example.extra.get("labels"), classes),
    }
    more = {key: example.extra[key] for key in extra if key in example.extra}
    said |= {key: digest(value) if isinstance(value, bytes) else _plain(value) for key, value in more.items()}
    return digest(canonical_json(said).encode("utf-8", "surrogatepass"))


def _counted_as(region: Region) -> list[Any]:
    """What moves detection's numbers beside class, box and mask.

    A crowd counts neither as found nor as missed, and COCO takes the annotated area, not the mask's pixels, for what is
    small, medium or large.
    """
    crowd = ["crowd"] if region.attributes.get("iscrowd") else []
    area = region.attributes.get("area")
    return crowd if area is None else [*crowd, float(area)]


def _extra_of(source: Source) -> Sequence[str]:
    return _SAID if source.provides & {"question", "pair", "expression"} else ()


def _named_labels(labels: Any, classes: Sequence[str] | None) -> Any:
    """Multi-label truth as class name → value, so that the order of the classes is no part of it."""
    if not isinstance(labels, np.ndarray) or classes is None or len(labels) != len(classes):
        return _plain(labels)
    return {name: int(value) for name, value in zip(classes, labels, strict=True) if value}


def _plain(value: Any) -> Any:
    """``value`` as JSON has it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
