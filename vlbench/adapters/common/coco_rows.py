"""Detections beside the objects they should have found, one row an image; and COCO's metrics from those rows alone.

A row holds what COCO's evaluation needs of its image: boxes, scores, classes and masks of the detections; boxes as they
were annotated, classes, areas, crowds and masks of the objects. Masks are COCO's strings, whose size is the image's. So
every number, interval and paired test is made again without the data.

N images; D detections and G objects of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlbench.adapters.common.classification import IMAGE_DIGITS
from vlbench.core.errors import UserError
from vlbench.core.types import Example, Outcomes, Rows, Source
from vlbench.data.digests import image_digests
from vlbench.data.images import inspect
from vlbench.data.masks import areas_of, to_rle
from vlbench.stats.coco_ap import coco_metrics
from vlbench.stats.coco_library import library_metrics
from vlbench.stats.coco_match import Found, Scene, Truth
from vlbench.stats.ranked import pseudo_values

if TYPE_CHECKING:
    from vlbench.finetune.detection.types import Detections

AGREEMENT = 1e-6
"""By how much our numbers may differ from the library's."""


def detection_rows(source: Source, detections: Sequence[Detections], *, meta: Mapping[str, Any] | None = None) -> Rows:
    """One row an image, with COCO's numbers by faster-coco-eval in ``meta["coco"]``.

    Columns: ``id``, ``image`` (digest), ``height``, ``width``; ``boxes`` (4 D numbers: left, top, right, bottom),
    ``scores``, ``classes``, ``masks``; ``true_boxes`` (4 G numbers: left, top, width, height), ``true_classes``,
    ``true_areas``, ``true_crowd``, ``true_masks``. The columns of masks are absent where the detections have none or
    the objects have none.

    Args:
        source: of regions, as the reader ``coco`` gives them.
        detections: of each of its images, in order.
        meta: goes into the rows' meta; its ``notes`` are kept.

    Raises:
        UserError: where the source has no regions or no object, some of its objects have masks and others none, a
            number of the detections is not finite, or an image is of another size than its annotations say.
        BadExample: where an entry of the source is broken.
    """
    if "regions" not in source.provides or source.classes is None:
        raise UserError(f"{source.spec} ({source.split}): has no boxes; detection needs annotated objects")
    assert len(detections) == len(source), f"{len(detections)} images detected of {len(source)}"
    columns: dict[str, list[Any]] = {}
    with_masks = all(found.masks is not None for found in detections)
    for index, found in enumerate(detections):
        for name, value in _row(source, source[index], found, with_masks).items():
            columns.setdefault(name, []).append(value)
    if not any((crowd_G == 0).any() for crowd_G in columns.get("true_crowd", ())):
        raise UserError(f"{source.spec} ({source.split}): no image has an object: average precision has no value")
    if with_masks and not _has_masks(source, columns):
        del columns["masks"], columns["true_masks"]
    columns["image"] = [digest[:IMAGE_DIGITS] for digest in image_digests(source)]
    notes = [*(meta or {}).get("notes", ()), *_notes(columns, source.classes)]
    rows = Rows(columns, {**(meta or {}), "classes": list(source.classes), "notes": notes})
    scenes = [scene for _, scene in _scenes(rows)]
    numbers: dict[str, float] = {}
    for kind, masks in _kinds(rows).items():
        known = library_metrics(scenes, classes=len(source.classes), masks=masks)
        numbers |= {f"{kind}_{name}": value for name, value in known.items()}
    return Rows(columns, {**rows.meta, "coco": numbers})


