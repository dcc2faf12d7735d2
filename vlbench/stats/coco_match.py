"""Which detection found which object, by COCO's rule, over all images at once.

The rule (pycocotools, ``COCOeval.evaluateImg``): in each image and class the 100 surest detections take, from the
surest on, the object that they overlap most and that is still free; an object that does not count (a crowd, or one
outside the range of areas that is asked about) is taken only where none that counts is left, and a crowd by any number
of detections. A detection that took what does not count, or that took nothing and is itself outside the range, does not
count either. Overlaps with a crowd are shares of the detection's own area, not of the union.

Everything is held for all ranges of areas and all thresholds at once, since what is free differs between them.

N images, D detections and G objects of all images, A ranges of areas, T thresholds of overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.core.errors import UserError

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

THRESHOLDS_T: Doubles = np.linspace(0.5, 0.95, 10)
"""Overlaps (intersection over union) at which a detection counts as right."""
AREAS = {"": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Pixels from and to, both included: an object of exactly 32 x 32 is small and medium."""
MAX_DETECTIONS = 100
"""The surest of an image and class that are looked at."""


@dataclass(frozen=True)
class Truth:
    """The G objects of one image."""

    boxes_G4: Doubles
    """COCO's: left, top, width, height."""
    classes_G: Integers
    areas_G: Doubles
    """As annotated; of the mask, where there is one."""
    crowd_G: Flags
    masks: Sequence[Mapping[str, Any]] | None
    """Compressed run lengths, or None where the objects have boxes alone."""


@dataclass(frozen=True)
class Found:
    """The D detections of one image."""

    boxes_D4: Doubles
    """COCO's: left, top, width, height."""
    scores_D: Doubles
    classes_D: Integers
    masks: Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Scene:
    """One image: what is in it, and what was found."""

    height: int
    width: int
    truth: Truth
    found: Found


@dataclass(frozen=True)
class Matches:
    """All detections that are looked at, by class, then from the surest on; equal scores in the order of the images."""

    class_D: Integers
    image_D: Integers
    rank_D: Integers
    """Place among the detections of its image and class, from 0."""
    right_ATD: Flags
    """Took an object that counts."""
    ignored_ATD: Flags
    """Does not count."""
    object_class_G: Integers
    object_image_G: Integers
    counts_AG: Flags
    """Whether an object counts in a range of areas."""
    n_images: int


def match(scenes: Sequence[Scene], *, masks: bool) -> Matches:
    """Match detections with objects.

    Args:
        scenes: in the order in which equal scores are to be read: COCO's, by image id.
        masks: compare masks; else boxes.

    Raises:
        UserError: where a score is not finite, or masks are asked for and absent.
    """
    class_D, image_D, place_D = _listed([scene.found.classes_D for scene in scenes])
    scores_D = _joined([scene.found.scores_D for scene in scenes])
    areas_D = _joined([_found_areas(scene.found, masks) for scene in scenes])
    if not np.isfinite(scores_D).all():
        raise UserError(f"{int((~np.isfinite(scores_D)).sum())} of {len(scores_D)} detections have no finite score")
    order = np.lexsort((-scores_D, image_D, class_D))  # stable: equal scores of an image stay as they were given
    rank_D = _rank_in_group(class_D[order], image_D[order])
    order, rank_D = order[rank_D < MAX_DETECTIONS], rank_D[rank_D < MAX_DETECTIONS]
    class_D, image_D, place_D = class_D[order], image_D[order], place_D[order]
    scores_D, areas_D = scores_D[order], areas_D[order]

    class_G, image_G, place_G = _listed([scene.truth.classes_G for scene in scenes])
    order_G = np.lexsort((image_G, class_G))
    class_G, image_G, place_G = class_G[order_G], image_G[order_G], place_G[order_G]
    crowd_G = _joined([scene.truth.crowd_G for scene in scenes]).astype(bool)[order_G]
    areas_G = _joined([scene.truth.areas_G for scene in scenes]).astype(np.float64)[order_G]
    counts_AG = _inside(areas_G) & ~crowd_G

    shape = (len(AREAS), len(THRESHOLDS_T), len(class_D))
    right_ATD, ignored_ATD = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    ignored_ATD[:] = ~_inside(areas_D)[:, None]
    for of_D, of_G in _shared_groups(class_D * len(scenes) + image_D, class_G * len(scenes) + image_G):
        scene = scenes[image_D[of_D.start]]
        overlap_dg = _overlaps(scene, place_D[of_D], place_G[of_G], masks)
        right, ignored = _take(overlap_dg, counts_AG[:, of_G], crowd_G[of_G])
        ignored_ATD[:, :, of_D] = ignored | (ignored_ATD[:, :, of_D] & ~right)
        right_ATD[:, :, of_D] = right
    by_score = np.lexsort((-scores_D, class_D))  # stable again: within a class by score, then as the images are given
    return Matches(
        class_D[by_score],
        image_D[by_score],
        rank_D[by_score],
        right_ATD[:, :, by_score],
        ignored_ATD[:, :, by_score],
        class_G,
        image_G,
        counts_AG,
        len(scenes),
    )


