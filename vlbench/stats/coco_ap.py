"""COCO's average precision and recall, and their values per image, for intervals and paired tests.

Average precision of one class (pycocotools, ``COCOeval.accumulate``): of all images' detections from the surest on, the
precision and recall after each; at recall 0, 0.01, ..., 1 the highest precision from there on, 0 where that recall is
not reached; the mean of those 101. The metric is the mean over thresholds of overlap and over the classes that have an
object. Average recall is the recall after the last.

Neither is a mean over images, so an image's value is its jackknife pseudo-value (``stats.ranked``), from what the
metric is without that image, exactly: its objects and detections leave together, and a class whose last object leaves
is left out of the mean, as COCO leaves out a class without objects. Only right detections matter to the curve; so for
each class there is one matrix of images by right detections, of how many of the image's own stand at or above each.

Average precision reads higher on a small sample than on a large one, because the highest precision from a recall on is
taken: on 80 images of two classes by half a standard error. The interval is about what this many images show: there it
held the population's number in 92 of 100 samples, and that of average recall, which has no such lean, in 95. With a
bootstrap that makes the metric again for each resample it is as wide, leans further and held it in 52 of 60 samples,
where this one held it in 54.

N images, I those with anything of one class, D its detections that count, M those of them that are right, T thresholds
of overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from vlbench.core.errors import UserError
from vlbench.stats.coco_match import (
    AREAS,
    MAX_DETECTIONS,
    Doubles,
    Flags,
    Integers,
    Matches,
    Scene,
    match,
)
from vlbench.stats.ranked import LeftOut

RECALLS = 101
"""Levels of recall: 0, 0.01, ..., 1."""

_ALL = slice(None)
_PRECISIONS = {"": {"ap": _ALL, "ap50": slice(0, 1), "ap75": slice(5, 6)}} | {
    area: {f"ap_{area}": _ALL} for area in AREAS if area
}
"""Range of areas → metric → the thresholds that it is the mean of."""
_RECALLS = {"": {f"ar{first}": first for first in (1, 10, MAX_DETECTIONS)}} | {
    area: {f"ar_{area}": MAX_DETECTIONS} for area in AREAS if area
}
"""Range of areas → metric → how many of the surest detections of an image and class it looks at."""
METRICS = tuple(name for table in (_PRECISIONS, _RECALLS) for area in AREAS for name in table[area])
"""COCO's twelve numbers, in its order."""

_BLOCK = 1 << 18
"""Entries of the matrix held at once: 2 MB, which stay in a processor's cache."""


def coco_metrics(scenes: Sequence[Scene], *, masks: bool) -> dict[str, LeftOut]:
    """The twelve numbers, and what each is without each image.

    A number is absent where no object counts for it (COCO writes -1), and where a single image has all those that do:
    it has no value without that image.

    Args:
        scenes: in the order of COCO's image ids, by which equal scores are read.
        masks: of masks; else of boxes.

    Raises:
        UserError: where there is no object at all, and where ``match`` does.
    """
    if not any((~scene.truth.crowd_G).any() for scene in scenes):
        raise UserError("no image of the reported split has an object: average precision has no value")
    matches = match(scenes, masks=masks)
    tallies = {metric: _Tally(matches.n_images) for metric in METRICS}
    for place, area in enumerate(AREAS):
        for one in _classes(matches, place):
            precisions_T1I = one.average_precisions()
            for metric, thresholds in _PRECISIONS[area].items():
                tallies[metric].add(one, precisions_T1I[thresholds].mean(axis=0))
            for metric, first in _RECALLS[area].items():
                tallies[metric].add(one, one.recalls(first).mean(axis=0))
    return {metric: tally.left_out() for metric, tally in tallies.items() if tally.has_intervals}


# ------------------------------------------------------------------------------------------------ mean over classes


@dataclass
class _Tally:
    """The mean over classes, and without each image the mean over those that still have an object."""

    n_images: int
    total: float = 0.0
    classes: int = 0
    change_N: Doubles = field(init=False)
    gone_N: Integers = field(init=False)
    """Classes whose objects are all in this image."""

    def __post_init__(self) -> None:
        self.change_N, self.gone_N = np.zeros(self.n_images), np.zeros(self.n_images, dtype=np.int64)

    def add(self, one: _Class, value_1I: Doubles) -> None:
        """A class's value, then the value without each of its images."""
        value, without_I = value_1I[0], value_1I[1:]
        gone_I = one.objects_I == one.objects_I.sum()
        self.total += value
        self.classes += 1
        self.change_N[one.images_I] += without_I - value  # a class without objects has the value 0 and adds nothing
        self.gone_N[one.images_I] += gone_I

    @property
    def has_intervals(self) -> bool:
        return self.classes > 0 and bool((self.gone_N < self.classes).all())

    def left_out(self) -> LeftOut:
        return LeftOut(float(self.total / self.classes), (self.total + self.change_N) / (self.classes - self.gone_N))


# -------------------------------------------------------------------------------------------------------- one class


