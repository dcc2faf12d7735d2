"""detectron2's COCOEvaluator on stored rows of detection. Import this module only where detectron2 is installed.

What is reported is ``adapters/common/coco_rows.py``'s, whatever the engine; this is the second opinion, and the two
agree to rounding.

D detections and G objects of one image.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from vlbench.core.types import Rows
from vlbench.data.masks import to_bitmaps

AGREEMENT = 1e-6
"""By how much its numbers may differ from ours."""
_KINDS = {"bbox": "box", "segm": "mask"}
_METRICS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
}


def second_opinion(rows: Rows) -> Rows:
    """The rows with COCOEvaluator's numbers in ``meta["detectron2"]``, and a note that says whether they are ours."""
    numbers, ours = coco_evaluator(rows), rows.meta["coco"]
    gaps = {name: abs(value - ours[name]) for name, value in numbers.items() if name in ours}
    worst = max(gaps, key=lambda name: gaps[name], default="")
    if not gaps:
        note = "detectron2's COCOEvaluator gives no number where nothing was found"
    elif gaps[worst] > AGREEMENT:
        note = f"detectron2's COCOEvaluator says {worst} {numbers[worst]:.6f}, not {ours[worst]:.6f}"
    else:
        note = f"detectron2's COCOEvaluator agrees in {len(gaps)} numbers to {AGREEMENT:.0e}"
    return replace(rows, meta={**rows.meta, "detectron2": numbers, "notes": [*rows.meta.get("notes", ()), note]})


def coco_evaluator(rows: Rows) -> dict[str, float]:
    """The numbers of detectron2's COCOEvaluator, as fractions under our names: ``box_ap``, ``mask_ap50``, ...

    Args:
        rows: as ``adapters.common.coco_rows.detection_rows`` makes them: objects and detections of each image.

    Returns:
        Without the numbers that are not defined, of a size that no object has; nothing at all where nothing was found
        in any image, for which it says NaN.
    """
    if not any(len(scores_D) for scores_D in rows["scores"]):
        return {}
    truth, tasks = _truth(rows), ("bbox", "segm") if "masks" in set(rows) else ("bbox",)
    # A name of its own, and a file of its own: the catalogue is the process's, and of a data set that is no file
    # COCOEvaluator writes <output_dir>/<name>_coco_format.json and reads it again the next time, whatever has changed
    # since. That conversion also puts a mask's pixels in the place of COCO's area, which decides what is small.
    name = f"vlbench-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="vlbench-detectron2-") as folder:
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps(truth))
        classes = [category["name"] for category in truth["categories"]]
        MetadataCatalog.get(name).set(json_file=str(file), thing_classes=classes)
        try:
            evaluator = COCOEvaluator(name, tasks=tasks, distributed=False)
            evaluator.reset()
            with warnings.catch_warnings():  # it makes arrays of tensors, mask by mask, in a way that numpy 2 warns of
                warnings.simplefilter("ignore", DeprecationWarning)
                for place, image in enumerate(truth["images"]):
                    evaluator.process([{"image_id": image["id"]}], [{"instances": _instances(rows, place)}])
            with contextlib.redirect_stdout(io.StringIO()):  # it prints a table
                results = evaluator.evaluate()
        finally:
            MetadataCatalog.remove(name)
    return {
        f"{_KINDS[task]}_{ours}": results[task][theirs] / 100
        for task in tasks
        for theirs, ours in _METRICS.items()
        if not math.isnan(results[task][theirs])
    }


def _truth(rows: Rows) -> dict[str, Any]:
    """COCO's JSON of the rows' objects, one image a row."""
    # The evaluator reads equal scores in the order of the images' ids, which in COCO's files are numbers.
    ids = [str(name) for name in rows["id"]]
    order = sorted(ids, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    number = {name: rank for rank, name in enumerate(order)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place, name in enumerate(ids):
        height, width = int(rows["height"][place]), int(rows["width"][place])
        images.append({"id": number[name], "height": height, "width": width, "file_name": name})
        for index, box in enumerate(np.reshape(rows["true_boxes"][place], (-1, 4)).tolist()):
            annotation = {
                "id": len(annotations) + 1,  # 0 would count as no object at all: the matcher's word for "none"
                "image_id": number[name],
                "category_id": int(rows["true_classes"][place][index]),
                "bbox": box,
                "area": float(rows["true_areas"][place][index]),
                "iscrowd": int(rows["true_crowd"][place][index]),
            }
            if "masks" in set(rows):
                annotation["segmentation"] = _rle(rows, place, rows["true_masks"][place][index])
            annotations.append(annotation)
    categories = [{"id": index, "name": name} for index, name in enumerate(rows.meta["classes"])]
    return {"images": images, "annotations": annotations, "categories": categories}


def _instances(rows: Rows, place: int) -> Instances:
    """What was found in one image, in detectron2's words."""
    instances = Instances((int(rows["height"][place]), int(rows["width"][place])))
    boxes_D4 = np.array(rows["boxes"][place], dtype=np.float32).reshape(-1, 4)
    instances.pred_boxes = Boxes(torch.from_numpy(boxes_D4))
    instances.scores = torch.from_numpy(np.array(rows["scores"][place], dtype=np.float32))
    instances.pred_classes = torch.from_numpy(np.array(rows["classes"][place], dtype=np.int64))
    if "masks" in set(rows):
        masks = [_rle(rows, place, counts) for counts in rows["masks"][place]]
        bitmaps = to_bitmaps(masks) if masks else np.zeros((0, *instances.image_size), dtype=bool)
        instances.pred_masks = torch.from_numpy(bitmaps)
    return instances


def _rle(rows: Rows, place: int, counts: str) -> Mapping[str, Any]:
    return {"size": [int(rows["height"][place]), int(rows["width"][place])], "counts": str(counts)}
