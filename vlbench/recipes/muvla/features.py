"""What a file of detections says, as mu-VLA's samples: fixed features, or boxes that a trained tower is read at.

Fixed features are the paper's mode, in which no pixel is read in training.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Region, Source
from vlbench.data.images import image_at
from vlbench.data.regions.features import RegionFeatures, RegionStore
from vlbench.data.regions.open import open_regions
from vlbench.data.weak.corpus import Corpus
from vlbench.recipes.muvla.batch import View


class Stored:
    """The regions of images in the settings' file, by id.

    Where the file names no classes, the corpus's tags are the regions'.

    Args:
        config: with ``features`` or ``boxes``.
        corpus: the weakly aligned sentences; None where none are read.
    """

    def __init__(self, config: Any, corpus: Corpus | None) -> None:
        self.path = config.features or config.boxes
        self.store = open_store(config)
        self.corpus = corpus
        self._width = config.feature_width

    def view(self, image_id: str) -> View:
        """Boxes relative to the whole image, and the leading numbers of each feature."""
        found, tags = self._found(image_id)
        if found.features_ND.shape[1] < self._width:
            raise UserError(
                f"{self.path}: the features of {image_id!r} have {found.features_ND.shape[1]} numbers, not "
                f"{self._width}; set feature_width"
            )
        return View(found.boxes_N4, found.box_vectors(), tags, [], found.features_ND[:, : self._width])

    def regions(self, image_id: str, size: tuple[int, int]) -> tuple[Region, ...]:
        """The boxes and tags in pixels of an image of this width and height, whatever size the detector saw."""
        found, tags = self._found(image_id)
        across, down = size[0] / found.width, size[1] / found.height
        boxes = (found.boxes_N4 * [across, down, across, down]).tolist()
        return tuple(Region(tag, tuple(box)) for tag, box in zip(tags, boxes, strict=True))

    def require(self, image_id: str) -> None:
        """Raises BadExample for an image that is not there: nothing could read it (see ``missing_images``)."""
        if image_id not in self.store:
            raise BadExample("no region features", image_id, f"it is not in {self.path}")
        if self.corpus is not None and image_id not in self.corpus:
            raise BadExample("no sentences", image_id, f"it is not in {self.corpus.path}")

    def _found(self, image_id: str) -> tuple[RegionFeatures, list[str]]:
        try:
            found = self.store[image_id]
        except KeyError as error:
            raise UserError(str(error.args[0])) from None
        except BadExample as error:
            raise UserError(f"{error}; extract it anew, or leave the image out of the data") from None
        tags = list(found.tags)
        if not tags and self.corpus is not None:
            tags = list(self.corpus.tags(image_id))
            if len(tags) != len(found):
                raise UserError(
                    f"{self.corpus.path}: {len(tags)} tags of image {image_id!r}, which has {len(found)} regions in "
                    f"{self.path}: they were made of different detections"
                )
        return found, tags or [""] * len(found)  # no class: nothing to read, and no label


def open_store(config: Any) -> RegionStore:
    """The settings' file of ``features``, or of ``boxes``. Raises UserError as ``open_regions``."""
    return open_regions(config.features or config.boxes, labels=config.feature_labels)


def check_features(config: Any, sources: Sequence[Source]) -> list[str]:
    """All tags in the file of features or boxes, having seen that every image of the data is there.

    Raises:
        UserError: naming the first image that is not, if any of these can be read (see ``missing_images``).
    """
    store = open_store(config)
    missing = missing_images(sources, store)
    if missing:
        what = "features" if config.features is not None else "boxes"
        raise UserError(
            f"{config.features or config.boxes}: {len(missing)} images of the data have no {what} there, first "
            f"{missing[0]!r}"
        )
    return sorted({tag for image in store.ids() for tag in store.tags(image)})


def missing_images(sources: Sequence[Source], known: Container[str]) -> list[str]:
    """The images of the data that are not ``known``; none where not one of these can be read.

    What made features or a corpus has left such out, and training passes over them and counts them.
    """
    missing = [
        (source, index, image) for source in sources for index, image in enumerate(source.ids()) if image not in known
    ]
    if not any(_can_be_read(source, index) for source, index, _ in missing):
        return []
    return [image for _, _, image in missing]


def _can_be_read(source: Source, index: int) -> bool:
    try:
        image_at(source, index)
    except BadExample:
        return False
    return True