@dataclass(frozen=True)
class _Class:
    """One class in one range of areas."""

    images_I: Integers
    objects_I: Integers
    """Objects that count."""
    image_D: Integers
    """Index into ``images_I``, of all detections from the surest on."""
    rank_D: Integers
    right_TD: Flags
    ignored_TD: Flags

    def recalls(self, first: int) -> Doubles:
        """(T, 1 + I) the share of objects found by the ``first`` detections of each image; then without each image."""
        objects, n = int(self.objects_I.sum()), len(self.images_I)
        looked_TD = self.right_TD & (self.rank_D < first)
        own_TI = np.stack([np.bincount(self.image_D[looked_D], minlength=n) for looked_D in looked_TD])
        found_T1 = own_TI.sum(axis=1, keepdims=True)
        left_I = np.maximum(objects - self.objects_I, 1)  # where none is left, the class is not asked
        return np.concatenate([found_T1 / objects, (found_T1 - own_TI) / left_I], axis=1)

    def average_precisions(self) -> Doubles:
        """(T, 1 + I) average precision; then without each image."""
        rows = []
        for right_D, ignored_D in zip(self.right_TD, self.ignored_TD, strict=True):
            counted_D = ~ignored_D
            rows.append(_average_precision(right_D[counted_D], self.image_D[counted_D], self.objects_I))
        return np.stack(rows)


def _classes(matches: Matches, area: int) -> Iterator[_Class]:
    """The classes that have an object that counts."""
    counts_G = matches.counts_AG[area]
    class_G, image_G = matches.object_class_G[counts_G], matches.object_image_G[counts_G]
    for name in np.unique(class_G).tolist():
        start, stop = np.searchsorted(matches.class_D, [name, name + 1]).tolist()
        of_D, objects = slice(start, stop), image_G[class_G == name]
        images_I = np.union1d(objects, matches.image_D[of_D])
        yield _Class(
            images_I,
            np.bincount(np.searchsorted(images_I, objects), minlength=len(images_I)),
            np.searchsorted(images_I, matches.image_D[of_D]),
            matches.rank_D[of_D],
            matches.right_ATD[area, :, of_D],
            matches.ignored_ATD[area, :, of_D],
        )


def _average_precision(right_D: Flags, image_D: Integers, objects_I: Integers) -> Doubles:
    """(1 + I,) of the detections that count at one threshold, from the surest on; then without each image."""
    at_M, objects = np.flatnonzero(right_D), int(objects_I.sum())
    if not len(at_M):
        return np.zeros(1 + len(objects_I))
    best_M = np.maximum.accumulate((np.arange(1, len(at_M) + 1) / (at_M + 1))[::-1])[::-1]
    values_1I = np.full(1 + len(objects_I), float(_levels(objects)[: len(at_M)] @ best_M) / RECALLS)
    # Wrong detections below the last right one change nothing.
    right_D, image_D = right_D[: at_M[-1] + 1], image_D[: at_M[-1] + 1]
    concerned = np.flatnonzero((objects_I > 0) | (np.bincount(image_D, minlength=len(objects_I)) > 0))
    order = np.argsort(image_D, kind="stable")
    sorted_D, next_D = image_D[order], np.searchsorted(at_M, order)  # the first right detection at or below each
    rows = max(1, _BLOCK // len(at_M))
    for first in range(0, len(concerned), rows):
        images_i = concerned[first : first + rows]
        mine = slice(*np.searchsorted(sorted_D, [images_i[0], images_i[-1] + 1]).tolist())
        cell_d = np.searchsorted(images_i, sorted_D[mine]) * len(at_M) + next_D[mine]
        own_right_d = right_D[order[mine]]
        values_1I[1 + images_i] = _without(at_M, cell_d, own_right_d, objects - objects_I[images_i])
    return values_1I


def _without(at_M: Integers, cell_d: Integers, right_d: Flags, objects_i: Integers) -> Doubles:
    """(i,) average precision without each of a few images.

    Args:
        at_M: where the right detections of all images stand, from 0.
        cell_d: place in the (i, M) matrix of each detection of these images: its image, and the first right detection
            at or below it (itself, where it is right).
        right_d: whether it is right.
        objects_i: objects that are left.
    """
    shape = len(objects_i), len(at_M)
    own_iM, seen_iM = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int32)
    own_iM.reshape(-1)[cell_d[right_d]] = True
    np.add.at(seen_iM.reshape(-1), cell_d, 1)
    np.subtract(at_M + 1, seen_iM.cumsum(axis=1), out=seen_iM, casting="unsafe")
    kept_iM = np.arange(1, len(at_M) + 1, dtype=np.int32) - own_iM.cumsum(axis=1, dtype=np.int32)
    precision_iM = np.divide(kept_iM, seen_iM, out=np.zeros(shape), where=~own_iM)
    best_iM = np.maximum.accumulate(precision_iM[:, ::-1], axis=1)[:, ::-1]
    counts, kind_i = np.unique(objects_i, return_inverse=True)
    levels_KM = np.zeros((len(counts), len(at_M) + 1))
    for row, count in zip(levels_KM, counts.tolist(), strict=True):
        known = _levels(count)[: len(at_M)]
        row[1 : 1 + len(known)] = known
    kept_iM[own_iM] = 0  # what has left reaches no level
    values_i: Doubles = np.einsum("im,im->i", levels_KM[kind_i[:, None], kept_iM], best_iM) / RECALLS
    return values_i


@lru_cache(maxsize=256)
def _levels(objects: int) -> Doubles:
    """(objects,) how many levels of recall are reached with the first object found, the second, ...

    Compared in floating point, as COCO's code does: what three of ten objects reach is no matter of arithmetic there.
    """
    if not objects:
        return np.zeros(0)
    reached_R = np.searchsorted(np.arange(1, objects + 1) / objects, np.linspace(0.0, 1.0, RECALLS), side="left")
    return np.bincount(reached_R, minlength=objects).astype(np.float64)
