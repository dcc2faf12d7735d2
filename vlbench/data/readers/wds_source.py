"""One split of webdataset shards as a source: which members of a sample become which part of an example."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Example, Part, Region
from vlbench.data.images import IMAGE_EXTENSIONS, not_empty
from vlbench.data.readers.tarindex import TarIndex, read_members
from vlbench.data.sources import BaseSource, Member
from vlbench.data.spec import DataSpec

_READ = ("cls", "json", "txt")
_MULTILABEL = "multilabel"


@dataclass(frozen=True)
class Layout:
    """What the files beside the shards say."""

    kind: str
    """``pairs`` (img2dataset), or CLIP_benchmark's ``classification``, ``retrieval``, ``multilabel``."""
    classes: tuple[str, ...] | None
    templates: tuple[str, ...] | None


class WdsSource(BaseSource):
    """Samples of several tars in order. A tar that ends early is one more entry, which raises BadExample."""

    def __init__(self, spec: DataSpec, split: str | None, indices: Sequence[TarIndex], layout: Layout) -> None:
        self._indices = tuple(indices)
        self._kind = layout.kind
        self._ends = np.cumsum([len(index) + bool(index.damage) for index in self._indices])
        self._ids = self._all_ids()
        self._labels: list[int | None] | None = None
        labelled = any(index.has("cls") for index in self._indices)
        classes = layout.classes if labelled or layout.kind == _MULTILABEL else None
        self._read = (*_READ, "npy") if layout.kind == _MULTILABEL else _READ
        super().__init__(spec.bare, split, provides=self._parts(labelled), classes=classes, templates=layout.templates)
        if labelled and classes is None:
            # Without classnames.txt the numbers are the names.
            known = [label for label in self.labels() or () if label is not None]
            self.classes = tuple(str(label) for label in range(max(known, default=-1) + 1))
        if layout.kind == _MULTILABEL and classes is None:
            self.classes = tuple(str(label) for label in range(self._label_count()))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Example:
        return self._example(index, with_image=True)

    def without_images(self, index: int) -> Example:
        """What the other members of a sample say."""
        return self._example(index, with_image=False)

    def image_files(self, index: int) -> Mapping[str, Member]:
        """Where in its tar the image lies, if there is one."""
        tar, row = self._row(index)
        members = tar.members(row)
        image = _image_among(members)
        return {} if image is None else {"image": Member(tar.path, *members[image])}

    def ids(self) -> Sequence[str]:
        """The samples' keys; with the shard's name before them where a key occurs in two shards."""
        return self._ids

    def labels(self) -> Sequence[int | None] | None:
        """The numbers in the ``.cls`` members; None for a sample without one, or with one that is no number."""
        if not any(tar.has("cls") for tar in self._indices):
            return None
        if self._labels is None:
            self._labels = [self._quiet_label(index) for index in range(len(self))]
        return self._labels

    def shards(self) -> Sequence[int]:
        """The number of entries of each tar, in order."""
        return [len(index) + bool(index.damage) for index in self._indices]

    def _all_ids(self) -> list[str]:
        plain = [key for tar in self._indices for key in self._keys(tar)]
        if len(set(plain)) < len(plain):
            names = _distinct_names([tar.path for tar in self._indices])
            plain = [f"{name}/{key}" for name, tar in zip(names, self._indices) for key in self._keys(tar)]
        return plain

    def _parts(self, labelled: bool) -> set[Part]:
        """What the first readable sample of each tar promises; extensions say the rest."""
        parts: set[Part] = {"label"} if labelled else set()
        if self._kind == _MULTILABEL and any(tar.has("npy") for tar in self._indices):
            parts.add("labels")
        for tar in self._indices:
            if any(tar.has(extension) for extension in IMAGE_EXTENSIONS):
                parts.add("image")
            if tar.has("txt"):
                parts.add("text")
            if tar.has("json") and len(tar) and not {"text", "regions"} <= parts:
                with contextlib.suppress(BadExample):  # reading that sample will say so
                    members = {ext: place for ext, place in tar.members(0).items() if ext == "json"}
                    data = read_members(tar.path, members)
                    if "json" in data and "boxes" in _json(data["json"], tar.path):
                        parts.add("regions")
                    if "text" not in parts and self._annotations(data, tar.path)["texts"]:
                        parts.add("text")
        return parts

    @staticmethod
    def _keys(tar: TarIndex) -> Sequence[str]:
        return [*tar.keys, f"{tar.path}#end"] if tar.damage else tar.keys

    def _find(self, index: int) -> tuple[TarIndex, int]:
        if index < 0 or index >= len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return self._indices[which], index - before

    def _row(self, index: int) -> tuple[TarIndex, int]:
        """As ``_find``. Raises BadExample for the end of a damaged tar."""
        tar, row = self._find(index)
        if row == len(tar):
            raise BadExample("truncated tar", tar.path, tar.damage)
        return tar, row

    def _example(self, index: int, *, with_image: bool) -> Example:
        tar, row = self._row(index)
        where = f"{tar.path}/{tar.keys[row]}"
        members = tar.members(row)
        image = _image_among(members) if with_image else None
        data = read_members(
            tar.path, {ext: place for ext, place in members.items() if ext in self._read or ext == image}
        )
        return Example(
            id=self._ids[index],
            image=not_empty(data[image], where=where) if image is not None else None,
            label=self._label(data, where),
            **self._annotations(data, where),
        )

    def _quiet_label(self, index: int) -> int | None:
        tar, row = self._find(index)
        try:
            members = tar.members(row) if row < len(tar) else {}
            return self._label(read_members(tar.path, {"cls": members["cls"]}), "") if "cls" in members else None
        except BadExample:
            return None  # reading the sample itself will say so

    def _label(self, data: Mapping[str, bytes], where: str) -> int | None:
        if "cls" not in data:
            return None
        text = data["cls"].strip()
        if not text.isdigit():
            raise BadExample("bad label", where, f"its .cls holds {text[:40]!r}, not a class number")
        label = int(text)
        classes = getattr(self, "classes", None)
        if classes is not None and label >= len(classes):
            raise BadExample("missing class", where, f"label {label}, but classnames.txt has {len(classes)} classes")
        return label

    def _annotations(self, data: Mapping[str, bytes], where: str) -> dict[str, Any]:
        """``texts`` and ``extra`` of one example."""
        record = _json(data["json"], where) if "json" in data else {}
        texts = _captions(record, where)
        if not texts and "txt" in data:
            text = _decode(data["txt"], where)
            # Only "\n" ends a caption: str.splitlines would also cut at U+2028 and make two captions of one.
            # CLIP_benchmark writes a line feed within a caption as a backslash and an n, and never reads it back.
            lines = [line.replace("\\n", "\n") for line in text.split("\n")] if self._kind == "retrieval" else [text]
            texts = _by_language("en", lines)
        if not texts and isinstance(record.get("caption"), str):
            texts = _by_language("en", [record["caption"]])
        if "npy" in data:
            record["labels"] = _multilabel(data["npy"], where, getattr(self, "classes", None))
        return {"texts": texts, "regions": _regions(record, where), "extra": record}

    def _label_count(self) -> int:
        """The length of the first readable ``.npy``: how many classes there are where no file names them."""
        for tar in self._indices:
            for row in range(len(tar)):
                members = {ext: place for ext, place in tar.members(row).items() if ext == "npy"}
                with contextlib.suppress(BadExample):  # reading that sample will say so
                    if members:
                        return len(_multilabel(read_members(tar.path, members)["npy"], tar.path, None))
        return 0


