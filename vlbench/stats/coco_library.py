"""The twelve numbers as faster-coco-eval gives them, which are pycocotools'.

``stats.coco_ap`` gives the same and their values per image. What is reported is held against this when it is made, so
that no number stands that COCO's own evaluation would not give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlbench.stats.coco_ap import METRICS
from vlbench.stats.coco_match import Scene


def library_metrics(scenes: Sequence[Scene], *, classes: int, masks: bool) -> dict[str, float]:
    """COCO's numbers by name; those without a value (-1) are absent.

    Args:
        scenes: as of ``coco_ap.coco_metrics``.
        classes: how many there are.
        masks: of masks; else of boxes.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(_truth(scenes, classes, masks), print_function=_silent)
    found = truth.loadRes(_found(scenes, masks))
    evaluation = COCOeval_faster(truth, found, iouType="segm" if masks else "bbox", print_function=_silent)
    evaluation.run()
    return {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True) if value >= 0}


def _truth(scenes: Sequence[Scene], classes: int, masks: bool) -> dict[str, Any]:
    objects: list[dict[str, Any]] = []
    for image, scene in enumerate(scenes, start=1):
        truth = scene.truth
        for place in range(len(truth.classes_G)):
            item = {
                "id": len(objects) + 1,  # from 1: pycocotools takes an object 0 for none
                "image_id": image,
                "category_id": int(truth.classes_G[place]) + 1,
                "bbox": truth.boxes_G4[place].tolist(),
                "area": float(truth.areas_G[place]),
                "iscrowd": int(truth.crowd_G[place]),
            }
            objects.append(item | ({"segmentation": dict(truth.masks[place])} if masks and truth.masks else {}))
    images = [
        {"id": image, "height": scene.height, "width": scene.width} for image, scene in enumerate(scenes, start=1)
    ]
    names = [{"id": place, "name": str(place)} for place in range(1, classes + 1)]
    return {"images": images, "annotations": objects, "categories": names}


def _found(scenes: Sequence[Scene], masks: bool) -> list[dict[str, Any]]:
    """Masks without their boxes: with them COCO's code puts a mask into a range of areas by its box."""
    results: list[dict[str, Any]] = []
    for image, scene in enumerate(scenes, start=1):
        found = scene.found
        for place in range(len(found.scores_D)):
            shape = (
                {"segmentation": dict(found.masks[place])}
                if masks and found.masks is not None
                else {"bbox": found.boxes_D4[place].tolist()}
            )
            item = {"category_id": int(found.classes_D[place]) + 1, "score": float(found.scores_D[place])}
            results.append({"image_id": image} | item | shape)
    return results


def _silent(*_: object) -> None:
    """faster-coco-eval reports its progress through this."""