def detection_outcomes(rows: Rows) -> dict[str, Outcomes]:
    """COCO's twelve numbers for boxes (``box_ap``, ``box_ap50``, ...) and for masks (``mask_ap``, ...), per image.

    The values are jackknife pseudo-values (``stats.coco_ap``); images with the same bytes are one cluster. Equal scores
    are read in the order of the ids, as COCO's code reads them, so that the order of the rows changes nothing.

    Raises:
        UserError: where there is no object, all of them are in one image, or a number differs from the library's that
            the rows carry.
    """
    ids, images = [str(name) for name in rows["id"]], [str(name) for name in rows["image"]]
    placed = _scenes(rows)
    place_N = np.array([place for place, _ in placed])
    outcomes = {}
    for kind, masks in _kinds(rows).items():
        for name, found in coco_metrics([scene for _, scene in placed], masks=masks).items():
            metric, values_N = f"{kind}_{name}", np.empty(len(ids))
            _check(metric, found.value, rows.meta.get("coco", {}))
            values_N[place_N] = pseudo_values(found)
            outcomes[metric] = Outcomes(ids, values_N, images, binary=False, pseudo=True)
    if not outcomes:  # there are objects, and none without one of the images
        raise UserError("all objects lie in one image: average precision has no interval; report on more images")
    return outcomes


def check_images(source: Source) -> None:
    """What would stop ``detection_rows``, before there are detections: every image by its header alone.

    Raises:
        UserError: where an image is of another size than its annotations say.
        BadExample: where an entry of the source is broken.
    """
    for index in range(len(source)):
        example = source[index]
        _sides(example, f"{source.spec} ({source.split}): {example.id}")


# ------------------------------------------------------------------------------------------------------- to rows


def _row(source: Source, example: Example, found: Detections, with_masks: bool) -> dict[str, Any]:
    where = f"{source.spec} ({source.split}): {example.id}"
    if "bboxes" not in example.extra or "categories" not in example.extra:
        raise UserError(f"{where}: has boxes, but not in COCO's form; give the data as coco:DIR")
    height, width = _sides(example, where)
    numbers = np.concatenate([np.ravel(found.boxes_K4), np.ravel(found.scores_K)])
    if not np.isfinite(numbers).all():
        raise UserError(f"{where}: a box or score of its detections is not finite; look for NaN in the training's loss")
    extra = example.extra
    crowd = [int(region.attributes.get("iscrowd", 0)) for region in example.regions]
    row = {
        "id": example.id,
        "height": height,
        "width": width,
        "boxes": np.ravel(found.boxes_K4).astype(np.float32),
        "scores": np.asarray(found.scores_K, dtype=np.float32),
        "classes": np.asarray(found.classes_K, dtype=np.int32),
        "true_boxes": np.asarray(extra["bboxes"], dtype=np.float64).ravel(),
        "true_classes": np.asarray(extra["categories"], dtype=np.int32),
        "true_crowd": np.asarray(crowd, dtype=np.int8),
    }
    masks = [
        to_rle(region.segmentation, height, width, where=where) for region in example.regions if region.segmentation
    ]
    row["true_areas"] = _areas(example, masks)
    if with_masks:
        assert found.masks is not None, "with_masks says so"
        wrong = [mask["size"] for mask in found.masks if list(mask["size"]) != [height, width]]
        assert not wrong, f"{where}: masks of {wrong[0]} pixels found in an image of {[height, width]}"
        row["masks"] = [str(mask["counts"]) for mask in found.masks]
        row["true_masks"] = [str(mask["counts"]) for mask in masks]
    return row


def _sides(example: Example, where: str) -> tuple[int, int]:
    """Height and width of the stored image, which the annotations must agree with where they say them."""
    assert example.image is not None, "a reader of files gives the image or BadExample"
    info = inspect(example.image, where)
    said = example.extra.get("height", info.height), example.extra.get("width", info.width)
    if said != (info.height, info.width):
        raise UserError(
            f"{where}: the image has {info.height} x {info.width} pixels (height x width), where its annotations say "
            f"{said[0]} x {said[1]}: they are of another image, or it was resized"
        )
    return info.height, info.width


