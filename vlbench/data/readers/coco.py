"""COCO's JSON: boxes, masks and categories (``instances_*.json``), captions (``captions_*.json``), or both.

``coco:DIR`` reads ``DIR/annotations`` or ``DIR`` itself; ``coco:FILE.json`` reads one file without splits.
Where there are categories, an image's multi-label truth (``extra["labels"]``) is which of them have an object in it,
and ``extra`` says what a detector is judged by: ``categories``, the class of each region as an index into ``classes``,
``bboxes`` as they are written, and ``height`` and ``width`` of the image, where the file has them. Crowds are regions
like any other (``iscrowd`` and ``area`` are in their attributes), and an image without objects is an example without
regions.

Boxes, polygons and run lengths are checked when a split is opened. An annotation that is wrong is one more entry, which
raises BadExample with the file and the annotation's id: it is counted, and never a test set in silence. So is one
whose id was given before; an image or a category whose id was given before is an error.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example, Part, Region
from vlbench.data.masks import BAD_BOX, BAD_MASK, box_problem, mask_problem
from vlbench.data.readers.annotations import refuse_repeated, shown
from vlbench.data.readers.files import OfFiles
from vlbench.data.sources import Reader, canonical_split, split_table
from vlbench.data.spec import DataSpec, local_path

_FILE = re.compile(r"(instances|captions)_(.+)\.json")
_YEAR = re.compile(r"[_-]?\d{4}$")
_OPTIONS = {"images": "the folder of the images, where it is not beside the annotations"}


class CocoSource(OfFiles):
    """The images of one split with their objects and captions.

    An annotation that is wrong, or of an image that the file does not list, is one more entry, which raises BadExample.
    """

    def __init__(self, spec: DataSpec, split: str | None, files: Sequence[Path], folder: Path) -> None:
        self._folder = os.fspath(folder)
        self._images: dict[Any, str] = {}
        self._sides: dict[Any, tuple[int, int]] = {}
        self._objects: defaultdict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        self._captions: defaultdict[Any, list[str]] = defaultdict(list)
        self._dangling: list[BadExample] = []
        self._has_objects = False
        self._category_names: dict[Any, str] = {}
        for file in files:
            self._read(file)
        self._keys = sorted(self._images, key=lambda key: (isinstance(key, str), key))
        self._ids = [str(key) for key in self._keys] + [f"bad annotation {i}" for i in range(len(self._dangling))]
        parts: set[Part] = {"image"}
        parts |= {"regions", "labels"} if self._has_objects else set()
        parts |= {"text"} if self._captions else set()
        # By id, not as listed: train and val must number the classes alike.
        ids = sorted(self._category_names, key=lambda key: (isinstance(key, str), key))
        self._class_of = {key: place for place, key in enumerate(ids)}
        classes = [self._category_names[key] for key in ids]
        super().__init__(spec.bare, split, provides=parts, classes=classes if self._has_objects else None)

    def __len__(self) -> int:
        return len(self._ids)

    def without_images(self, index: int) -> Example:
        """What is annotated of an image. Raises BadExample for an annotation that is wrong."""
        key = self._key(index)
        captions = tuple(self._captions.get(key, ()))
        extra: dict[str, Any] = {"file_name": self._images[key]}
        if self.classes is not None:
            extra["labels"] = self._labels_of(key)
            objects = self._objects.get(key, ())
            extra["categories"] = tuple(self._class_of[item["category_id"]] for item in objects)
            # As written: a region's corners are rounded sums.
            extra["bboxes"] = tuple(tuple(item["bbox"]) for item in objects)
            if key in self._sides:
                extra["height"], extra["width"] = self._sides[key]
        return Example(
            id=self._ids[index],
            texts={"en": captions} if captions else {},
            regions=tuple(self._region(item) for item in self._objects.get(key, ())),
            extra=extra,
        )

    def image_files(self, index: int) -> Mapping[str, str]:
        """The image. Raises BadExample as the entry does."""
        return {"image": f"{self._folder}/{self._images[self._key(index)]}"}

    def regions_of(self, index: int) -> tuple[Region, ...]:
        """The regions of an entry, without reading its image. Raises BadExample as the entry does."""
        return tuple(self._region(item) for item in self._objects.get(self._key(index), ()))

    def ids(self) -> Sequence[str]:
        """Image ids of the annotation file, in their order."""
        return self._ids

    def labels(self) -> Sequence[int | None] | None:
        """None: a COCO image has objects, not one label."""
        return None

    def _key(self, index: int) -> Any:
        if index >= len(self._keys):
            raise self._dangling[index - len(self._keys)]
        return self._keys[index]

    def _labels_of(self, key: Any) -> np.ndarray:
        """``labels_C`` int8: 1 for every category with an object in the image, a crowd included."""
        labels_C = np.zeros(len(self._class_of), dtype=np.int8)
        labels_C[[self._class_of[item["category_id"]] for item in self._objects.get(key, ())]] = 1
        return labels_C

    def _read(self, file: Path) -> None:
        content = _load(file)
        # Of this file alone: objects and captions are in two, with the same images.
        images_seen: dict[Any, str] = {}
        categories_seen: dict[Any, str] = {}
        annotations_seen: set[Any] = set()
        for number, image in enumerate(_list(content, "images", file)):
            if not isinstance(image, dict) or "id" not in image or "file_name" not in image:
                raise UserError(f"{file}: an image without 'id' or 'file_name': {str(image)[:80]}")
            _refuse_repeated(image["id"], f"{file}, images {number}", images_seen, "image id")
            self._images[image["id"]] = image["file_name"]
            if "height" in image and "width" in image:
                self._sides[image["id"]] = _sides_of(image, file)
        for number, category in enumerate(_list(content, "categories", file)):
            if not isinstance(category, dict) or not {"id", "name"} <= category.keys():
                raise UserError(f"{file}: a category without 'id' or 'name': {str(category)[:80]}")
            _refuse_repeated(category["id"], f"{file}, categories {number}", categories_seen, "category id")
            self._category_names[category["id"]] = category["name"]
        for item in _list(content, "annotations", file):
            # Also where all of them are wrong: that is what must then be told, not that there are none.
            self._has_objects |= isinstance(item, dict) and "category_id" in item
            problem = self._problem(item) or _repeated(item, annotations_seen)
            if problem is not None:
                kind, reason = problem
                name = item.get("id", "?") if isinstance(item, dict) else "?"
                self._dangling.append(BadExample(kind, f"{file} annotation {name}", reason))
            elif "caption" in item:
                self._captions[item["image_id"]].append(str(item["caption"]).strip())
            else:
                self._objects[item["image_id"]].append(item)

    def _problem(self, item: Any) -> tuple[str, str] | None:
        if not isinstance(item, dict):
            return "bad annotation", f"expected an object, got {str(item)[:40]!r}"
        if not _is_among(item.get("image_id"), self._images):
            return "dangling annotation", f"image_id {item.get('image_id')!r} is not among the images of the file"
        if "caption" in item:
            return None
        if not _is_among(item.get("category_id"), self._category_names):
            return "missing class", f"category_id {item.get('category_id')!r} is not among the categories"
        height, width = self._sides.get(item["image_id"], (None, None))
        reason = box_problem(item.get("bbox"), height, width)
        if reason is not None:
            return BAD_BOX, reason
        reason = mask_problem(item.get("segmentation"), height, width)
        if reason is not None:
            return BAD_MASK, reason
        area, crowd = item.get("area", 0), item.get("iscrowd", 0)
        if crowd not in (0, 1):
            return "bad annotation", f"iscrowd {crowd!r} is neither 0 nor 1"
        if type(area) not in (int, float) or not 0 <= area < math.inf:
            return "bad annotation", f"area {area!r} is not a number of pixels"
        return None

    def _region(self, item: Mapping[str, Any]) -> Region:
        left, top, width, height = (float(side) for side in item["bbox"])
        own = {"id", "image_id", "category_id", "bbox", "segmentation"}
        return Region(
            category=self._category_names[item["category_id"]],
            box_xyxy=(left, top, left + width, top + height),
            segmentation=item.get("segmentation"),
            attributes={key: value for key, value in item.items() if key not in own},
        )


def _open(spec: DataSpec, split: str | None) -> CocoSource:
    path = local_path(spec)
    if split is None:
        match = _FILE.fullmatch(path.name)
        root = path.parent.parent if path.parent.name == "annotations" else path.parent
        return CocoSource(spec, None, [path], _image_folder(spec, root, match.group(2) if match else ""))
    files = _annotation_files(spec)
    table = _split_names(files)
    own = table[split]
    return CocoSource(spec, split, files[own], _image_folder(spec, path, own))


def _split_names(files: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Standard split → the files' own name for it (``val`` → ``val2017``)."""
    plain = {_YEAR.sub("", name) or name: name for name in files}
    if len(plain) < len(files):  # two years side by side keep their full names
        return {canonical_split(name): name for name in sorted(files)}
    return {standard: plain[name] for standard, name in split_table(plain, "annotations").items()}


