"""RefCOCO, RefCOCO+ and RefCOCOg: phrases that each point to one object of a COCO image.

``refcoco:DIR`` reads ``DIR/refs(unc).json`` (or another ``refs(*).json``) and ``DIR/instances.json``. The references
are published as a pickle, ``refs(unc).p``; ``vlbench.data.refer_convert`` turns it into that JSON without running it.
``?by=google`` chooses among several. The images are those of COCO's train2014, under the file names of
``instances.json``; without them the phrases can still be read.

One example a reference: its id is ``ref_id``, ``regions`` are the boxes of all objects that are annotated in the
image, in the file's order, ``extra["target"]`` the place of the one that is meant, ``texts`` its phrases. ``extra``
also has ``sentence_ids``, ``image_id`` and ``split``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example, Part, Region
from vlbench.data.masks import box_problem
from vlbench.data.readers.annotations import (
    IMAGES_OPTION,
    AsksOfFiles,
    field,
    find_images,
    image_folders,
    objects,
    read_json,
    refuse_repeated,
    shown,
    split_files,
)
from vlbench.data.sources import Reader, split_table
from vlbench.data.spec import DataSpec, local_path

_REFS = re.compile(r"refs\((?P<split>\w+)\)\.json")
_INSTANCES = "instances.json"
_FOLDERS = ("train2014", "images/train2014", "mscoco/images/train2014", "coco/train2014")


@dataclass(frozen=True, slots=True)
class _Image:
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class _Instances:
    images: Mapping[int, _Image]
    regions: Mapping[int, Sequence[Region]]
    """By image, in the order of the file."""
    place_of: Mapping[int, tuple[int, int]]
    """Annotation id to its image, and its place among the image's regions."""


@dataclass(frozen=True, slots=True)
class _Ref:
    id: int
    image: int
    target: int
    split: str
    sentence_ids: tuple[int, ...]
    phrases: tuple[str, ...]


class RefcocoSource(AsksOfFiles):
    """The references of one split."""

    unit = "ref_id "

    def __init__(
        self, spec: DataSpec, split: str, refs: Sequence[_Ref], instances: _Instances, images: str | None
    ) -> None:
        parts: set[Part] = {"regions", "expression"}
        parts |= {"image"} if images is not None else set()
        super().__init__(spec.bare, split, provides=parts)
        self._refs = refs
        self._files = {ref.image: instances.images[ref.image].file_name for ref in refs}
        self._regions = {ref.image: tuple(instances.regions[ref.image]) for ref in refs}
        self._images = images

    def __len__(self) -> int:
        return len(self._refs)

    def without_images(self, index: int) -> Example:
        """A reference, its phrases and all objects of its image."""
        ref = self._refs[index]
        return Example(
            id=str(ref.id),
            texts={"en": ref.phrases},
            regions=self._regions[ref.image],
            extra={
                "target": ref.target,
                "sentence_ids": ref.sentence_ids,
                "image_id": ref.image,
                "image_key": str(ref.image),
                "split": ref.split,
            },
        )

    def image_files(self, index: int) -> Mapping[str, str]:
        """The image that the reference is in, where there are images."""
        return {} if self._images is None else {"image": f"{self._images}/{self._files[self._refs[index].image]}"}

    def ids(self) -> Sequence[str]:
        """``ref_id``, in the order of the file."""
        return [str(ref.id) for ref in self._refs]

    def labels(self) -> Sequence[int | None] | None:
        """None: a reference has a target among its own regions."""
        return None


def _open(spec: DataSpec, split: str | None) -> RefcocoSource:
    assert split is not None, "RefCOCO always has splits"
    file = _refs_file(spec)
    instances = _read_instances(local_path(spec) / _INSTANCES)
    refs = _read_refs(file, instances)
    own = split_table({ref.split for ref in refs}, str(file))[split]
    chosen = [ref for ref in refs if ref.split == own]
    names = [instances.images[ref.image].file_name for ref in chosen[:20]]
    found = find_images(spec, image_folders(spec, _FOLDERS), [names])
    return RefcocoSource(spec, split, chosen, instances, None if found is None else found[0])


def _splits(spec: DataSpec) -> tuple[str, ...]:
    file = _refs_file(spec)
    names = {field(item, "split", str, where) for where, item in objects({"refs": read_json(file)}, "refs", file)}
    return tuple(split_table(names, str(file)))


def _refs_file(spec: DataSpec) -> Path:
    files = split_files(spec, _REFS, ("",), None)
    pickles = sorted(local_path(spec).glob("refs(*).p"))
    if not files and pickles:
        raise UserError(
            f"data {spec.bare!r}: {pickles[0].name} is a pickle and is not opened; make JSON of it, running nothing: "
            f"python -m vlbench.data.refer_convert '{pickles[0]}'"
        )
    if not files:
        raise UserError(f"data {spec.bare!r}: there is no refs(unc).json in {local_path(spec)}")
    chosen = spec.options.get("by", next(iter(files)) if len(files) == 1 else "")
    if chosen not in files:
        raise UserError(f"data {spec.bare!r}: say ?by=, {unknown('division', chosen, files)}")
    return files[chosen]


