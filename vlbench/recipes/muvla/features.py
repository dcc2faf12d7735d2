"""Fixed region features as mu-VLA's samples: the paper's mode, in which no pixel is read in training."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Source
from vlbench.data.images import image_at
from vlbench.data.regions.open import open_regions
from vlbench.data.weak.corpus import Corpus
from vlbench.recipes.muvla.batch import View


def features_of(config: Any, corpus: Corpus | None) -> Callable[[str], View]:
    """The regions of an image by its id: boxes relative to the whole image, and the leading numbers of each feature.

    Where the file names no classes, the corpus's tags are the regions'.
    """
    store = open_regions(config.features, labels=config.feature_labels)
    width = config.feature_width

    def view(image_id: str) -> View:
        try:
            found = store[image_id]
        except KeyError as error:
            raise UserError(str(error.args[0])) from None
        except BadExample as error:
            raise UserError(f"{error}; extract it anew, or leave the image out of the data") from None
        if found.features_ND.shape[1] < width:
            raise UserError(
                f"{config.features}: the features of {image_id!r} have {found.features_ND.shape[1]} numbers, not "
                f"{width}; set feature_width"
            )
        tags = list(found.tags)
        if not tags and corpus is not None:
            tags = list(corpus.tags(image_id))
            if len(tags) != len(found):
                raise UserError(
                    f"{corpus.path}: {len(tags)} tags of image {image_id!r}, which has {len(found)} regions in "
                    f"{config.features}: they were made of different detections"
                )
        tags = tags or [""] * len(found)  # no class: nothing to read, and no label
        return View(found.boxes_N4, found.box_vectors(), tags, [], found.features_ND[:, :width])

    return view


def check_features(config: Any, sources: Sequence[Source]) -> list[str]:
    """All tags in the file of features, having seen that every image of the data is there (see ``missing_images``).

    Raises:
        UserError: naming the first image without features, if any of these can be read.
    """
    store = open_regions(config.features, labels=config.feature_labels)
    missing = missing_images(sources, store)
    if missing:
        raise UserError(
            f"{config.features}: {len(missing)} images of the data have no features there, first {missing[0]!r}"
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
