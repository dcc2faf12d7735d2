"""One scene as files: the encoded picture and all its annotations as JSON values."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from vlbench.data.shapes.draw import Rendering, render, rle
from vlbench.data.shapes.language import captions
from vlbench.data.shapes.scene import Scene, sample_scene
from vlbench.data.shapes.world import CLASS_NAMES

_CHUNK = 250  # scenes per job: long enough to hide the cost of sending, short enough to keep two processes busy


@dataclass(frozen=True, slots=True)
class Record:
    """One picture ready to be written. ``annotations`` is everything known of it but its masks."""

    index: int
    scene: Scene
    png: bytes
    label: int
    annotations: dict[str, Any]
    segmentations: tuple[dict[str, Any], ...]
    """The visible mask of each object, in COCO's run lengths."""

    def captions(self, language: str = "en") -> list[str]:
        """The picture's captions in one language."""
        return self.annotations["captions"][language]


@dataclass(frozen=True)
class Maker:
    """Makes the records of one world's streams."""

    seed: int
    pixels: int
    workers: int

    def __call__(self, stream: str, indices: Iterable[int], **how: bool) -> Iterator[Record]:
        """``make_records`` of this world."""
        return make_records(self.seed, stream, list(indices), pixels=self.pixels, workers=self.workers, **how)


def make_records(
    seed: int,
    stream: str,
    indices: Sequence[int],
    *,
    pixels: int,
    detailed: bool = False,
    annotated: bool = True,
    workers: int = 1,
) -> Iterator[Record]:
    """The records of some scenes of a stream, in order.

    ``detailed`` keeps to captions that name a neighbour, as retrieval needs. Without ``annotated`` a record is a
    picture and its label: a third of the work is saved where nothing else is written. The records are the same for
    any number of ``workers``, the processes to render with.
    """
    jobs = [
        _Job(seed, stream, tuple(indices[start : start + _CHUNK]), pixels, detailed, annotated)
        for start in range(0, len(indices), _CHUNK)
    ]
    context = _fork_context()
    if workers <= 1 or len(jobs) <= 1 or context is None:
        for job in jobs:
            yield from _make(job)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        for records in pool.map(_make, jobs):
            yield from records


def annotate(scene: Scene, rendering: Rendering, *, detailed: bool = False) -> dict[str, Any]:
    """What is known of a picture: captions by language, class, region tags with boxes, and the scene itself."""
    boxes = [[x, y, x + w, y + h] for x, y, w, h in rendering.boxes_xywh()]
    return {
        "captions": captions(scene, detailed=detailed),
        "class": scene.main.name,
        "tags": [item.name for item in scene.objects],
        "boxes": boxes,
        "boxes_format": "xyxy",
        "objects": [
            {
                "shape": item.combo.shape,
                "colour": item.combo.colour,
                "size": item.size,
                "centre": [round(item.x, 4), round(item.y, 4)],
                "radius": round(item.radius, 4),
                "rotation": round(item.rotation, 4),
                "depth": item.depth,
            }
            for item in scene.objects
        ],
        "relations": [[i, name, j] for (i, j), name in scene.relations().items()],
        "background": {"tone": scene.background.tone, "pattern": scene.background.pattern},
    }


@dataclass(frozen=True)
class _Job:
    """What one call of a helper process makes."""

    seed: int
    stream: str
    indices: tuple[int, ...]
    pixels: int
    detailed: bool
    annotated: bool


def _make(job: _Job) -> list[Record]:
    records = []
    for index in job.indices:
        scene = sample_scene(job.seed, job.stream, index)
        rendering = render(scene, size=job.pixels)
        records.append(
            Record(
                index=index,
                scene=scene,
                png=rendering.png(),
                label=CLASS_NAMES.index(scene.main.name),
                annotations=annotate(scene, rendering, detailed=job.detailed) if job.annotated else {},
                segmentations=tuple(rle(mask) for mask in rendering.masks_NHW) if job.annotated else (),
            )
        )
    return records


def _fork_context() -> Any:
    """Forked helpers, or None where they cannot be had.

    Other ways of starting would run the user's main script again, and a loader's own worker may not have children. The
    helpers touch numpy and Pillow only, so threads of the parent hold nothing that they need.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.current_process().daemon:
        return None
    return multiprocessing.get_context("fork")
