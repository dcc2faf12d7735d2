"""A folder of region features, filled by a detector: long work that can be killed at any image and gone on with.

Each image is a file of its own, renamed into place whole. ``regions.json`` beside them says by which detector and of
which data they are: a file that is there is kept unseen, and those of another detector, or of other images under the
same ids, would pass for these.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.core.files import write_text
from vlbench.core.types import Source
from vlbench.data.images import image_at
from vlbench.data.regions.features import RegionFeatures
from vlbench.data.regions.npz import npz_path, write_npz
from vlbench.data.regions.sized import image_key
from vlbench.data.sources import without_images
from vlbench.data.stream import BadTally

RECORD = "regions.json"
_ASKING = frozenset({"question", "hypothesis", "expression"})
_WAITING = 8
"""Batches' worth of images that wait at most for others of their size."""


class Detector(Protocol):
    """What finds regions: see ``detector.TorchvisionDetector``."""

    identity: dict[str, Any]

    def together(self, images: Sequence[np.ndarray], where: Sequence[str]) -> list[RegionFeatures]:
        """The regions of images ``(H, W, 3)`` of one size."""


@dataclass
class Extracted:
    """What was done."""

    written: int = 0
    kept: int = 0
    """Images whose file was there before."""
    regions: int = 0
    """Of what was written."""
    empty: int = 0
    """Images written that have no region."""
    bad: BadTally = field(default_factory=lambda: BadTally(inf))
    """Images that could not be read: they have no file."""


def extract(
    sources: Sequence[Source],
    detector: Detector,
    folder: Path | str,
    *,
    batch_size: int = 1,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Write ``<id>.npz`` for every image of ``sources``; files that are there already are kept.

    Of questions about images, the id is the image's (``extra["image_key"]``), as fine-tuning looks for it.

    Args:
        sources: images.
        detector: what finds the regions.
        folder: made where it is absent.
        batch_size: most images of one size that the detector is given at once. More than one may move a feature by
            the rounding of float32.
        workers: processes that read and decode images; 0: this one.
        progress: called with the images done, and all that there are to do.

    Raises:
        UserError: where an id occurs twice or cannot be a file name, or the folder holds the regions of another
            detector or of other images with these ids.
    """
    folder = Path(folder)
    places = [{index: (name, npz_path(folder, name)) for index, name in _names(source).items()} for source in sources]
    twice = [name for name, n in Counter(name for named in places for name, _ in named.values()).items() if n > 1]
    if twice:
        raise UserError(f"the image id {twice[0]!r} occurs twice; write the regions of each data set to its own folder")
    _claim(folder, detector.identity, sources, places)
    done = Extracted()
    todo = [(n, index) for n, named in enumerate(places) for index, (_, path) in named.items() if not path.exists()]
    done.kept = sum(map(len, places)) - len(todo)
    passed = 0
    for batch in _batches(sources, todo, done.bad, size=batch_size, workers=workers):
        named = [places[n][index] for n, index, _ in batch]
        found = detector.together([image for _, _, image in batch], [name for name, _ in named])
        for (_, path), regions in zip(named, found, strict=True):
            write_npz(path, regions)
            done.written += 1
            done.regions += len(regions)
            done.empty += not len(regions)
        passed = done.written + sum(done.bad.counts().values())
        if progress is not None:
            progress(passed, len(todo))
    if progress is not None and passed < len(todo):
        progress(len(todo), len(todo))
    return done


def _names(source: Source) -> dict[int, str]:
    """By place in the source, what its images are called: their ids, or, of questions, each different image once."""
    if "pair" in source.provides:
        raise UserError(f"data {source.spec!r} has two images an example, and this reads one; give the images alone")
    if not source.provides & _ASKING:
        return dict(enumerate(source.ids()))
    first: dict[str, int] = {}
    for index in range(len(source)):
        first.setdefault(image_key(without_images(source, index)), index)
    return {index: name for name, index in first.items()}


def _claim(
    folder: Path,
    identity: dict[str, Any],
    sources: Sequence[Source],
    places: Sequence[Mapping[int, tuple[str, Path]]],
) -> None:
    """Say in the folder whose regions it holds, having seen that this does not contradict what it says already."""
    record, data = folder / RECORD, [[source.spec, source.split] for source in sources]
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: this is a file; name a folder for the regions")
    if not record.is_file():
        if next(folder.rglob("*.npz"), None) is not None:
            raise UserError(f"{folder}: holds .npz files of which no {RECORD} says where they come from; name another")
        write_text(record, json.dumps({"made_by": identity, "data": data}, indent=2) + "\n")
        return
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
        made_by, known = dict(stored["made_by"]), [list(pair) for pair in stored["data"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{record}: cannot be read; name another folder") from None
    changed = sorted(key for key in made_by.keys() | identity.keys() if made_by.get(key) != identity.get(key))
    if changed:
        said = ", ".join(f"{key} {made_by.get(key)} (now {identity.get(key)})" for key in changed)
        raise UserError(f"{folder}: holds regions made with {said}; name another folder")
    for pair, named in zip(data, places, strict=True):
        if pair not in known and any(path.exists() for _, path in named.values()):
            others = ", ".join(spec for spec, _ in known)
            raise UserError(
                f"{folder}: holds regions of some of these ids, of other data ({others}); name another "
                f"folder, or, where the images are the same, add {pair} to the data in {RECORD}"
            )
    if any(pair not in known for pair in data):
        whole = known + [pair for pair in data if pair not in known]
        write_text(record, json.dumps({"made_by": made_by, "data": whole}, indent=2) + "\n")


def _batches(
    sources: Sequence[Source], todo: Sequence[tuple[int, int]], bad: BadTally, *, size: int, workers: int
) -> Iterator[list[tuple[int, int, np.ndarray]]]:
    """Source, index and pixels of images of one size, ``size`` of them or, towards the end, fewer; bad ones counted."""
    from vlbench.data.loading import loaded

    waiting: dict[tuple[int, ...], list[tuple[int, int, np.ndarray]]] = {}
    for (n, index), (image, error) in zip(todo, loaded(partial(_pixels, sources), todo, workers=workers), strict=True):
        bad.record([] if error is None else [error])
        if image is None:
            continue
        waiting.setdefault(image.shape, []).append((n, index, image))
        full = len(waiting[image.shape]) >= size
        if full or sum(map(len, waiting.values())) >= _WAITING * size:
            yield waiting.pop(image.shape if full else max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _pixels(sources: Sequence[Source], key: tuple[int, int]) -> tuple[np.ndarray | None, BadExample | None]:
    """The image, or why there is none."""
    try:
        _, image = image_at(sources[key[0]], key[1])
    except BadExample as error:
        return None, error
    return np.asarray(image), None