def _areas(example: Example, masks: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """As annotated; where that is missing, of the mask, and without a mask of the box."""
    boxes_G4 = np.asarray(example.extra["bboxes"], dtype=np.float64).reshape(-1, 4)
    own_G = areas_of(masks) if len(masks) == len(boxes_G4) else boxes_G4[:, 2] * boxes_G4[:, 3]
    given = [region.attributes.get("area") for region in example.regions]
    return np.array([own if area is None else area for own, area in zip(own_G, given)], dtype=np.float64)


def _has_masks(source: Source, columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether the objects of a source have masks: all of them, or none."""
    bare = [
        name
        for name, masks, classes_G in zip(columns["id"], columns["true_masks"], columns["true_classes"])
        if len(masks) < len(classes_G)
    ]
    masked = sum(map(len, columns["true_masks"]))
    if masked and bare:
        raise UserError(
            f"{source.spec} ({source.split}): {masked} objects have a mask and others have none, first in image "
            f"{bare[0]}: give all of them a segmentation, or none"
        )
    return bool(masked)


def _notes(columns: Mapping[str, Sequence[Any]], classes: Sequence[str]) -> list[str]:
    """What the mean over classes leaves out, and what its interval cannot see."""
    images_C = np.zeros(len(classes), dtype=np.int64)
    for classes_G, crowd_G in zip(columns["true_classes"], columns["true_crowd"]):
        images_C[np.unique(np.asarray(classes_G)[np.asarray(crowd_G) == 0])] += 1
    notes = []
    if absent := [name for name, count in zip(classes, images_C) if not count]:
        notes.append(f"classes without an object, left out of the mean: {len(absent)}, first {absent[0]!r}")
    if single := int((images_C == 1).sum()):
        notes.append(f"classes with objects in one image alone, whose chance the interval does not see: {single}")
    return notes


# ----------------------------------------------------------------------------------------------------- from rows


def _kinds(rows: Rows) -> dict[str, bool]:
    """Of what the rows have numbers: boxes, and masks where both sides have them."""
    return {"box": False, "mask": True} if "masks" in set(rows) else {"box": False}


def _scenes(rows: Rows) -> list[tuple[int, Scene]]:
    """Place among the rows and scene of each image, in COCO's order of ids: numbers by size, then words."""
    ids = [str(name) for name in rows["id"]]
    order = sorted(range(len(ids)), key=lambda place: (not ids[place].isdecimal(), _number(ids[place]), ids[place]))
    masks, true_masks = (rows[name] if name in set(rows) else None for name in ("masks", "true_masks"))
    scenes = []
    for place in order:
        size = [int(rows["height"][place]), int(rows["width"][place])]
        corners_D4 = np.asarray(rows["boxes"][place], dtype=np.float32).reshape(-1, 4)
        # Width and height in the precision of the corners, as torchvision's reference and detectron2 take them.
        boxes_D4 = np.concatenate([corners_D4[:, :2], corners_D4[:, 2:] - corners_D4[:, :2]], axis=1)
        found = Found(
            boxes_D4.astype(np.float64),
            np.asarray(rows["scores"][place], dtype=np.float32).astype(np.float64),
            np.asarray(rows["classes"][place], dtype=np.int64),
            None if masks is None else [{"size": size, "counts": counts} for counts in masks[place]],
        )
        truth = Truth(
            np.asarray(rows["true_boxes"][place], dtype=np.float64).reshape(-1, 4),
            np.asarray(rows["true_classes"][place], dtype=np.int64),
            np.asarray(rows["true_areas"][place], dtype=np.float64),
            np.asarray(rows["true_crowd"][place], dtype=bool),
            None if true_masks is None else [{"size": size, "counts": counts} for counts in true_masks[place]],
        )
        scenes.append((place, Scene(size[0], size[1], truth, found)))
    return scenes


def _number(name: str) -> int:
    return int(name) if name.isdecimal() else 0


def _check(metric: str, value: float, library: Mapping[str, float]) -> None:
    if metric in library and abs(library[metric] - value) > AGREEMENT:
        raise UserError(
            f"{metric} of these rows is {value:.6f}, where faster-coco-eval gave {library[metric]:.6f} when they were "
            "stored: the rows or the library have changed; evaluate the model again"
        )
