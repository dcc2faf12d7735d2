"""ObjectNet as it is unpacked: ``DIR/images/FOLDER/*.png`` beside ``DIR/mappings``, the 113 classes that ImageNet has.

The archive's own mappings say which of its 313 classes ImageNet-1k has, and as which of its classes: several, for some
("a chair" is any of three). ``unions`` holds these, so that what learnt from ImageNet can answer with ObjectNet's
classes. Images of the other 200 classes are left out, as in everything published for ImageNet's models, and the red
frame of two pixels that marks each image as a test image is cut off.

The mappings: ``folder_to_objectnet_label.json``, ``objectnet_to_imagenet_1k.json`` (names separated by "; "),
``imagenet_to_label_2012_v2`` (a name a line, by the number of 2012's development kit) and
``pytorch_to_imagenet_2012_id.json`` (the place among the sorted WordNet ids to that number).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest
from vlbench.core.names import unknown
from vlbench.core.types import Example
from vlbench.data.digests import Content, example_digest
from vlbench.data.images import decode, read_file
from vlbench.data.readers.annotations import read_json
from vlbench.data.readers.imagefolder import images_under
from vlbench.data.remembered import RememberedDigests
from vlbench.data.sources import BaseSource, Reader
from vlbench.data.spec import DataSpec, local_path

FRAME = 2
"""Pixels of the red frame, on each side."""
_FOLDERS, _NAMES = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"
_LINES, _NUMBERS = "imagenet_to_label_2012_v2", "pytorch_to_imagenet_2012_id.json"


class ObjectNetSource(BaseSource):
    """The images of the classes that ImageNet has. An id is the path below ``images``."""

    def __init__(
        self, spec: DataSpec, folder: Path, folders: Mapping[str, str], unions: Mapping[str, list[int]]
    ) -> None:
        classes = sorted(unions)
        super().__init__(spec.bare, None, provides=("image", "label"), classes=classes)
        self.unions = tuple(tuple(unions[name]) for name in classes)
        """For each class, the labels of ImageNet-1k that it unites."""
        self._folder = str(folder)
        self._ids: list[str] = []
        self._labels: list[int] = []
        label_of = {name: label for label, name in enumerate(classes)}
        for inner, name in sorted(folders.items()):
            if name in label_of:
                files = images_under(folder / inner)
                self._ids += [f"{inner}/{file}" for file in files]
                self._labels += [label_of[name]] * len(files)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Example:
        file = self._file(index)
        image = decode(read_file(file), where=file)
        cut = image.crop((FRAME, FRAME, image.width - FRAME, image.height - FRAME))
        buffer = io.BytesIO()
        cut.save(buffer, "BMP")  # encoded at once, and nothing is lost
        return Example(id=self._ids[index], image=buffer.getvalue(), label=self._labels[index])

    def ids(self) -> Sequence[str]:
        """Paths below ``images``."""
        return self._ids

    def labels(self) -> Sequence[int | None] | None:
        """The class of each image's folder."""
        return list(self._labels)

    @cached_property
    def _content_digests(self) -> Content:
        # Of the files with their frames: to cut fifty thousand large images only to name them would take an hour.
        assert self.classes is not None, "ObjectNet has classes"
        images, examples = [], []
        with RememberedDigests(self) as remembered:
            for index, name in enumerate(self._ids):
                known = remembered.look(self._file(index))
                image = known.digest or remembered.learn(known, _digest_of_framed(read_file(self._file(index))))
                images.append(image)
                examples.append(example_digest(Example(id=name, label=self._labels[index]), self.classes, image=image))
        return Content(tuple(images), tuple(examples))

    def _file(self, index: int) -> str:
        return f"{self._folder}/{self._ids[index]}"


def _digest_of_framed(data: bytes) -> str:
    return digest(f"without a frame of {FRAME} pixels\0".encode() + data)


def _open(spec: DataSpec, split: str | None) -> ObjectNetSource:
    root = local_path(spec)
    if not root.is_dir():
        near = [path.name for path in root.parent.glob("*")] if root.parent.is_dir() else []
        raise UserError(f"data {spec.bare!r}: there is no folder {root}; {unknown('folder', root.name, near)}")
    mappings = root / "mappings"
    folders = _texts(mappings / _FOLDERS)
    source = ObjectNetSource(spec, root / "images", folders, _unions(mappings))
    if not len(source):
        raise UserError(f"{root / 'images'}: there is no image in the folders that {mappings / _FOLDERS} names")
    return source


def _unions(mappings: Path) -> dict[str, list[int]]:
    """ObjectNet's name of a class to the labels of ImageNet-1k, places among the sorted WordNet ids."""
    place_of_number = {number: int(place) for place, number in _numbers(mappings / _NUMBERS).items()}
    label_of = {name: place_of_number.get(number) for number, name in enumerate(_lines(mappings / _LINES))}
    unions: dict[str, list[int]] = {}
    for name, listed in _texts(mappings / _NAMES).items():
        labels = [label_of.get(part) for part in listed.split("; ")]
        if None in labels:
            raise UserError(
                f"{mappings / _NAMES}: {name!r} is {listed.split('; ')[labels.index(None)]!r} in ImageNet, a name that "
                f"{_LINES} and {_NUMBERS} do not give a label; take all four files from one archive"
            )
        unions[name] = [label for label in labels if label is not None]
    return unions


def _texts(file: Path) -> dict[str, str]:
    content = read_json(file)
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise UserError(f"{file}: expected an object of texts")
    return content


def _numbers(file: Path) -> dict[str, int]:
    content: Any = read_json(file)
    if not isinstance(content, dict) or not all(
        str(key).isdecimal() and isinstance(value, int) for key, value in content.items()
    ):
        raise UserError(f"{file}: expected an object of whole numbers by whole numbers")
    return content


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text("utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _present(spec: DataSpec) -> bool:
    root = local_path(spec)
    return (root / "images").is_dir() and (root / "mappings" / _NAMES).is_file()


READER = Reader(
    name="objectnet",
    open=_open,
    splits=lambda spec: (),
    help="objectnet:DIR with images/FOLDER/*.png and mappings/*.json: ImageNet's 113 classes, frames cut off",
    options={},
    present=_present,
)
