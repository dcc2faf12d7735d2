"""Karpathy's splits of Flickr30k, Flickr8k and COCO: ``dataset_flickr30k.json``, ``dataset_coco.json``.

One JSON for all splits: ``{"images": [{"filename", "filepath", "split", "sentences": [{"raw"}], ...}]}``; the images
lie elsewhere. They are looked for beside the JSON, under the folder names that the archives unpack to.

COCO's ``restval`` (the rest of val2014) belongs to ``train``, as everybody trains; ``?restval=apart`` keeps it apart.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example
from vlbench.data.readers.files import OfFiles
from vlbench.data.sources import Reader, split_table
from vlbench.data.spec import DataSpec, local_path

_OPTIONS = {
    "images": "the folder of the images, where it is not beside the JSON",
    "restval": "train (the default): the rest of COCO's val2014 joins train; apart: it is a split of its own",
}
_RESTVAL = ("train", "apart")
_FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images", "Flickr8k_Dataset", "Images")
"""Where images are found below the JSON's own folder, and below the one above it."""
_PLACE = re.compile(r'"(filename|filepath)":\s*"([^"\\]+)"')
_GLANCE = 1 << 20  # bytes of the JSON: some hundred entries, of every split
_TRIED = 20  # entries of which one must be there for a folder to be the folder of the images


@dataclass(frozen=True, slots=True)
class _Entry:
    filename: str
    folder: str
    """The image's folder below that of all images (COCO: ``val2014``), or ``""``."""
    split: str
    captions: tuple[str, ...]
    number: Any
    """``cocoid`` or ``imgid``, where there is one."""


class KarpathySource(OfFiles):
    """The images of one split, each with its captions. An id is the image's file name."""

    def __init__(self, spec: DataSpec, split: str, entries: Sequence[_Entry], paths: Sequence[str]) -> None:
        super().__init__(spec.bare, split, provides=("image", "text"))
        self._entries = entries
        self._paths = paths

    def __len__(self) -> int:
        return len(self._entries)

    def without_images(self, index: int) -> Example:
        """A file name and its captions."""
        entry = self._entries[index]
        return Example(
            id=entry.filename,
            texts={"en": entry.captions},
            extra={} if entry.number is None else {"number": entry.number},
        )

    def image_files(self, index: int) -> Mapping[str, str]:
        """The image."""
        return {"image": self._paths[index]}

    def ids(self) -> Sequence[str]:
        """File names, in the order of the JSON."""
        return [entry.filename for entry in self._entries]

    def labels(self) -> Sequence[int | None] | None:
        """None: captions only."""
        return None


def _open(spec: DataSpec, split: str | None) -> KarpathySource:
    assert split is not None, "Karpathy's JSON always has splits"
    file = _file(spec)
    by_split = _by_split(spec, file)
    entries = by_split[split_table(by_split, str(file))[split]]
    return KarpathySource(spec, split, entries, _image_paths(spec, file, entries))


def _splits(spec: DataSpec) -> tuple[str, ...]:
    file = _file(spec)
    return tuple(split_table(_by_split(spec, file), str(file)))


def _file(spec: DataSpec) -> Path:
    """The JSON: the path itself, or the only ``dataset_*.json`` in it."""
    path = local_path(spec)
    if path.is_file():
        return path
    if not path.exists():
        near = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"data {spec.bare!r}: there is no {path}; {unknown('file', path.name, near)}")
    found = sorted(path.glob("dataset_*.json"))
    if len(found) != 1:
        names = ", ".join(other.name for other in found) or "no dataset_*.json"
        raise UserError(f"data {spec.bare!r}: name the JSON; {path} holds {names}")
    return found[0]


def _by_split(spec: DataSpec, file: Path) -> dict[str, list[_Entry]]:
    restval = spec.options.get("restval", "train")
    if restval not in _RESTVAL:
        raise UserError(f"data {spec.bare!r}: {unknown('value of restval', restval, _RESTVAL)}")
    status = file.stat()
    found: dict[str, list[_Entry]] = {}
    for entry in _entries(os.fspath(file), status.st_size, status.st_mtime_ns):
        joined = entry.split == "restval" and restval == "train"
        found.setdefault("train" if joined else entry.split, []).append(entry)
    return found


