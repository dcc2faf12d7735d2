"""Near-duplicates of evaluation images: perceptual hashes of both sides, and what every search leaves behind.

A search leaves, for each sample of a shard, which evaluation image it is a near-duplicate of (-1: of none) and how
near it is: differing bits for perceptual hashes, the cosine for a model's features (``verbs.filter``). An image with
the very bytes of an evaluation image is found by either, flat ones too.

Shape suffixes: N samples of a shard, M evaluation images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.core.files import atomic_writer, write_text
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Source
from vlbench.data.filters.job import EvaluationSet, Job
from vlbench.data.filters.phash import HashSearch, perceptual_hash
from vlbench.data.filters.scan import Samples
from vlbench.data.filters.shards import printable
from vlbench.data.filters.tables import key_of, keys_array
from vlbench.data.images import decode
from vlbench.data.sources import list_splits, open_source

_PART = 1000
_PREFERRED = ("test", "val")  # ImageNet's evaluation images are its validation split


def evaluation_set(spec: str) -> EvaluationSet:
    """The images that ``--against spec`` means: the test split, else val, else the whole of data without splits.

    Raises:
        UserError: where there is none of these, or no image in it.
    """
    splits = list_splits(spec)
    split = next((name for name in _PREFERRED if name in splits), None)
    if splits and split is None:
        raise UserError(f"--against {spec}: it has neither a test nor a val split (it has {', '.join(splits)})")
    source = open_source(spec, split)
    if "image" not in source.provides or not len(source):
        raise UserError(f"--against {spec}: it holds no image")
    return EvaluationSet(spec, source.split, len(source), fingerprint(list(source.ids())))


def open_set(chosen: EvaluationSet) -> Source:
    """The source behind an evaluation set."""
    return open_source(chosen.spec, chosen.split if list_splits(chosen.spec) else None)


def hash_tasks(job: Job) -> list[tuple[int, int]]:
    """What ``hash_images`` is still to be called with: a set, and where a part of it begins."""
    parts = [(number, start) for number, each in enumerate(job.against) for start in range(0, each.size, _PART)]
    return [part for part in parts if not _hashes(job, *part).is_file()]


def hash_images(job: Job, number: int, start: int) -> None:
    """Hash one part of an evaluation set. Raises BadExample: a broken image could be nobody's near-duplicate."""
    source = open_set(job.against[number])
    hashes, keys, ids = [], [], source.ids()
    for row in range(start, min(start + _PART, len(source))):
        example = source[row]
        where = f"{source.spec} ({source.split}): {ids[row]}"
        if example.image is None:
            raise BadExample("missing image", where, "an evaluation image is missing")
        hashes.append(perceptual_hash(decode(example.image, where=where)))
        keys.append(key_of(example.image))
    with atomic_writer(_hashes(job, number, start)) as handle:
        np.savez(
            handle,
            hash_M=np.array([value or 0 for value in hashes], dtype=np.uint64),
            hashed_M=np.array([value is not None for value in hashes]),
            key_M=keys_array(keys),
        )


def match_hashes(job: Job, number: int) -> None:
    """Look one shard's images up among the evaluation images' hashes."""
    samples = Samples.load(job.scanned(number))
    key_M, order_M, search, place_M = _evaluation_hashes(job)
    index_N, score_N = search.nearest(samples.hash_N)
    index_N = np.where(samples.hashed_N & (index_N >= 0), place_M[index_N] if len(place_M) else -1, -1)
    at_N = np.minimum(np.searchsorted(key_M, samples.image_N), len(key_M) - 1)
    same_N = (key_M[at_N] == samples.image_N) & samples.usable_N
    index_N = np.where(same_N, order_M[at_N], index_N)
    save_neighbours(job, number, index_N, np.where(same_N, 0, score_N))


def save_neighbours(job: Job, number: int, index_N: np.ndarray, score_N: np.ndarray) -> None:
    """Leave a shard's near-duplicates: the evaluation image of each sample (-1: none), over all sets in order."""
    with atomic_writer(job.neighbours(number)) as handle:
        np.savez(handle, index_N=index_N.astype(np.int64), score_N=score_N.astype(np.float64))


def load_neighbours(job: Job, number: int) -> tuple[np.ndarray, np.ndarray]:
    """``(index_N, score_N)`` that ``save_neighbours`` left."""
    with np.load(job.neighbours(number), allow_pickle=False) as kept:
        return kept["index_N"], kept["score_N"]


def save_names(job: Job) -> None:
    """Leave the evaluation images' names, for those who read what was removed."""
    names = [printable(f"{each.spec} ({each.split}): {name}") for each in job.against for name in open_set(each).ids()]
    write_text(job.state / "against" / "names.json", json.dumps(names, ensure_ascii=False))


def load_names(job: Job) -> Sequence[str]:
    """What ``save_names`` left."""
    names: list[str] = json.loads((job.state / "against" / "names.json").read_text(encoding="utf-8"))
    return names


def _hashes(job: Job, number: int, start: int) -> Path:
    return job.state / "against" / f"{number:03}-{start:09}.npz"


def _parts(job: Job) -> Iterator[dict[str, np.ndarray]]:
    for number, each in enumerate(job.against):
        for start in range(0, each.size, _PART):
            with np.load(_hashes(job, number, start), allow_pickle=False) as kept:
                yield {name: kept[name] for name in kept.files}


def _evaluation_hashes(job: Job) -> tuple[np.ndarray, np.ndarray, HashSearch, np.ndarray]:
    """Sorted keys of the images' bytes and whose they are; the search, and whose hashes it holds."""
    parts = list(_parts(job))
    hash_M, hashed_M, key_M = (
        np.concatenate([part[name] for part in parts]) for name in ("hash_M", "hashed_M", "key_M")
    )
    order_M = np.argsort(key_M, kind="stable")
    place_M = np.flatnonzero(hashed_M)
    return key_M[order_M], order_M, HashSearch(hash_M[place_M], job.config.max_distance), place_M