def _read_instances(file: Path) -> _Instances:
    content = read_json(file)
    images: dict[int, _Image] = {}
    seen: dict[int, str] = {}
    for where, item in objects(content, "images", file):
        number = field(item, "id", int, where)
        where = f"{where} (id {number})"
        refuse_repeated(number, where, seen, "image id")
        sizes = (field(item, key, int, where) for key in ("width", "height"))
        images[number] = _Image(field(item, "file_name", str, where), *sizes)
    names: dict[int, str] = {}
    seen = {}
    for where, item in objects(content, "categories", file):
        number = field(item, "id", int, where)
        where = f"{where} (id {number})"
        refuse_repeated(number, where, seen, "category id")
        names[number] = field(item, "name", str, where)
    regions: defaultdict[int, list[Region]] = defaultdict(list)
    place_of: dict[int, tuple[int, int]] = {}
    seen = {}
    for where, item in objects(content, "annotations", file):
        number = field(item, "id", int, where)
        where = f"{where} (id {number})"
        refuse_repeated(number, where, seen, "annotation id")
        image, category = field(item, "image_id", int, where), field(item, "category_id", int, where)
        if image not in images:
            raise UserError(f"{where}: image_id {image} is not among the images of the file")
        if category not in names:
            raise UserError(f"{where}: category_id {category} is not among the categories of the file")
        place_of[number] = (image, len(regions[image]))
        box = _box(item, images[image], where)
        regions[image].append(Region(names[category], box, attributes={"annotation_id": number}))
    return _Instances(images, regions, place_of)


def _box(item: Mapping[str, Any], image: _Image, where: str) -> tuple[float, float, float, float]:
    """Corners in pixels, cut to the image: COCO's own boxes, measured from polygons, leave it by less than one."""
    box = field(item, "bbox", list, where)
    problem = box_problem(box, image.height, image.width)
    if problem is not None:
        raise UserError(f"{where}: {problem}")
    left, top, width, height = (float(side) for side in box)
    right, bottom = left + width, top + height
    return max(left, 0.0), max(top, 0.0), min(right, float(image.width)), min(bottom, float(image.height))


def _read_refs(file: Path, instances: _Instances) -> list[_Ref]:
    refs: list[_Ref] = []
    seen: dict[int, str] = {}
    seen_sentences: dict[int, str] = {}
    for where, item in objects({"refs": read_json(file)}, "refs", file):
        number = field(item, "ref_id", int, where)
        where = f"{where} (ref_id {number})"
        refuse_repeated(number, where, seen, "ref_id")
        image, annotation = field(item, "image_id", int, where), field(item, "ann_id", int, where)
        if image not in instances.images:
            raise UserError(f"{where}: image_id {image} is not among the images of {_INSTANCES}")
        if annotation not in instances.place_of:
            raise UserError(f"{where}: ann_id {annotation} is not among the annotations of {_INSTANCES}")
        owner, target = instances.place_of[annotation]
        if owner != image:
            raise UserError(f"{where}: ann_id {annotation} belongs to image {owner}, the reference to image {image}")
        left, top, right, bottom = instances.regions[image][target].box_xyxy
        if right <= left or bottom <= top:
            raise UserError(f"{where}: the box of ann_id {annotation} has no area; nothing can overlap it")
        ids, phrases = [], []
        for place, sentence in enumerate(field(item, "sentences", list, where)):
            at = f"{where}, sentence {place}"
            if not isinstance(sentence, dict):
                raise UserError(f"{at}: expected an object, got {shown(sentence)}")
            ids.append(field(sentence, "sent_id", int, at))
            refuse_repeated(ids[-1], at, seen_sentences, "sent_id")
            phrases.append(field(sentence, "sent", str, at).strip())
        if not ids:
            raise UserError(f"{where}: it has no sentences")
        refs.append(_Ref(number, image, target, field(item, "split", str, where), tuple(ids), tuple(phrases)))
    return refs


def _present(spec: DataSpec) -> bool:
    """Whether references, boxes and a folder of images are there."""
    try:
        file = _refs_file(spec)
        folders = image_folders(spec, _FOLDERS)
    except UserError:
        return False
    there = file.is_file() and (local_path(spec) / _INSTANCES).is_file()
    return there and ("images" in spec.options or any(folder.name in {"train2014", "images"} for folder in folders))


READER = Reader(
    name="refcoco",
    open=_open,
    splits=_splits,
    help="refcoco:DIR with refs(unc).json (see vlbench.data.refer_convert) and instances.json; ?images=DIR, by=unc",
    options=IMAGES_OPTION | {"by": "which refs(*).json, where there are several: unc, google, umd"},
    present=_present,
)
