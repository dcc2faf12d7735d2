"""PASCAL VOC's image classification: ``ImageSets/Main/CLASS_SPLIT.txt`` with 1, 0 or -1 an image, and ``JPEGImages``.

VOC writes 1 for a class that is there, -1 for one that is not, and 0 for one of which there are only difficult
examples, which the challenge does not count. Here that is 1, 0 and -1, as everywhere in vlbench.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example
from vlbench.data.readers.files import OfFiles
from vlbench.data.sources import Reader, standard_order
from vlbench.data.spec import DataSpec, local_path

_FILE = re.compile(r"(.+)_(train|val|trainval|test)\.txt")
_VALUES = {"1": 1, "-1": 0, "0": -1}
_INNER = ("", "VOC2007", "VOCdevkit/VOC2007")


class VocSource(OfFiles):
    """The images of one split with one truth a class. An id is VOC's own (``000005``)."""

    def __init__(self, spec: DataSpec, split: str, root: Path, files: Mapping[str, Path]) -> None:
        super().__init__(spec.bare, split, provides=("image", "labels"), classes=sorted(files))
        self._images = os.fspath(root / "JPEGImages")
        columns = [_read(files[name]) for name in sorted(files)]
        first = columns[0]
        for name, column in zip(sorted(files), columns, strict=True):
            if column.keys() != first.keys():
                odd = min(column.keys() ^ first.keys())
                raise UserError(f"{files[name]}: image {odd} is in only one of it and {files[sorted(files)[0]].name}")
        self._ids = sorted(first)
        self._labels_NC = np.array([[column[key] for column in columns] for key in self._ids], dtype=np.int8)

    def __len__(self) -> int:
        return len(self._ids)

    def without_images(self, index: int) -> Example:
        """A number and a truth for every class."""
        return Example(id=self._ids[index], extra={"labels": self._labels_NC[index].copy()})

    def image_files(self, index: int) -> Mapping[str, str]:
        """The image."""
        return {"image": f"{self._images}/{self._ids[index]}.jpg"}

    def ids(self) -> Sequence[str]:
        """VOC's image numbers, sorted."""
        return self._ids

    def labels(self) -> Sequence[int | None] | None:
        """None: an image has a truth for every class, not one label."""
        return None


def _open(spec: DataSpec, split: str | None) -> VocSource:
    assert split is not None, "VOC always has splits"
    root = _root(spec)
    tables = _tables(root)
    everything = {name for files in tables.values() for name in files}
    missing = sorted(everything - tables[split].keys())
    if missing:
        raise UserError(f"{root / 'ImageSets/Main'}: there is no {missing[0]}_{split}.txt, but other classes have one")
    return VocSource(spec, split, root, tables[split])


def _splits(spec: DataSpec) -> tuple[str, ...]:
    return standard_order(_tables(_root(spec)))


def _root(spec: DataSpec) -> Path:
    """The folder of ``ImageSets`` and ``JPEGImages``."""
    path = local_path(spec)
    for inner in _INNER:
        if (path / inner / "ImageSets" / "Main").is_dir():
            return path / inner
    if not path.exists():
        near = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"data {spec.bare!r}: there is no folder {path}; {unknown('folder', path.name, near)}")
    raise UserError(f"data {spec.bare!r}: there is no ImageSets/Main in {path}; name VOCdevkit/VOC2007")


def _tables(root: Path) -> dict[str, dict[str, Path]]:
    """Split → class → its file."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted((root / "ImageSets" / "Main").glob("*.txt")):
        match = _FILE.fullmatch(path.name)
        if match:
            found.setdefault(match[2], {})[match[1]] = path
    if not found:
        raise UserError(f"{root / 'ImageSets/Main'}: there is no CLASS_SPLIT.txt, for instance cat_trainval.txt")
    return found


def _read(file: Path) -> dict[str, int]:
    """Image → truth, as one file says."""
    values: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="ascii", errors="replace").split("\n"), start=1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 2 or cells[1] not in _VALUES:
            raise UserError(f"{file}, line {number}: expected 'IMAGE 1', 'IMAGE 0' or 'IMAGE -1', got {line[:40]!r}")
        if cells[0] in values:
            raise UserError(f"{file}, line {number}: image {cells[0]} is named twice")
        values[cells[0]] = _VALUES[cells[1]]
    if not values:
        raise UserError(f"{file}: it names no image")
    return values


def _present(spec: DataSpec) -> bool:
    return any((local_path(spec) / inner / "ImageSets" / "Main").is_dir() for inner in _INNER)


READER = Reader(
    name="voc",
    open=_open,
    splits=_splits,
    help="voc:VOCdevkit/VOC2007, PASCAL VOC's classification: ImageSets/Main/CLASS_SPLIT.txt and JPEGImages",
    options={},
    present=_present,
)
