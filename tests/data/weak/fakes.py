"""Sources, encoders and chunkers small enough to work out by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from vlbench.core.types import Example, Region
from vlbench.data.sources import BaseSource


class TaggedSource(BaseSource):
    """Images with tags and captions given as ``{id: (tags, captions)}``."""

    def __init__(self, images: dict[str, tuple[Sequence[str], Sequence[str]]], *, captions: bool = True) -> None:
        super().__init__("made:up", None, provides={"image", "regions", *(("text",) if captions else ())})
        self._images = images
        self._captions = captions

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        name = list(self._images)[index]
        tags, captions = self._images[name]
        regions = tuple(Region(tag, (0.0, 0.0, 1.0, 1.0)) for tag in tags)
        return Example(name, texts={"en": tuple(captions)} if self._captions else {}, regions=regions)

    def ids(self):
        return list(self._images)

    def labels(self):
        return None


class HashEncoder:
    """A dense encoder: the sum of a random vector for each word, so that shared words make texts alike."""

    name = "hash"
    sparse = False

    def __init__(self, width: int = 48) -> None:
        self.width = width
        self.encoded = 0

    def fit(self, texts: Sequence[str]) -> None:
        pass

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded += len(texts)
        vectors = [sum((self.word(w) for w in text.lower().split()), np.zeros(self.width)) for text in texts]
        return np.array(vectors, dtype=np.float32).reshape(len(texts), self.width)

    def word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8])
        return np.random.default_rng(seed).normal(size=self.width)

    def fingerprint(self) -> str:
        return f"hash {self.width}"
