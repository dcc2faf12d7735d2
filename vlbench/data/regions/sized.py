"""Region features beside the images that they are of.

Boxes are in pixels: those of an image of another size, resized or another image altogether, lie elsewhere in the image
at hand, and nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlbench.core.errors import BadExample
from vlbench.core.types import Example, Source
from vlbench.data.images import inspect
from vlbench.data.regions.features import BAD_REGIONS, RegionFeatures, RegionStore
from vlbench.data.sources import without_images


class SizedRegions:
    """A store of region features for the images of some sources. Of each image the header is read once, here.

    Args:
        store: the features, by ``image_key``.
        path: where they are, for errors.
        sources: whose images.

    Raises:
        BadExample: where an image is absent, or its header cannot be read.
    """

    def __init__(self, store: RegionStore, path: str, sources: Iterable[Source]) -> None:
        self._store, self._path = store, path
        self._sizes: dict[str, tuple[int, int]] = {}
        for source in sources:
            for index in range(len(source)):
                key = image_key(without_images(source, index))
                if key not in self._sizes:
                    self._sizes[key] = _size(source, index)

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._store

    def __getitem__(self, image_id: str) -> RegionFeatures:
        """The regions of an image.

        Raises:
            KeyError: for an id that is not there.
            BadExample: for an entry that is damaged, or of an image of another size.
        """
        found = self._store[image_id]
        width, height = self._sizes[image_id]
        if (found.width, found.height) != (width, height):
            raise BadExample(
                BAD_REGIONS,
                f"{self._path} {image_id}",
                f"of an image of {found.width} x {found.height} pixels (width x height), and the image has "
                f"{width} x {height}; take features of these very images",
            )
        return found

    def tags(self, image_id: str) -> tuple[str, ...]:
        """The classes of an image's regions; its size is not looked at."""
        return self._store.tags(image_id)

    def ids(self) -> Sequence[str]:
        """All ids of the store."""
        return self._store.ids()


def image_key(example: Example) -> str:
    """What the data call the image: readers say it where an example's id is a question's."""
    return str(example.extra.get("image_key", example.id))


def _size(source: Source, index: int) -> tuple[int, int]:
    example = source[index]
    where = f"{source.spec} ({source.split}): {example.id}"
    if example.image is None:
        raise BadExample("missing image", where, "this example has no image")
    header = inspect(example.image, where)
    return header.width, header.height