@functools.lru_cache(maxsize=2)
def _entries(file: str, size: int, changed: int) -> tuple[_Entry, ...]:
    """Every entry of the JSON. Kept, since COCO's has 144 MB and is asked for its splits before it is opened."""
    try:
        content = json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise UserError(f"{file}: expected Karpathy's JSON, an object with a list 'images'")
    entries = tuple(_entry(item, f"{file}, image {number}") for number, item in enumerate(images))
    seen: set[str] = set()
    for entry in entries:
        if entry.filename in seen:
            raise UserError(f"{file}: the image {entry.filename!r} is listed twice; it must be one entry")
        seen.add(entry.filename)
    return entries


def _entry(item: Any, where: str) -> _Entry:
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object, got {str(item)[:40]!r}")
    for key in ("filename", "split"):
        if not isinstance(item.get(key), str) or not item[key]:
            raise UserError(f"{where}: {key!r} is missing or no text")
    sentences = item.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise UserError(f"{where} ({item['filename']}): it has no 'sentences'")
    captions = []
    for sentence in sentences:
        raw = sentence.get("raw") if isinstance(sentence, dict) else None
        if not isinstance(raw, str) or not raw.strip():
            raise UserError(f"{where} ({item['filename']}): a sentence without 'raw' text")
        captions.append(raw.strip())
    number = item.get("cocoid", item.get("imgid"))
    return _Entry(item["filename"], str(item.get("filepath") or ""), item["split"], tuple(captions), number)


def _image_paths(spec: DataSpec, file: Path, entries: Sequence[_Entry]) -> list[str]:
    """Where each image lies, in the first folder that holds one of the first entries.

    Raises:
        UserError: where no folder does, with the first image's name. A single image that is absent is named when it
            is read.
    """
    for folder in _image_folders(spec, file):
        for inner in (True, False):
            paths = [os.fspath(folder / (entry.folder if inner else "") / entry.filename) for entry in entries[:_TRIED]]
            if any(Path(path).is_file() for path in paths):
                base = os.fspath(folder)
                return [os.path.join(base, e.folder if inner else "", e.filename) for e in entries]  # noqa: PTH118
    first = "/".join(filter(None, (entries[0].folder, entries[0].filename)))
    looked = spec.options.get("images") or f"{file.parent} and {file.parent.parent}"
    raise UserError(
        f"data {spec.bare!r}: the images are not there, for instance {first} (looked in {looked}); say ?images=DIR"
    )


def _image_folders(spec: DataSpec, file: Path) -> list[Path]:
    if "images" not in spec.options:
        return [base / name for base in (file.parent, file.parent.parent) for name in _FOLDERS]
    named = Path(spec.options["images"]).expanduser()
    folder = named if named.is_absolute() or named.is_dir() else file.parent / named
    if not folder.is_dir():
        raise UserError(f"data {spec.bare!r}: there is no folder of images {folder}")
    return [folder]


def _present(spec: DataSpec) -> bool:
    """Whether JSON and images are there, at a glance: reading COCO's takes seconds, and `vlbench list` asks for it."""
    try:
        file = _file(spec)
        folders = _image_folders(spec, file)
        with file.open("rb") as handle:
            places = _PLACE.findall(handle.read(_GLANCE).decode(errors="replace"))
    except (UserError, OSError):
        return False
    inner = {"", *(value for key, value in places if key == "filepath")}
    there = [folder / part for folder in folders for part in inner if (folder / part).is_dir()]
    return any((folder / value).is_file() for folder in there for key, value in places if key == "filename")


READER = Reader(
    name="karpathy",
    open=_open,
    splits=_splits,
    help="karpathy:FILE.json, Karpathy's dataset_flickr30k.json or dataset_coco.json; ?images=DIR, restval=",
    options=_OPTIONS,
    present=_present,
)
