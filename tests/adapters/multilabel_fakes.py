"""Data with several labels an image, for the adapters that rank images by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource, noise_of
from vlbench.core.types import Example

CLASSES = ("ant", "bee", "cat", "dog", "eel")
WIDTH = 12


class MultilabelSource(FakeSource):
    """A source whose image bytes are ``<split>/<number>/<labels>``, so that an oracle can read the labels."""

    def __init__(self, labels_NC: np.ndarray, *, split: str, classes: Sequence[str] = CLASSES) -> None:
        words = [",".join(str(int(value)) for value in row) for row in labels_NC]
        super().__init__([f"{split}/{i}/{word}".encode() for i, word in enumerate(words)], split=split)
        self.classes, self.labels_NC = tuple(classes), np.asarray(labels_NC, dtype=np.int8)
        self.provides = frozenset({"image", "labels"})

    def __getitem__(self, index: int) -> Example:
        return Example(id=self._ids[index], image=self.images[index], extra={"labels": self.labels_NC[index]})

    def reordered(self, order: Sequence[int]) -> MultilabelSource:
        """The same examples in another order."""
        other = MultilabelSource(self.labels_NC[list(order)], split=self.split, classes=self.classes)
        other.images = [self.images[i] for i in order]
        other._ids = [self._ids[i] for i in order]
        return other


def labels_in(image: bytes) -> np.ndarray:
    """The labels that ``MultilabelSource`` wrote into the bytes."""
    return np.array([int(value) for value in image.rsplit(b"/", 1)[1].split(b",")])


def some_labels(n: int, seed: int, *, difficult: float = 0.0, share: float = 0.3) -> np.ndarray:
    """(n, C) random labels; a share of them is -1."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, len(CLASSES))) < share).astype(np.int8)
    labels[rng.random(labels.shape) < difficult] = -1
    return labels


def multilabel_data(*, val: int = 80, difficult: float = 0.0, train: int = 200, test: int = 200) -> FakeData:
    """Random labels in train, val and test."""
    sizes = {"train": train, "val": val, "test": test}
    parts = {
        name: MultilabelSource(some_labels(n, seed, difficult=difficult), split=name)
        for seed, (name, n) in enumerate(sizes.items())
        if n
    }
    return FakeData(parts)


def multilabel_oracle(*, noise: float = 0.05, classes: Sequence[str] = CLASSES) -> FakeEncoder:
    """Features that hold the labels, and texts that name them."""

    def image(data: bytes) -> np.ndarray:
        vector = noise * noise_of(data, WIDTH)
        vector[: len(classes)] += labels_in(data) == 1
        vector[len(classes)] += 1.5
        return vector

    return FakeEncoder(image, text=lambda text: np.eye(WIDTH)[next(i for i, c in enumerate(classes) if c in text)])
