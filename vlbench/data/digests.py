"""Content identities of data: the same images and annotations have the same fingerprint wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlbench.core.errors import BadExample
from vlbench.core.fingerprint import canonical_json, digest, digest_all
from vlbench.core.types import Example, Source


def image_digests(source: Source) -> list[str]:
    """The digest of each image's bytes, in order.

    Raises:
        BadExample: where an image cannot be read. A test set with a broken example is an error: leaving the example
            out would change the number.
    """
    return [_image_digest(source[index], source) for index in range(len(source))]


def source_fingerprint(source: Source) -> str:
    """One fingerprint of images, labels (as class names), texts and regions.

    It does not depend on file names, folders or order. Raises BadExample as ``image_digests`` does.
    """
    return digest_all(example_digest(source[index], source.classes) for index in range(len(source)))


def example_digest(example: Example, classes: Sequence[str] | None) -> str:
    """The digest of everything that an example says, its id left out."""
    label: Any = None
    if example.label is not None:
        label = classes[example.label] if classes is not None else example.label
    said = {
        "image": digest(example.image) if example.image is not None else None,
        "label": label,
        "texts": {language: list(texts) for language, texts in example.texts.items()},
        "regions": [
            [region.category, list(region.box_xyxy), _plain(region.segmentation)] for region in example.regions
        ],
        "labels": _plain(example.extra.get("labels")),
    }
    return digest(canonical_json(said).encode("utf-8", "surrogatepass"))


def _image_digest(example: Example, source: Source) -> str:
    if example.image is None:
        raise BadExample("missing image", f"{source.spec} {example.id}", "this example has no image")
    return digest(example.image)


def _plain(value: Any) -> Any:
    """``value`` as JSON has it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
