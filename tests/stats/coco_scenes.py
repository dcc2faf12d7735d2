"""Made images with objects and detections, and what pycocotools says of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlbench.data.masks import areas_of, from_bitmaps
from vlbench.stats.coco_match import Found, Scene, Truth

SIDE = 160


def ellipse(box: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The pixels of the ellipse in a box (left, top, width, height); one pixel at least."""
    y, x = np.mgrid[:side, :side] + 0.5
    left, top, width, height = box
    inside = ((x - left - width / 2) / (width / 2)) ** 2 + ((y - top - height / 2) / (height / 2)) ** 2 <= 1
    inside[int(np.clip(top + height / 2, 0, side - 1)), int(np.clip(left + width / 2, 0, side - 1))] = True
    return inside


def _ellipses(of: np.ndarray) -> np.ndarray:
    return np.stack([ellipse(box) for box in of]) if len(of) else np.zeros((0, SIDE, SIDE), bool)


def boxes(rng: np.random.Generator, n: int, *, side: int = SIDE) -> np.ndarray:
    """(n, 4) within the image; some of exactly 32 x 32 and 96 x 96, the ends of COCO's ranges."""
    sizes = np.exp(rng.uniform(np.log(8), np.log(side - 10), (n, 1)) + rng.uniform(-0.2, 0.2, (n, 2)))
    sizes = np.minimum(sizes, side - 10)
    fixed = rng.random(n)
    sizes[fixed < 0.15] = 32.0
    sizes[fixed > 0.9] = 96.0
    sizes = np.where(fixed[:, None] < 0.5, np.round(sizes), np.round(sizes, 2))
    return np.concatenate([np.round(rng.random((n, 2)) * (side - sizes), 1), sizes], axis=1)


def moved(rng: np.random.Generator, of: np.ndarray, amount: float, *, side: int = SIDE) -> np.ndarray:
    """Boxes shifted and stretched by a share of their size, kept in the image."""
    sizes = np.clip(of[:, 2:] * np.exp(amount * rng.standard_normal((len(of), 2))), 4, side)
    corners = np.clip(of[:, :2] + amount * of[:, 2:] * rng.standard_normal((len(of), 2)), 0, side - sizes)
    return np.concatenate([corners, sizes], axis=1).astype(np.float32).astype(np.float64)


def scene(
    rng: np.random.Generator,
    *,
    objects: int = 5,
    classes: Sequence[int] = (0, 1, 2),
    detected: float = 0.8,
    wrong: int = 4,
    amount: float = 0.1,
    crowds: float = 0.0,
    ties: int = 0,
    wrong_classes: Sequence[int] | None = None,
    masks: bool = True,
) -> Scene:
    """One image: objects, most of them detected more or less well, some twice, and detections of nothing.

    Args:
        ties: levels of scores; 0: all different.
    """
    true = boxes(rng, objects)
    of = rng.choice(np.asarray(classes), objects) if objects else np.zeros(0, dtype=np.int64)
    again = np.flatnonzero(rng.random(objects) < detected)
    again = np.concatenate([again, again[rng.random(len(again)) < 0.3]])
    guesses = np.concatenate([moved(rng, true[again], amount), moved(rng, boxes(rng, wrong), 0.01)])
    said = np.concatenate([of[again], rng.choice(np.asarray(wrong_classes or classes), wrong)]).astype(np.int64)
    scores = np.concatenate([rng.beta(4, 2, len(again)), rng.beta(2, 4, wrong)])
    scores = np.round(scores * ties) / ties if ties else scores
    true_masks, found_masks, areas = None, None, np.prod(true[:, 2:], axis=1)
    if masks:
        true_masks, found_masks = (from_bitmaps(_ellipses(of_boxes)) for of_boxes in (true, guesses))
        areas[objects // 3 :] = areas_of(true_masks)[objects // 3 :]  # the others stand on the ends of the ranges
    crowd = rng.random(objects) < crowds
    return Scene(
        SIDE,
        SIDE,
        Truth(true, of.astype(np.int64), areas, crowd, true_masks),
        Found(guesses, scores.astype(np.float32).astype(np.float64), said, found_masks),
    )


def nothing_found(of: Scene) -> Scene:
    empty = np.zeros(0)
    return replace(of, found=Found(np.zeros((0, 4)), empty, empty.astype(np.int64), []))


def nothing_there(of: Scene) -> Scene:
    empty = np.zeros(0)
    return replace(of, truth=Truth(np.zeros((0, 4)), empty.astype(np.int64), empty, empty.astype(bool), []))


def perfect(of: Scene) -> Scene:
    """Every object that is no crowd, found as it is."""
    truth, keep = of.truth, np.flatnonzero(~of.truth.crowd_G)
    scores = np.linspace(0.9, 0.5, len(keep))
    masks = [truth.masks[place] for place in keep]
    return replace(of, found=Found(truth.boxes_G4[keep], scores, truth.classes_G[keep], masks))


def pycocotools_metrics(scenes: Sequence[Scene], *, masks: bool, classes: int = 10) -> list[float]:
    """The twelve numbers of ``COCOeval``, from dictionaries written as its users write them; -1 where there is none."""
    truth, results = [], []
    for image, one in enumerate(scenes):
        t, f = one.truth, one.found
        truth += [
            {
                "id": 1 + 1000 * image + place,
                "image_id": 17 * image + 5,
                "category_id": 3 * int(t.classes_G[place]) + 1,
                "bbox": t.boxes_G4[place].tolist(),
                "area": float(t.areas_G[place]),
                "iscrowd": int(t.crowd_G[place]),
                "segmentation": t.masks[place] if masks else None,
            }
            for place in range(len(t.classes_G))
        ]
        results += [
            {
                "image_id": 17 * image + 5,
                "category_id": 3 * int(f.classes_D[place]) + 1,
                "score": float(f.scores_D[place]),
            }
            | ({"segmentation": f.masks[place]} if masks else {"bbox": f.boxes_D4[place].tolist()})
            for place in range(len(f.scores_D))
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": 17 * i + 5, "height": one.height, "width": one.width} for i, one in enumerate(scenes)],
            "annotations": truth,
            "categories": [{"id": 3 * place + 1, "name": f"c{place}"} for place in range(classes)],
        }
        coco.createIndex()
        found = coco.loadRes(results) if results else COCO()
        if not results:
            found.dataset = {**coco.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(coco, found, "segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()