def _splits(spec: DataSpec) -> tuple[str, ...]:
    path = local_path(spec)
    return () if path.is_file() else tuple(_split_names(_annotation_files(spec)))


def _annotation_files(spec: DataSpec) -> dict[str, list[Path]]:
    """The data's own split name → its annotation files."""
    root = local_path(spec)
    if not root.exists():
        near = [path.name for path in root.parent.glob("*")] if root.parent.is_dir() else []
        raise UserError(f"data {spec.bare!r}: there is no {root}; {unknown('folder', root.name, near)}")
    found: dict[str, list[Path]] = {}
    for folder in (root / "annotations", root):
        for path in sorted(folder.glob("*.json")):
            match = _FILE.fullmatch(path.name)
            if match:
                found.setdefault(match.group(2), []).append(path)
        if found:
            return found
    raise UserError(
        f"data {spec.bare!r}: no instances_SPLIT.json or captions_SPLIT.json in {root} or {root}/annotations"
    )


def _image_folder(spec: DataSpec, root: Path, split: str) -> Path:
    if "images" in spec.options:
        named = Path(spec.options["images"]).expanduser()
        folder = named if named.is_absolute() or named.is_dir() else root / named
        for inner in (folder / split, folder):
            if inner.is_dir():
                return inner
        raise UserError(f"data {spec.bare!r}: there is no folder of images {folder}")
    plain = _YEAR.sub("", split)
    for inner in (root / split, root / "images" / split, root / plain, root / "images" / plain, root / "images"):
        if inner.is_dir() and inner != root:
            return inner
    return root


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict) or "images" not in content:
        raise UserError(f"{file}: expected COCO's JSON, an object with 'images' and 'annotations'")
    return content


