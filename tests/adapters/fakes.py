"""Data and encoders without images or networks: adapters see features that a test has chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlbench.adapters.encoder import ImageFeatures
from vlbench.core.fingerprint import digest
from vlbench.core.types import Example, Region


class FakeSource:
    """A source whose "images" are arbitrary bytes."""

    def __init__(
        self,
        images: Sequence[bytes],
        *,
        split: str,
        labels: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        texts: Sequence[Mapping[str, tuple[str, ...]]] | None = None,
        ids: Sequence[str] | None = None,
        regions: Sequence[tuple[Region, ...]] | None = None,
    ) -> None:
        self.spec, self.split = "fake:data", split
        self.regions = regions
        self.images = list(images)
        self._labels = None if labels is None else [int(label) for label in labels]
        self.classes = None if classes is None else tuple(classes)
        self.templates = None
        self.texts = texts
        self._ids = list(ids) if ids is not None else [f"{split}/{i}" for i in range(len(images))]
        parts = {"image": True, "label": labels is not None, "text": texts is not None}
        self.provides = frozenset(part for part, there in parts.items() if there)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(
            id=self._ids[index],
            image=self.images[index],
            label=None if self._labels is None else self._labels[index],
            texts={} if self.texts is None else self.texts[index],
            regions=() if self.regions is None else self.regions[index],
        )

    def ids(self) -> list[str]:
        return self._ids

    def labels(self) -> list[int] | None:
        return self._labels


class FakeData:
    """What adapters use of a TaskData."""

    told_apart: int | None = None

    def __init__(self, splits: Mapping[str, FakeSource], *, templates: Sequence[str] = ("a {}.",)) -> None:
        self.splits, self.templates = dict(splits), tuple(templates)
        self.spec, self.notes = "fake:data", ()
        self.classnames = next(iter(self.splits.values())).classes

    def has(self, split: str) -> bool:
        return split in self.splits

    def split(self, name: str) -> FakeSource:
        return self.splits[name]


class FakeEncoder:
    """Features from functions of an image's bytes and of a text."""

    device = "cpu"

    def __init__(
        self,
        pooled: Callable[[bytes], np.ndarray],
        *,
        embed: Callable[[bytes], np.ndarray] | None = None,
        text: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        self.pooled, self.embed, self.text = pooled, embed or pooled, text
        self.text_calls: list[list[str]] = []

    def images(self, source: FakeSource) -> ImageFeatures:
        return ImageFeatures(
            ids=tuple(source.ids()),
            digests=tuple(digest(image) for image in source.images),
            pooled_ND=np.stack([self.pooled(image) for image in source.images]).astype(np.float32),
            embed_NE=np.stack([self.embed(image) for image in source.images]).astype(np.float32),
        )

    def image_digests(self, source: FakeSource) -> list[str]:
        return [digest(image) for image in source.images]

    def captions(self, source: FakeSource) -> list[str]:
        return [spoken(self.embed(image)) for image in source.images]

    def match(
        self, source: FakeSource, indices: Sequence[int], texts: Sequence[Sequence[str]], *, features: str | None = None
    ) -> list[np.ndarray]:
        """The cosine of image and text through a steep sigmoid: a half at 0.8."""
        assert self.text is not None
        found = []
        for index, row in zip(indices, texts, strict=True):
            image, words = self.embed(source.images[index]), np.stack([self.text(text) for text in row])
            length = np.linalg.norm(image) * np.linalg.norm(words, axis=1)
            cosine = words @ image / np.where(length > 0, length, 1.0)
            found.append((1 / (1 + np.exp(-40 * (cosine - 0.8)))).astype(np.float32))
        return found

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        self.text_calls.append(list(texts))
        assert self.text is not None
        return np.stack([self.text(text) for text in texts]).astype(np.float32)


def noise_of(key: bytes | str, width: int, salt: str = "") -> np.ndarray:
    """Gaussian noise that depends on ``key`` alone."""
    data = key if isinstance(key, bytes) else key.encode()
    return np.random.default_rng(int(digest(data + salt.encode())[:16], 16)).standard_normal(width)


def spoken(vector_D: np.ndarray) -> str:
    """A sentence of five words that says where a vector points: each names the signs of two coordinates.

    Few enough different words that sentences about different images have some in a row in common.
    """
    signs = ["nw" if value > 0 else "se" for value in vector_D[:10]]
    return " ".join(f"{place}{a}{b}" for place, a, b in zip("vwxyz", signs[::2], signs[1::2], strict=True))


def labelled(split: str, labels: Sequence[int], classes: Sequence[str]) -> FakeSource:
    """A source whose image bytes are ``<split>/<number>/<label>``, so that an oracle can read the label."""
    images = [f"{split}/{i}/{label}".encode() for i, label in enumerate(labels)]
    return FakeSource(images, split=split, labels=labels, classes=classes)


def label_in(image: bytes) -> int:
    """The label that ``labelled`` wrote into the bytes."""
    return int(image.rsplit(b"/", 1)[1])