def _image_among(members: Mapping[str, tuple[int, int]]) -> str | None:
    """The extension of the image that is read."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise BadExample("bad JSON", where, str(error)) from None
    if not isinstance(record, dict):
        raise BadExample("bad JSON", where, f"expected an object, got {type(record).__name__}")
    return record


def _captions(record: dict[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    """``captions`` taken out of ``record``: texts by language."""
    if not isinstance(record.get("captions"), dict):
        return {}
    texts: dict[str, tuple[str, ...]] = {}
    for language, lines in record.pop("captions").items():
        lines = [lines] if isinstance(lines, str) else lines
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise BadExample("bad JSON", where, f"captions of language {language!r} are not a list of texts")
        texts |= _by_language(language, lines)
    return texts


def _regions(record: dict[str, Any], where: str) -> tuple[Region, ...]:
    """``tags`` and ``boxes`` (corners in pixels: left, top, right, bottom) of a sample as its regions."""
    tags, boxes = record.get("tags"), record.get("boxes")
    if tags is None or boxes is None:
        return ()
    if not isinstance(tags, list) or not isinstance(boxes, list) or len(tags) != len(boxes):
        raise BadExample("bad regions", where, "its JSON needs as many boxes as tags, each a list")
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
            raise BadExample("bad regions", where, f"a box is [left, top, right, bottom] in pixels, not {box!r:.60}")
    return tuple(Region(str(tag), tuple(map(float, box))) for tag, box in zip(tags, boxes))


def _by_language(language: str, lines: Sequence[str]) -> dict[str, tuple[str, ...]]:
    kept = tuple(line.strip() for line in lines if line.strip())
    return {language: kept} if kept else {}


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadExample("bad text", where, f"not UTF-8: {error.reason} at byte {error.start}") from None


def _multilabel(data: bytes, where: str, classes: Sequence[str] | None) -> np.ndarray:
    """``labels_C`` int8 of a multilabel ``.npy``: 1 present, 0 absent, -1 not counted.

    The published sets store floats of 0 and 1.
    """
    try:
        values: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises ValueError, EOFError, SyntaxError and others on damaged headers
        raise BadExample("bad labels", where, f"its .npy cannot be read: {error}") from None
    if values.ndim != 1 or values.dtype.kind not in "bifu" or not np.isin(values, (-1, 0, 1)).all():
        raise BadExample("bad labels", where, "its .npy is not one number (1, 0 or -1) a class")
    if classes is not None and len(values) != len(classes):
        raise BadExample("bad labels", where, f"its .npy has {len(values)} labels for {len(classes)} classes")
    return values.astype(np.int8)


def _distinct_names(paths: Sequence[str]) -> list[str]:
    """Names of the shards, with as many of the last folders as it takes to tell them apart."""
    split = [path.removesuffix(".tar").split("/") for path in paths]
    for depth in range(1, max(map(len, split), default=1) + 1):
        names = ["/".join(parts[-depth:]) for parts in split]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{paths[0]}: the same shard is given twice")
