"""open_clip's CSV: one row a caption, with columns for the image's path and the caption, tab between them.

Rows that name the same image are one example with several captions. Relative paths lie beside the CSV.
"""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example, Part
from vlbench.data.readers.files import OfFiles
from vlbench.data.sources import Reader
from vlbench.data.spec import DataSpec, local_path

_SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";", "space": " ", "pipe": "|"}
_OPTIONS = {
    "sep": "between columns: tab (the default), comma, semicolon, pipe, or the character itself",
    "img": "the column of the image paths (default: filepath)",
    "text": "the column of the captions (default: title)",
    "label": "the column of class names, if there is one",
}


class CsvSource(OfFiles):
    """The images that a table names. An id is the path as it is written there."""

    def __init__(self, spec: DataSpec, folder: Path, rows: Sequence[tuple[str, str, str]], *, labelled: bool) -> None:
        texts: dict[str, list[str]] = {}
        names: dict[str, str] = {}
        for image, text, label in rows:
            texts.setdefault(image, [])
            if text.strip():
                texts[image].append(text.strip())
            if names.setdefault(image, label) != label:
                raise UserError(f"{spec.path}: {image!r} has two labels, {names[image]!r} and {label!r}")
        classes = sorted({name for name in names.values() if name}) if labelled else None
        parts: set[Part] = {"image"}
        parts |= {"text"} if any(texts.values()) else set()
        parts |= {"label"} if labelled else set()
        super().__init__(spec.bare, None, provides=parts, classes=classes)
        index = {name: label for label, name in enumerate(classes or ())}
        self._folder = folder
        self._ids = list(texts)
        self._texts = [tuple(texts[image]) for image in self._ids]
        self._labels: list[int | None] = [index.get(names[image]) for image in self._ids]

    def __len__(self) -> int:
        return len(self._ids)

    def without_images(self, index: int) -> Example:
        """What a table says of an image."""
        texts = self._texts[index]
        return Example(id=self._ids[index], texts={"en": texts} if texts else {}, label=self._labels[index])

    def image_files(self, index: int) -> Mapping[str, str]:
        """The image."""
        return {"image": os.path.join(self._folder, self._ids[index])}  # noqa: PTH118 - called for every sample

    def ids(self) -> Sequence[str]:
        """Image paths as written in the table."""
        return self._ids

    def labels(self) -> Sequence[int | None] | None:
        """Labels by sorted class name, where a label column was named."""
        return None if self.classes is None else self._labels


def _open(spec: DataSpec, split: str | None) -> CsvSource:
    path = local_path(spec)
    if not path.is_file():
        near = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"data {spec.bare!r}: there is no file {path}; {unknown('file', path.name, near)}")
    rows = _read(path, spec)
    if not rows:
        raise UserError(f"{path}: there is no row below the header")
    return CsvSource(spec, path.parent, rows, labelled="label" in spec.options)


def _read(path: Path, spec: DataSpec) -> list[tuple[str, str, str]]:
    """Image, caption, label of every row; the last two empty where there is no such column."""
    separator = _separator(spec)
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            table = csv.reader(handle, delimiter=separator, strict=True)
            header = next(table, [])
            places = _columns(path, spec, header, separator)
            rows = []
            for cells in table:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(f"{path}, line {table.line_num}: {len(cells)} cells, the header has {len(header)}")
                rows.append(tuple(cells[place] if place is not None else "" for place in places))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {table.line_num}: {error}") from None
    return rows  # type: ignore[return-value]  # three places, three cells


def _separator(spec: DataSpec) -> str:
    named = spec.options.get("sep", "tab")
    separator = _SEPARATORS.get(named, codecs.decode(named, "unicode_escape") if "\\" in named else named)
    if len(separator) != 1:
        raise UserError(f"data {spec.bare!r}: {unknown('separator', named, _SEPARATORS)}")
    return separator


def _columns(path: Path, spec: DataSpec, header: list[str], separator: str) -> tuple[int | None, ...]:
    """Where image, caption and label are in a row. A caption column that was not asked for may be absent."""
    wanted = (spec.options.get("img", "filepath"), spec.options.get("text", "title"), spec.options.get("label"))
    if wanted[0] not in header and len(header) == 1 and any(other in header[0] for other in ",;|\t"):
        raise UserError(f"{path}: one column only, {header[0][:60]!r}; is the separator {separator!r}? Say ?sep=comma")
    places: list[int | None] = []
    for role, name in zip(("img", "text", "label"), wanted):
        if name in header:
            places.append(header.index(name))
        elif name is None or (role == "text" and "text" not in spec.options and "label" in spec.options):
            places.append(None)
        else:
            raise UserError(f"{path}: {unknown('column', name, header)} (?{role}=COLUMN names another)")
    return tuple(places)


def _splits(spec: DataSpec) -> tuple[str, ...]:
    return ()


READER = Reader(
    name="csv",
    open=_open,
    splits=_splits,
    help="csv:FILE, open_clip's table of image paths and captions; ?sep=tab, img=filepath, text=title, label=",
    options=_OPTIONS,
)
