"""What retrieval knows of the images: their ids, the tags of their objects and, where asked for, their own captions.

Three million images with thirty tags each are kept as numbers: a tag is an index into a vocabulary of some thousand.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Source
from vlbench.data.regions.features import RegionStore
from vlbench.data.sources import without_images
from vlbench.data.stream import BadTally
from vlbench.data.weak.pools import one_line

TagOrder: TypeAlias = Literal["given", "sorted"]
"""How the tags of a query are ordered. ``given``: as the regions are (detectors put the most certain first).
``sorted``: by the alphabet, so that images with the same objects ask the same question. The released code reorders
its tags too ("road bus street building car man person"), by a key that is not in its repository."""


class TaggedImages:
    """The images of one or several sources, in their order, without their pixels.

    Attributes:
        ids: the example ids.
        vocabulary: every tag, in order of first appearance.
        tally: the examples that could not be read and were left out.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.vocabulary: list[str] = []
        self.tally = BadTally()
        self._index: dict[str, int] = {}
        self._flat = array("i")
        self._ends = array("q", [0])
        self._own: list[tuple[str, ...]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def tags(self, row: int) -> tuple[str, ...]:
        """The category of each region of an image, repeats included."""
        return tuple(self.vocabulary[tag] for tag in self.tag_numbers(row))

    def tag_numbers(self, row: int) -> np.ndarray:
        """``tags`` as indices into ``vocabulary``."""
        return np.array(self._flat[self._ends[row] : self._ends[row + 1]], dtype=np.int64)

    def query(self, row: int, order: TagOrder = "given") -> str:
        """What is asked for an image: its tags, each once, joined by spaces ("objects_no_rep" of the released code)."""
        tags = list(dict.fromkeys(self.tags(row)))
        return " ".join(sorted(tags) if order == "sorted" else tags)

    @property
    def has_captions(self) -> bool:
        """Whether ``own`` was asked for and some image has a caption."""
        return self._own is not None and any(self._own)

    def own(self, row: int) -> tuple[str, ...]:
        """The image's own captions; empty where they were not asked for."""
        return self._own[row] if self._own is not None else ()

    def fingerprint(self) -> str:
        """Changes with any id, tag or own caption."""
        tags = [self._flat.tolist(), self._ends.tolist()]
        return fingerprint([self.ids, self.vocabulary, *tags, list(self._own) if self._own is not None else None])

    def add(self, image_id: str, tags: Sequence[str], own: Sequence[str] | None = None) -> None:
        """Append an image; ``own`` is given for all images or for none."""
        assert (own is not None) == (self._own is not None) or not self.ids, "own captions of all images or of none"
        for tag in tags:
            tag = one_line(tag)
            number = self._index.get(tag)
            if number is None:
                number = self._index[tag] = len(self.vocabulary)
                self.vocabulary.append(tag)
            self._flat.append(number)
        self._ends.append(len(self._flat))
        self.ids.append(image_id)
        if own is not None:
            self._own = self._own if self._own is not None else []
            self._own.append(tuple(one_line(text) for text in own))


def read_images(
    sources: Sequence[Source],
    *,
    features: RegionStore | None = None,
    captions: bool = False,
    language: str = "en",
    progress: Callable[[int, int], None] | None = None,
) -> TaggedImages:
    """Go through sources once and keep ids, tags and, with ``captions``, the images' own captions.

    Args:
        sources: the images; nothing of them is decoded.
        features: region features by id, whose classes are the tags. None: the sources' own regions.
        captions: whether to keep the images' own.
        language: of these.
        progress: called with the images done, and all of them.

    Raises:
        UserError: where a source has no regions and there are no features, or an id occurs twice.
        RunError: where more than 1% of the examples are bad.
    """
    images = TaggedImages()
    total = sum(len(source) for source in sources)
    done = 0
    for source in sources:
        if features is None and "regions" not in source.provides:
            raise UserError(
                f"data {source.spec!r} has no regions, and their tags are what sentences are found by; make some with "
                "`vlbench data regions` and name them with --features"
            )
        for index in range(len(source)):
            try:
                example = source[index] if features is None else without_images(source, index)
                own = tuple(region.category for region in example.regions)
                tags = own if features is None else _classes(features, example.id)
                images.add(example.id, tags, example.texts.get(language, ()) if captions else None)
                images.tally.record(())
            except BadExample as error:
                images.tally.record([error])
            done += 1
            if progress is not None:
                progress(done, total)
    if len(set(images.ids)) < len(images.ids):
        raise UserError("an image id occurs in more than one of the sources; align them one by one")
    if not images.vocabulary:
        where = "" if features is None else " in these features"
        raise UserError(f"data {sources[0].spec!r}: no image has a tagged region{where} to find sentences by")
    return images


def _classes(features: RegionStore, image_id: str) -> tuple[str, ...]:
    """The classes of an image's regions. Raises BadExample, also for an image that has no features."""
    try:
        return features.tags(image_id)
    except KeyError as error:
        raise BadExample("no region features", image_id, str(error.args[0])) from None
