"""A few pictures with squares and discs to be found, in memory, and a small detector for them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlbench.core.types import Example, Region
from vlbench.finetune.detection.config import DetectionConfig
from vlbench.models.load import load_backbone

CLASSES = ("square", "disc")
COLOURS = ((220, 40, 40), (40, 60, 220))


class Scenes:
    """``n`` pictures of one to three objects."""

    spec, templates = "scenes", None
    provides = frozenset({"image", "regions"})
    classes = CLASSES

    def __init__(self, n: int, *, seed: int = 0, size: tuple[int, int] = (96, 96), split: str = "train") -> None:
        self.split = split
        rng = np.random.default_rng(seed)
        self.examples = [_scene(f"{split}{i}", rng, size) for i in range(n)]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def ids(self) -> Sequence[str]:
        return [example.id for example in self.examples]

    def labels(self) -> None:
        return None


def shuffled(source: Scenes, *, seed: int = 0) -> Scenes:
    """The same pictures with names that say nothing of what they name: each kind has each name equally often.

    Drawn one by one, the names of sixty pictures would favour one, and a ranking makes much of a small tendency.
    """
    rng = np.random.default_rng(seed)
    kinds = np.array([kind for one in source.examples for kind in one.extra["categories"]])
    said = np.empty_like(kinds)
    for kind in range(len(CLASSES)):
        places = np.flatnonzero(kinds == kind)
        said[places] = rng.permutation(np.arange(len(places)) % len(CLASSES))
    names = iter(said.tolist())
    return with_examples(source, [renamed(one, [next(names) for _ in one.regions]) for one in source.examples])


def mispaired(source: Scenes) -> Scenes:
    """Each picture with the objects of the next one."""
    pairs = zip(source.examples, [*source.examples[1:], source.examples[0]])
    return with_examples(source, [replace(one, regions=other.regions, extra=other.extra) for one, other in pairs])


def with_examples(source: Scenes, examples: Sequence[Example]) -> Scenes:
    """Scenes of these examples."""
    changed = Scenes(0, split=source.split)
    changed.examples = list(examples)
    return changed


def renamed(one: Example, classes: Sequence[int]) -> Example:
    """The example with objects of these classes."""
    regions = tuple(replace(region, category=CLASSES[c]) for region, c in zip(one.regions, classes, strict=True))
    return replace(one, regions=regions, extra=one.extra | {"categories": tuple(classes)})


def _scene(name: str, rng: np.random.Generator, size: tuple[int, int]) -> Example:
    height, width = size
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    regions: list[Region] = []
    taken = np.zeros((height, width), dtype=bool)
    for _ in range(20):
        if len(regions) == 3:
            break
        side, kind = int(rng.integers(20, 40)), int(rng.integers(2))
        top, left = int(rng.integers(height - side)), int(rng.integers(width - side))
        rows, columns = np.mgrid[:height, :width]
        mask = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        if kind == 1:
            middle = (top + (side - 1) / 2, left + (side - 1) / 2)
            mask &= (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 <= (side / 2) ** 2
        if (mask & taken).any():
            continue
        taken |= mask
        pixels[mask] = COLOURS[kind]
        regions.append(region(mask, CLASSES[kind]))
    return example(name, pixels, regions)


def region(mask_HW: np.ndarray, category: str, **attributes: Any) -> Region:
    """An object of this mask, with COCO's run lengths as numbers."""
    rows, columns = np.nonzero(mask_HW)
    box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
    flat = np.concatenate([[0], mask_HW.T.reshape(-1).astype(int), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask_HW.size]])).tolist()
    area = {"area": int(mask_HW.sum()), "iscrowd": 0} | attributes
    return Region(category, box, {"size": list(mask_HW.shape), "counts": counts}, area)


def example(name: str, pixels_HW3: np.ndarray, regions: Sequence[Region]) -> Example:
    """A PNG with these objects, and what COCO's reader says beside."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "PNG")
    extra = {
        "height": pixels_HW3.shape[0],
        "width": pixels_HW3.shape[1],
        "categories": tuple(CLASSES.index(one.category) for one in regions),
        "bboxes": tuple(
            (one.box_xyxy[0], one.box_xyxy[1], one.box_xyxy[2] - one.box_xyxy[0], one.box_xyxy[3] - one.box_xyxy[1])
            for one in regions
        ),
    }
    return Example(id=name, image=buffer.getvalue(), regions=tuple(regions), extra=extra)


def small(**values: Any) -> DetectionConfig:
    """A detector that a test can afford."""
    lean = {
        "steps": 4,
        "batch_size": 2,
        "channels": 16,
        "box_width": 32,
        "mask_convolutions": (16,),
        "short_sides": (96,),
        "short_side": 96,
        "long_side": 192,
        "proposals": 50,
        "sampled_boxes": 16,
        "sampled_anchors": 32,
        "judge_every": 2,
        "checkpoint_every": 2,
    }
    return DetectionConfig(**lean | values)


def backbone(name: str = "timm:test_resnet") -> Any:
    """Random weights."""
    return load_backbone(name, weights="random")


def found_at(detections: Any) -> torch.Tensor:
    """Boxes of a Detections as a tensor."""
    return torch.from_numpy(np.asarray(detections.boxes_K4))