def _take(overlap_dg: Doubles, counts_Ag: Flags, crowd_g: Flags) -> tuple[Flags, Flags]:
    """Of one image and class: (A, T, d) whether each detection took what counts, and what does not."""
    n_areas, n_thresholds, n = len(counts_Ag), len(THRESHOLDS_T), len(overlap_dg)
    right_ATd, ignored_ATd = (np.zeros((n_areas, n_thresholds, n), dtype=bool) for _ in range(2))
    free_ATg = np.ones((n_areas, n_thresholds, len(crowd_g)), dtype=bool)
    bonus_A1g = (counts_Ag * len(crowd_g))[:, None]
    area_A1, threshold_1T = np.arange(n_areas)[:, None], np.arange(n_thresholds)[None]
    needed_T = np.minimum(THRESHOLDS_T, 1 - 1e-10)
    for d in np.flatnonzero(overlap_dg.max(axis=1) >= needed_T[0]).tolist():
        overlap_g = overlap_dg[d]
        # The place in the order of overlaps, of equal ones the last; what counts stands above all that does not.
        rank_g = np.empty(len(overlap_g), dtype=np.int64)
        rank_g[np.argsort(overlap_g, kind="stable")] = np.arange(len(overlap_g))
        reached_Tg = overlap_g >= needed_T[:, None]
        key_ATg = np.where(reached_Tg & free_ATg, rank_g + bonus_A1g, -1)
        taken_AT = key_ATg.argmax(axis=2)
        took_AT = np.take_along_axis(key_ATg, taken_AT[..., None], axis=2)[..., 0] >= 0
        counts_AT = counts_Ag[area_A1, taken_AT]
        right_ATd[:, :, d], ignored_ATd[:, :, d] = took_AT & counts_AT, took_AT & ~counts_AT
        free_ATg[area_A1, threshold_1T, taken_AT] &= ~took_AT | crowd_g[taken_AT]
    return right_ATd, ignored_ATd


def _overlaps(scene: Scene, detections: Integers, objects: Integers, masks: bool) -> Doubles:
    """(d, g) intersection over union; with a crowd, over the detection's own area."""
    from faster_coco_eval.core import mask as api

    crowd = scene.truth.crowd_G[objects].astype(int).tolist()
    if masks:
        assert scene.found.masks is not None, "checked with their areas"
        if scene.truth.masks is None:
            raise UserError("the objects of the data have no masks: there is no mask AP")
        found = [dict(scene.found.masks[place]) for place in detections.tolist()]
        true = [dict(scene.truth.masks[place]) for place in objects.tolist()]
        return np.asarray(api.iou(found, true, crowd), dtype=np.float64)
    boxes = scene.found.boxes_D4[detections], scene.truth.boxes_G4[objects]
    return np.asarray(api.iou(*(np.ascontiguousarray(of, dtype=np.float64) for of in boxes), crowd), dtype=np.float64)


def _found_areas(found: Found, masks: bool) -> Doubles:
    """What puts a detection into a range of areas: its mask where masks are judged, else its box."""
    from faster_coco_eval.core import mask as api

    if not masks:
        return found.boxes_D4[:, 2] * found.boxes_D4[:, 3]
    if not len(found.scores_D):
        return np.zeros(0)
    if found.masks is None:
        raise UserError("the detections have no masks: there is no mask AP")
    return np.asarray(api.area([dict(mask) for mask in found.masks]), dtype=np.float64)


def _inside(areas: Doubles) -> Flags:
    """(A, ...) whether each area is in the range, its ends included."""
    return np.stack([(areas >= least) & (areas <= most) for least, most in AREAS.values()])


def _listed(by_image: Sequence[Integers]) -> tuple[Integers, Integers, Integers]:
    """One list of all images: value, image, place within the image."""
    sizes = [len(of) for of in by_image]
    image = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(image)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return _joined(by_image).astype(np.int64), image.astype(np.int64), place.astype(np.int64)


def _joined(by_image: Sequence[NDArray[Any]]) -> NDArray[Any]:
    joined: NDArray[Any] = np.concatenate(by_image) if by_image else np.zeros(0)
    return joined


def _rank_in_group(class_D: Integers, image_D: Integers) -> Integers:
    """Place within each run of equal class and image."""
    here_D = np.arange(len(class_D))
    begins_D = np.ones(len(class_D), dtype=bool)
    begins_D[1:] = (class_D[1:] != class_D[:-1]) | (image_D[1:] != image_D[:-1])
    rank_D: Integers = here_D - np.maximum.accumulate(np.where(begins_D, here_D, 0))
    return rank_D


def _shared_groups(key_D: Integers, key_G: Integers) -> list[tuple[slice, slice]]:
    """Where in each sorted list the keys stand that both have."""
    shared = np.intersect1d(key_D, key_G)
    ends = [np.searchsorted(keys, shared, side=side) for keys in (key_D, key_G) for side in ("left", "right")]
    return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(*(of.tolist() for of in ends), strict=True)]