def _refuse_repeated(id_: Any, where: str, seen: dict[Any, str], what: str) -> None:
    if isinstance(id_, list | dict):
        raise UserError(f"{where}: {what} {shown(id_)} is neither a number nor a text")
    refuse_repeated(id_, where, seen, what)


def _repeated(item: Mapping[str, Any], seen: set[Any]) -> tuple[str, str] | None:
    """What is wrong with an annotation whose id another had before it in its file. Ids may be left out."""
    id_ = item.get("id")
    if id_ is None or isinstance(id_, list | dict):
        return None
    if id_ in seen:
        return "repeated annotation", "another annotation of the file has this id; each must be there once"
    seen.add(id_)
    return None


def _is_among(key: Any, table: Mapping[Any, Any]) -> bool:
    """Lists and objects are JSON too, and no key."""
    return not isinstance(key, list | dict) and key in table


def _sides_of(image: Mapping[str, Any], file: Path) -> tuple[int, int]:
    sides = image["height"], image["width"]
    if any(type(side) is not int or side < 1 for side in sides):
        raise UserError(
            f"{file}: image {image['id']} of height {sides[0]!r} and width {sides[1]!r}: expected whole pixels"
        )
    return sides


def _list(content: Mapping[str, Any], key: str, file: Path) -> list[Any]:
    value = content.get(key, [])
    if not isinstance(value, list):
        raise UserError(f"{file}: {key!r} is not a list")
    return value


READER = Reader(
    name="coco",
    open=_open,
    splits=_splits,
    help="coco:DIR with instances_SPLIT.json and captions_SPLIT.json, or coco:FILE.json; ?images=DIR",
    options=_OPTIONS,
)
