"""The order of an epoch that reads shard by shard, for data that are too large to be read in any order.

Each epoch puts the shards of a source in a new order, one after the other, and cuts that row of samples into equal
runs, one for each rank: a rank reads whole shards, and shares at most its first and its last with its neighbours.
Within its run a rank takes a few shards at a time and shuffles the samples of these few. So what a rank and all its
loader processes read at a time lies in few files, while the order stays a pure function of seed, epoch, rank and step.

N samples on W ranks: an epoch has N // W steps on each rank, visits no sample twice, and leaves out the last N % W
samples of its row, other ones in each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.types import Source

_SHARDS, _SAMPLES = 3, 4  # keeps the uses of one seed apart, with those in ``stream``
_RUN = 1024  # samples in a row that count as a shard where a source has none
_KEPT = 4  # windows kept: loader processes may be in two neighbouring ones, of two epochs


@dataclass(frozen=True)
class ByShard:
    """How ranks read shards.

    Args:
        world: number of ranks.
        share: positions that a rank takes in a row: its share of a batch, or of a part of one.
        open_shards: shards whose samples are shuffled together.
    """

    world: int
    share: int
    open_shards: int

    def place(self, position: int) -> tuple[int, int]:
        """The rank whose turn ``position`` of the common stream is, and the position in that rank's own stream."""
        turn, offset = divmod(position, self.share)
        part, rank = divmod(turn, self.world)
        return rank, part * self.share + offset


@dataclass(frozen=True)
class _Run:
    """One rank's part of one epoch. Places count the samples of the whole epoch's row."""

    order: np.ndarray
    """All shards of the epoch in order."""
    ends: np.ndarray
    """The place at which each of them ends."""
    edges: np.ndarray
    """The places at which the rank's windows begin, and the end of the last: equal numbers of shards in each."""


class ShardOrder:
    """One source's order.

    Args:
        source: with ``shards()``, else its entries count as shards of 1,024 in a row.
        by: see ByShard.
        seed: words that tell this source from others and this run from others.

    Raises:
        UserError: for fewer samples than ranks.
    """

    def __init__(self, source: Source, by: ByShard, seed: Sequence[int]) -> None:
        self._by = by
        self._seed = list(seed)
        self._sizes = np.asarray(shard_sizes(source), dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self.length = int(self._sizes.sum()) // by.world
        """Steps of an epoch on each rank."""
        if not self.length:
            raise UserError(f"data {source.spec!r}: {len(source)} examples are too few for {by.world} ranks")
        self._runs: dict[tuple[int, int], _Run] = {}
        self._windows: dict[tuple[int, int, int], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runs": {}, "_windows": {}}

    def index(self, rank: int, visit: int, step: int) -> int:
        """The entry of the source at ``step`` of ``rank``'s epoch number ``visit``."""
        run = self._run(visit, rank)
        place = rank * self.length + step
        window = int(np.searchsorted(run.edges, place, side="right")) - 1
        first = int(run.edges[window])
        shuffled = self._window((visit, rank, window), int(run.edges[window + 1]) - first)
        place = first + int(shuffled[place - first])
        slot = int(np.searchsorted(run.ends, place, side="right"))
        return int(self._ends[run.order[slot]] - (run.ends[slot] - place))

    def _run(self, visit: int, rank: int) -> _Run:
        if (visit, rank) not in self._runs:
            order = np.random.default_rng([*self._seed, _SHARDS, visit]).permutation(len(self._sizes))
            ends = np.cumsum(self._sizes[order])
            first, last = rank * self.length, (rank + 1) * self.length
            lowest, highest = np.searchsorted(ends, [first, last - 1], side="right")
            count = int(highest - lowest) + 1
            windows = -(-count // self._by.open_shards)
            cuts = lowest + np.arange(1, windows) * count // windows
            _make_room(self._runs)
            self._runs[visit, rank] = _Run(order, ends, np.concatenate([[first], ends[cuts - 1], [last]]))
        return self._runs[visit, rank]

    def _window(self, key: tuple[int, int, int], size: int) -> np.ndarray:
        """The shuffle of one window."""
        if key not in self._windows:
            _make_room(self._windows)
            self._windows[key] = np.random.default_rng([*self._seed, _SAMPLES, *key]).permutation(size)
        return self._windows[key]


def shard_sizes(source: Source) -> list[int]:
    """The sizes of a source's shards, in the order of its entries; empty ones are left out."""
    shards = getattr(source, "shards", None)
    if shards is None:
        whole, rest = divmod(len(source), _RUN)
        return [_RUN] * whole + [rest] * bool(rest)
    sizes = [int(size) for size in shards() if size]
    assert sum(sizes) == len(source), f"{source.spec}: shards of {sum(sizes)} entries in a source of {len(source)}"
    return sizes


def _make_room(kept: dict[Any, Any]) -> None:
    while len(kept) >= _KEPT:
        kept.pop(next(iter(kept)))
