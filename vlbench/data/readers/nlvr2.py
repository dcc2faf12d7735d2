"""NLVR2: a sentence that is true or false of two photographs, as lines of JSON.

``nlvr2:DIR`` reads ``train.json``, ``dev.json`` and ``test1.json`` (the public test set, called ``test`` here) from
``DIR``, ``DIR/data`` or ``DIR/nlvr2/data``; ``nlvr2:FILE`` reads one file without splits. Images are named after
their pair, ``dev-850-2-img0.png`` (left) and ``-img1.png`` (right), in a folder of their split, with the line's
``directory`` below it where there is one; without them the sentences can still be read.

One example a line: ``image`` is the left photograph and ``extra["right"]`` the bytes of the right one; the sentence
is the only text, the label False or True. ``extra`` also has ``identifier``, ``group`` (equal for all pairs that one
sentence is judged on: what consistency counts) and ``set`` (equal for all pairs of one set of images: the sampling
unit).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.core.errors import UserError
from vlbench.core.types import Example, Part
from vlbench.data.readers.annotations import (
    IMAGES_OPTION,
    AsksOfFiles,
    field,
    find_images,
    image_folders,
    read_lines,
    refuse_repeated,
    shown,
    split_files,
)
from vlbench.data.sources import Reader, split_table
from vlbench.data.spec import DataSpec, local_path

CLASSES = ("False", "True")

_FILE = re.compile(r"(?P<split>(?:train|dev|val|test)\w*)\.jsonl?")
_INNER = ("", "data", "nlvr2/data")
_IDENTIFIER = re.compile(r"(?P<pair>(?P<set>(?P<split>\w+)-(?P<number>\d+))-\d+)-(?P<sentence>\d+)")
_STANDARD = {"test1": "test"}
"""What "test" means in papers is test-P, ``test1``; ``test2`` was hidden for years and keeps its name."""
_SUFFIXES = ("png", "jpg")


@dataclass(frozen=True, slots=True)
class _Line:
    identifier: str
    sentence: str
    label: int
    folder: str
    """The line's ``directory`` and a slash, or ``""``."""
    pair: str
    set: str
    group: str


class Nlvr2Source(AsksOfFiles):
    """The examples of one split. An id is the line's identifier."""

    def __init__(
        self, spec: DataSpec, split: str | None, lines: Sequence[_Line], images: tuple[str, str] | None
    ) -> None:
        parts: set[Part] = {"pair"} if images is None else {"image", "pair"}
        super().__init__(spec.bare, split, provides=parts, classes=CLASSES)
        self._lines = lines
        self._images = images

    def __len__(self) -> int:
        return len(self._lines)

    def without_images(self, index: int) -> Example:
        """A sentence and whether it is true."""
        line = self._lines[index]
        extra: dict[str, Any] = {
            "identifier": line.identifier,
            "group": line.group,
            "set": line.set,
            "image_key": line.pair,
        }
        return Example(id=line.identifier, texts={"en": (line.sentence,)}, label=line.label, extra=extra)

    def image_files(self, index: int) -> Mapping[str, str]:
        """Both photographs, where there are images."""
        if self._images is None:
            return {}
        return {part: self._path(self._lines[index], place) for place, part in enumerate(("image", "right"))}

    def ids(self) -> Sequence[str]:
        """Identifiers, in the order of the file."""
        return [line.identifier for line in self._lines]

    def labels(self) -> Sequence[int | None] | None:
        """1 where the sentence is true."""
        return [line.label for line in self._lines]

    def _path(self, line: _Line, place: int) -> str:
        assert self._images is not None, "there are no images"
        root, spelling = self._images
        return f"{root}/{spelling.format(folder=line.folder, pair=line.pair, place=place)}"


def _open(spec: DataSpec, split: str | None) -> Nlvr2Source:
    if split is None:
        file, own = local_path(spec), ""
    else:
        files = _files(spec)
        own = _split_names(files)[split]
        file = files[own]
    lines = _read(file)
    names = [name for name in dict.fromkeys((own, lines[0].identifier.partition("-")[0])) if name]
    spellings = [f"{folder}{{pair}}-img{{place}}.{suffix}" for suffix in _SUFFIXES for folder in ("{folder}", "")]
    first = [[name.format(folder=line.folder, pair=line.pair, place=0) for line in lines[:20]] for name in spellings]
    found = find_images(spec, image_folders(spec, names), first)
    return Nlvr2Source(spec, split, lines, None if found is None else (found[0], spellings[found[1]]))


def _splits(spec: DataSpec) -> tuple[str, ...]:
    return () if local_path(spec).is_file() else tuple(_split_names(_files(spec)))


def _files(spec: DataSpec) -> dict[str, Path]:
    return split_files(spec, _FILE, _INNER, "train.json, dev.json or test1.json")


def _split_names(files: dict[str, Path]) -> dict[str, str]:
    """Standard split to the files' own name for it."""
    plain = {_STANDARD.get(name, name): name for name in sorted(files)}
    if len(plain) < len(files):
        raise UserError(f"{files['test1'].parent}: test and test1 lie together and both are the test split; keep one")
    return {standard: plain[name] for standard, name in split_table(plain, "the annotations").items()}


def _read(file: Path) -> list[_Line]:
    lines: list[_Line] = []
    seen: dict[str, str] = {}
    for where, item in read_lines(file):
        identifier = field(item, "identifier", str, where)
        match = _IDENTIFIER.fullmatch(identifier)
        if match is None:
            raise UserError(f"{where}: identifier {shown(identifier)} is not SPLIT-SET-PAIR-SENTENCE (dev-850-2-0)")
        refuse_repeated(identifier, where, seen, "identifier")
        where = f"{where} ({identifier})"
        sentence = field(item, "sentence", str, where).strip()
        if "label" not in item:
            raise UserError(f"{where}: 'label' is missing")
        label = str(item["label"]).capitalize()
        if label not in CLASSES:
            raise UserError(f"{where}: 'label' must be True or False, not {shown(item['label'])}")
        folder = str(item.get("directory", ""))
        if not re.fullmatch(r"\w*", folder):
            raise UserError(f"{where}: 'directory' {shown(folder)} is not a plain name")
        lines.append(
            _Line(
                identifier,
                sentence,
                CLASSES.index(label),
                f"{folder}/" if folder else "",
                pair=match["pair"],
                set=match["set"],
                group=f"{match['set']}-{match['sentence']}",
            )
        )
    if not lines:
        raise UserError(f"{file}: it has no lines")
    return lines


def _present(spec: DataSpec) -> bool:
    """Whether sentences and a folder of images are there."""
    try:
        names = list(_files(spec)) if local_path(spec).is_dir() else []
        folders = image_folders(spec, names)
    except UserError:
        return False
    return "images" in spec.options or any(folder.name in {*names, "images"} for folder in folders)


READER = Reader(
    name="nlvr2",
    open=_open,
    splits=_splits,
    help="nlvr2:DIR with train.json, dev.json, test1.json, or nlvr2:FILE; ?images=DIR",
    options=IMAGES_OPTION,
    present=_present,
)
