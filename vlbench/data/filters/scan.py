"""The first pass: what one shard's samples are, and its runs of what is counted over all shards.

Only a *usable* sample (both parts there and readable) is counted and judged by the rules after the first two. What is
counted is the corpus as it came: no rule sees what another has removed, so that their order decides no sample's fate.

Shape suffixes: N samples of the shard, G words and word pairs in them, K different ones.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlbench.core.errors import BadExample
from vlbench.core.files import atomic_writer
from vlbench.data.filters.job import Job
from vlbench.data.filters.phash import perceptual_hash
from vlbench.data.filters.shards import Pair, open_shard, read_pair
from vlbench.data.filters.tables import distinct_pairs, key_of, keys_array, pairs_array
from vlbench.data.filters.words import ngrams, words
from vlbench.data.images import decode, inspect
from vlbench.data.readers.tarindex import TarIndex

_NO_KEY = bytes(16)


@dataclass
class Samples:
    """What the first pass found out about the samples of one shard, in their order."""

    side_N2: np.ndarray
    """Width and height in pixels; 0 for samples that are not usable."""
    words_N: np.ndarray
    image_N: np.ndarray
    """Key of the image's bytes."""
    text_N: np.ndarray
    """Key of the text."""
    hash_N: np.ndarray
    """uint64; see ``hashed_N``."""
    hashed_N: np.ndarray
    """Whether there is a perceptual hash."""
    ngram_G: np.ndarray
    """Of each word, then word pair, of each sample: which of the shard's own different ones it is."""
    ngram_starts: np.ndarray
    """Where each sample's begin in ``ngram_G``, and where the last one's end."""
    problems: dict[int, tuple[str, str, str]] = field(default_factory=dict)
    """Row → rule (``unreadable`` or ``incomplete``), kind, reason: the samples that are not usable."""
    damage: str = ""
    """What is wrong with the tar as a whole, or ``""``."""

    def __len__(self) -> int:
        return len(self.words_N)

    @property
    def usable_N(self) -> np.ndarray:
        """Whether both parts are there and readable."""
        usable_N = np.ones(len(self), dtype=bool)
        usable_N[list(self.problems)] = False
        return usable_N

    def save(self, path: Path) -> None:
        """Write everything as one file, whole or not at all."""
        said = json.dumps({"problems": list(self.problems.items()), "damage": self.damage}).encode()
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        with atomic_writer(path) as handle:
            np.savez(handle, **arrays, said=np.frombuffer(said, dtype=np.uint8))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Samples:
        """What ``save`` wrote."""
        with np.load(path, allow_pickle=False) as kept:
            arrays: dict[str, Any] = {name: kept[name] for name in kept.files}
        said = json.loads(arrays.pop("said").tobytes())
        return cls(**arrays, problems={row: tuple(why) for row, why in said["problems"]}, damage=said["damage"])


def scan_shard(job: Job, number: int) -> None:
    """Read one shard and leave its samples and its runs in the state folder, unless they are there."""
    if job.scanned(number).is_file():
        return
    index = open_shard(job.shards[number], allow_truncated=job.config.allow_truncated)
    gathered = _Gathered(job, len(index))
    for row in range(len(index)):
        try:
            gathered.add(row, read_pair(index, row), index)
        except BadExample as error:
            gathered.problems[row] = ("unreadable", error.kind, error.reason)
            gathered.leave(row)
    samples, ngram_keys, ngram_numbers = gathered.finish(index.damage)
    usable_N = samples.usable_N
    images_N, texts_N = samples.image_N[usable_N], samples.text_N[usable_N]
    for name, keys, values in (("images", images_N, texts_N), ("texts", texts_N, images_N)):
        if (table := job.tables.get(name)) is not None:
            assert table.limit is not None, "a table of pairs has a limit"
            table.write_run(number, distinct_pairs(pairs_array(keys, values), table.limit))
    if (table := job.tables.get("ngrams")) is not None:
        table.write_run(number, ngram_keys, ngram_numbers)
    samples.save(job.scanned(number))  # last: the mark that the runs are there too


class _Gathered:
    """Columns in the making."""

    def __init__(self, job: Job, size: int) -> None:
        self.job = job
        self.problems: dict[int, tuple[str, str, str]] = {}
        self._side_N2 = np.zeros((size, 2), dtype=np.int32)
        self._words_N = np.zeros(size, dtype=np.int32)
        self._hash_N = np.zeros(size, dtype=np.uint64)
        self._hashed_N = np.zeros(size, dtype=bool)
        self._images: list[bytes] = []
        self._texts: list[bytes] = []
        self._codes: dict[str, int] = {}
        self._numbers: Counter[int] = Counter()
        self._ngrams: list[int] = []
        self._starts = [0]

    def add(self, row: int, pair: Pair, index: TarIndex) -> None:
        """One sample. Raises BadExample where its image cannot be read."""
        lacking = [part for part in ("image", "text") if getattr(pair, part) is None]
        if pair.image is None or pair.text is None:
            self.problems[row] = (
                "incomplete",
                f"missing {' and '.join(lacking)}",
                f"has no {' and no '.join(lacking)}",
            )
            self.leave(row)
            return
        where = f"{index.path}/{index.keys[row]}"
        info = inspect(pair.image, where)
        if self.job.config.decodes:
            picture = decode(pair.image, where=where)
            found = perceptual_hash(picture) if self.job.config.hashes else None
            self._hashed_N[row] = found is not None
            self._hash_N[row] = found or 0
        self._side_N2[row] = info.width, info.height
        self._images.append(key_of(pair.image))
        self._texts.append(key_of(pair.text.encode("utf-8", "surrogatepass")))
        unigrams = words(pair.text)
        self._words_N[row] = len(unigrams)
        if "ngrams" in self.job.tables:
            codes = [self._codes.setdefault(ngram, len(self._codes)) for ngram in ngrams(unigrams)]
            self._ngrams += codes
            self._numbers.update(codes)
        self._starts.append(len(self._ngrams))

    def leave(self, row: int) -> None:
        """One sample that is not usable."""
        assert len(self._images) == row, "samples come in order, each once"
        self._images.append(_NO_KEY)
        self._texts.append(_NO_KEY)
        self._starts.append(len(self._ngrams))

    def finish(self, damage: str) -> tuple[Samples, np.ndarray, np.ndarray]:
        """The samples; the different n-grams' keys, sorted; how often each occurs in the shard."""
        keys_K = keys_array([key_of(ngram.encode("utf-8", "surrogatepass")) for ngram in self._codes])
        order_K = np.argsort(keys_K)
        place_K = np.empty(len(keys_K), dtype=np.int64)
        place_K[order_K] = np.arange(len(keys_K))
        samples = Samples(
            side_N2=self._side_N2,
            words_N=self._words_N,
            image_N=keys_array(self._images),
            text_N=keys_array(self._texts),
            hash_N=self._hash_N,
            hashed_N=self._hashed_N,
            ngram_G=place_K[np.array(self._ngrams, dtype=np.int64)].astype(np.int32),
            ngram_starts=np.array(self._starts, dtype=np.int64),
            problems=self.problems,
            damage=damage,
        )
        numbers_K = np.array([self._numbers[code] for code in range(len(keys_K))], dtype=np.int64)
        return samples, keys_K[order_K], numbers_K[order_K]
