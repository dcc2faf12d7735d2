"""Exact counting over all shards in bounded memory: sorted runs on the disk, joined by ranges of keys.

A key is a 128-bit BLAKE2b digest (``S16``): a hash in the strict sense, so equal keys are taken for equal things. Each
shard leaves one sorted run of its keys. The key space is cut into P ranges; for each range the runs' slices are
merged, and *how often each key of each run occurs over all runs* is written back beside that run's slice. A shard then
reads its own keys' totals, and no process ever holds more than one range or one shard. Digests are uniform, so ranges
are of one size; a key that is everywhere adds one row a run at most to a table of counts, ``limit + 1`` to a table of
pairs, and these are compacted as they come.

Two kinds of tables: *counts* sum numbers by key (occurrences of n-grams); *pairs* count the different values of a key
(images of a text), exactly up to ``limit`` and as ``limit + 1`` beyond.

Shape suffixes: K keys, R rows, S shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from vlbench.core.files import atomic_writer

KEY = np.dtype("S16")
PAIR = np.dtype("S32")
"""A key and the key of its value, in this order, so that pairs sort by key."""
MERGE_BYTES_PER_ROW = 256
"""What merging one row takes at its peak, sorting included: copies of a pair, its order, totals to be written back."""
_BLOCK_ROWS = 1 << 18
"""Rows gathered before they are compacted, at least."""


def key_of(data: bytes) -> bytes:
    """The 16 bytes by which the tables know something."""
    return blake2b(data, digest_size=16).digest()


def keys_array(keys: Sequence[bytes]) -> np.ndarray:
    """``keys_K`` (S16) of digests. numpy hides zero bytes at the end when it shows them, but compares them all."""
    return np.frombuffer(b"".join(keys), dtype=KEY)


def pairs_array(keys_R: np.ndarray, values_R: np.ndarray) -> np.ndarray:
    """``pairs_R`` (S32): each key with its value."""
    rows = np.empty((len(keys_R), 2), dtype=KEY)
    rows[:, 0], rows[:, 1] = keys_R, values_R
    return rows.view(PAIR).reshape(-1)


def key_part(pairs_R: np.ndarray) -> np.ndarray:
    """The keys of pairs."""
    return np.ascontiguousarray(np.ascontiguousarray(pairs_R).view(KEY).reshape(-1, 2)[:, 0])


def distinct_pairs(pairs_R: np.ndarray, limit: int) -> np.ndarray:
    """Sorted, each once, and of each key the first ``limit + 1`` only: more decide nothing."""
    pairs_R = np.unique(pairs_R)
    if not len(pairs_R):
        return pairs_R
    keys_R = key_part(pairs_R)
    starts = np.flatnonzero(np.concatenate(([True], keys_R[1:] != keys_R[:-1])))
    rank_R = np.arange(len(keys_R)) - np.repeat(starts, np.diff(np.append(starts, len(keys_R))))
    return pairs_R[rank_R <= limit]


@dataclass(frozen=True)
class Table:
    """One thing that is counted over all shards.

    Args:
        name: of its files.
        folder: where they are.
        shards: how many runs there are, once every shard has left its own.
        limit: None for counts; for pairs, how many values of a key are told apart.
    """

    name: str
    folder: Path
    shards: int
    limit: int | None = None

    def write_run(self, shard: int, rows_R: np.ndarray, numbers_R: np.ndarray | None = None) -> None:
        """Leave one shard's run: sorted rows, each once, and for counts the number of each."""
        if numbers_R is not None:
            save_array(self._run(shard, "numbers"), numbers_R)
        save_array(self._run(shard, "rows"), rows_R)

    def partitions(self, memory: int) -> int:
        """Into how many ranges the keys must be cut so that merging one takes about ``memory`` bytes."""
        rows = sum(len(map_array(self._run(shard, "rows"))) for shard in range(self.shards))
        return max(1, -(-rows * MERGE_BYTES_PER_ROW // memory))

    def is_merged(self, part: int, parts: int) -> bool:
        """Whether range ``part`` of ``parts`` is done."""
        return self._merged(part, parts, "totals").is_file()

    def merge(self, part: int, parts: int) -> None:
        """Join all runs over one range of keys and write every run's totals back. Memory: one range."""
        keys_K, totals_K = self._joined(part, parts)
        offsets_S, back = [0], []
        for rows_R, _ in self._slices(part, parts):
            own_K = self._own_keys(rows_R)
            back.append(totals_K[np.searchsorted(keys_K, own_K)])
            offsets_S.append(offsets_S[-1] + len(own_K))
        values, sizes = np.unique(totals_K, return_counts=True)
        save_array(self._merged(part, parts, "histogram"), np.stack([values, sizes]))
        save_array(self._merged(part, parts, "offsets"), np.array(offsets_S, dtype=np.int64))
        save_array(self._merged(part, parts, "totals"), np.concatenate(back))  # last: the mark that all is there

    def totals(self, shard: int, parts: int) -> np.ndarray:
        """``totals_K``: of each of the shard's own keys, in their order, over all shards."""
        pieces = []
        for part in range(parts):
            start, stop = map_array(self._merged(part, parts, "offsets"))[shard : shard + 2]
            pieces.append(np.array(map_array(self._merged(part, parts, "totals"))[start:stop]))
        return np.concatenate(pieces)

    def histogram(self, parts: int) -> dict[int, int]:
        """Total → how many different keys have it."""
        sizes: dict[int, int] = {}
        for part in range(parts):
            for value, size in map_array(self._merged(part, parts, "histogram")).T.tolist():
                sizes[value] = sizes.get(value, 0) + size
        return sizes

    def _joined(self, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """The range's keys, sorted, and their totals."""
        pending: list[tuple[np.ndarray, np.ndarray | None]] = []
        kept = waiting = 0
        for piece in self._slices(part, parts):
            pending.append(piece)
            waiting += len(piece[0])
            # Compacted whenever it has doubled, so that a row is sorted a few times and not once a shard.
            if waiting > max(_BLOCK_ROWS, 2 * kept):
                pending = [self._compact(pending)]
                kept = waiting = len(pending[0][0])
        rows_R, numbers_R = self._compact(pending)
        if numbers_R is not None:
            return rows_R, numbers_R
        return np.unique(key_part(rows_R), return_counts=True)

    def _compact(self, pieces: list[tuple[np.ndarray, np.ndarray | None]]) -> tuple[np.ndarray, np.ndarray | None]:
        rows_R = np.concatenate([rows for rows, _ in pieces])
        if self.limit is not None:
            return distinct_pairs(rows_R, self.limit), None
        return summed(rows_R, np.concatenate([numbers for _, numbers in pieces if numbers is not None]))

    def _slices(self, part: int, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Each run's rows (and numbers) in range ``part``, copied so that the file can be let go."""
        for shard in range(self.shards):
            rows_R = map_array(self._run(shard, "rows"))
            start, stop = (int(np.searchsorted(rows_R, _edge(at, parts, rows_R.dtype))) for at in (part, part + 1))
            stop = stop if part + 1 < parts else len(rows_R)
            numbers_R = None if self.limit is not None else np.array(map_array(self._run(shard, "numbers"))[start:stop])
            yield np.array(rows_R[start:stop]), numbers_R

    def _own_keys(self, rows_R: np.ndarray) -> np.ndarray:
        return rows_R if self.limit is None else np.unique(key_part(rows_R))

    def _run(self, shard: int, what: str) -> Path:
        return self.folder / "scan" / f"{shard:06}.{self.name}.{what}.npy"

    def _merged(self, part: int, parts: int, what: str) -> Path:
        # The number of ranges is in the name: it follows from --memory, which a restart may change.
        return self.folder / "merged" / f"{self.name}.{part:06}-of-{parts:06}.{what}.npy"


def summed(keys_R: np.ndarray, numbers_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, sorted, with the sum of its numbers."""
    if not len(keys_R):
        return keys_R, numbers_R
    order_R = np.argsort(keys_R, kind="stable")
    keys_R, numbers_R = keys_R[order_R], numbers_R[order_R]
    starts = np.flatnonzero(np.concatenate(([True], keys_R[1:] != keys_R[:-1])))
    return keys_R[starts], np.add.reduceat(numbers_R, starts)


def frequency_floor(histogram: dict[int, int], top: int) -> int:
    """The number of occurrences of the ``top``-th most frequent key: keys with fewer are outside the top.

    Ties with the ``top``-th stay in, so that more than ``top`` keys may be kept: to break them by anything else than
    frequency would be a rule of its own. 1 where there are no more than ``top`` keys.
    """
    seen = 0
    for value in sorted(histogram, reverse=True):
        seen += histogram[value]
        if seen >= top:
            return value
    return 1


def save_array(path: Path, values: np.ndarray) -> None:
    """Write one array, whole or not at all."""
    with atomic_writer(path) as handle:
        np.save(handle, values, allow_pickle=False)


def map_array(path: Path) -> np.ndarray:
    """An array on the disk, mapped rather than read; an empty one cannot be mapped and is read."""
    try:
        mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        mapped = np.load(path, allow_pickle=False)
    return mapped


def _edge(part: int, parts: int, dtype: np.dtype) -> np.ndarray:
    """The least key of range ``part``; of the type of the rows, so that numpy searches the file as it is."""
    first = min(part * (1 << 64) // parts, (1 << 64) - 1)
    return np.array(first.to_bytes(8, "big"), dtype=dtype)
