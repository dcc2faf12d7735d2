"""SNLI-VE: whether a sentence follows from a photograph of Flickr30k, contradicts it or neither, as lines of JSON.

``snli_ve:DIR`` reads ``snli_ve_train.jsonl``, ``snli_ve_dev.jsonl``, ``snli_ve_test.jsonl``. The photograph is named by
``Flickr30K_ID``, with or without ``.jpg``; without the images the sentences can still be read.

One example a line: its id is ``pairID``, the sentence (``sentence2``) the only text, the label ``gold_label``. A line
with the gold label ``-``, on which SNLI's annotators did not agree, is left out, as SNLI itself asks; the published
files have none, and ``undecided`` says how many there were. ``extra["premise"]`` is the caption (``sentence1``) that
stands for the image in SNLI, which no model of visual entailment may read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example, Part
from vlbench.data.images import IMAGE_EXTENSIONS
from vlbench.data.readers.annotations import (
    IMAGES_OPTION,
    AsksOfFiles,
    field,
    find_images,
    image_folders,
    read_lines,
    refuse_repeated,
    split_files,
)
from vlbench.data.sources import Reader, split_table
from vlbench.data.spec import DataSpec

CLASSES = ("contradiction", "neutral", "entailment")
UNDECIDED = "-"

_FILE = re.compile(r"(?:snli_ve_)?(?P<split>train|dev|val|test)\.jsonl")
_IMAGE_KEYS = (
    "Flickr30K_ID",
    "Flickr30kID",
    "Flikr30kID",
)  # the data, its generator and its parser spell it each their own
_FLICKR = ("flickr30k-images", "flickr30k_images", "images")
_FOLDERS = (*_FLICKR, *(f"flickr30k/{name}" for name in _FLICKR))
_SUFFIXES = (".jpg", ".png")


@dataclass(frozen=True, slots=True)
class _Pair:
    id: str
    image: str
    hypothesis: str
    label: int
    premise: str


class SnliVeSource(AsksOfFiles):
    """The image-sentence pairs of one split."""

    unit = "pairID "

    def __init__(
        self, spec: DataSpec, split: str, pairs: Sequence[_Pair], images: tuple[str, str] | None, *, undecided: int
    ) -> None:
        parts: set[Part] = {"hypothesis"} if images is None else {"image", "hypothesis"}
        super().__init__(spec.bare, split, provides=parts, classes=CLASSES)
        self._pairs = pairs
        self._images = images
        self.undecided = undecided

    def __len__(self) -> int:
        return len(self._pairs)

    def without_images(self, index: int) -> Example:
        """A sentence and its class."""
        pair = self._pairs[index]
        extra: dict[str, Any] = {"image_key": pair.image, "premise": pair.premise}
        return Example(id=pair.id, texts={"en": (pair.hypothesis,)}, label=pair.label, extra=extra)

    def image_files(self, index: int) -> Mapping[str, str]:
        """The photograph, where there are images."""
        if self._images is None:
            return {}
        folder, suffix = self._images
        return {"image": f"{folder}/{self._pairs[index].image}{suffix}"}

    def ids(self) -> Sequence[str]:
        """``pairID``, in the order of the file."""
        return [pair.id for pair in self._pairs]

    def labels(self) -> Sequence[int | None] | None:
        """Indices into ``CLASSES``."""
        return [pair.label for pair in self._pairs]


def _open(spec: DataSpec, split: str | None) -> SnliVeSource:
    assert split is not None, "SNLI-VE always has splits"
    files = _files(spec)
    pairs, undecided = _read(files[split_table(files, str(spec.path))[split]])
    spellings = [[f"{pair.image}{suffix}" for pair in pairs[:20]] for suffix in _SUFFIXES]
    found = find_images(spec, image_folders(spec, _FOLDERS), spellings)
    images = None if found is None else (found[0], _SUFFIXES[found[1]])
    return SnliVeSource(spec, split, pairs, images, undecided=undecided)


def _splits(spec: DataSpec) -> tuple[str, ...]:
    return tuple(split_table(_files(spec), str(spec.path)))


def _files(spec: DataSpec) -> dict[str, Path]:
    return split_files(spec, _FILE, ("", "data"), "snli_ve_train.jsonl, snli_ve_dev.jsonl or snli_ve_test.jsonl")


def _read(file: Path) -> tuple[list[_Pair], int]:
    pairs: list[_Pair] = []
    seen: dict[str, str] = {}
    undecided = 0
    for where, item in read_lines(file):
        name = field(item, "pairID", str, where)
        refuse_repeated(name, where, seen, "pairID")
        where = f"{where} ({name})"
        label = field(item, "gold_label", str, where)
        if label == UNDECIDED:
            undecided += 1
            continue
        if label not in CLASSES:
            raise UserError(f"{where}: {unknown('gold_label', label, CLASSES)}")
        hypothesis = field(item, "sentence2", str, where).strip()
        premise = str(item.get("sentence1") or "").strip()
        pairs.append(_Pair(name, _image(item, where), hypothesis, CLASSES.index(label), premise))
    if not pairs:
        raise UserError(f"{file}: it has no line with a gold label")
    return pairs, undecided


def _image(item: dict[str, Any], where: str) -> str:
    key = next((key for key in _IMAGE_KEYS if key in item), _IMAGE_KEYS[0])
    name = str(item[key]) if isinstance(item.get(key), int) else field(item, key, str, where)
    return name.rpartition(".")[0] if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS else name


def _present(spec: DataSpec) -> bool:
    """Whether sentences and a folder of Flickr30k's images are there."""
    try:
        _files(spec)
        folders = image_folders(spec, _FOLDERS)
    except UserError:
        return False
    return "images" in spec.options or any(folder.name in _FLICKR for folder in folders)


READER = Reader(
    name="snli_ve",
    open=_open,
    splits=_splits,
    help="snli_ve:DIR with snli_ve_SPLIT.jsonl, images of Flickr30k beside it; ?images=DIR",
    options=IMAGES_OPTION,
    present=_present,
)
