"""The order of training data: a pure function of seed and position, so that a resumed run sees what it would have seen.

Nothing here has a state that matters: loader processes may ask for any position in any order, and two runs that agree
on the seed agree on the sample at position 1,234,567.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from vlbench.core.errors import BadExample, RunError, UserError
from vlbench.core.types import Example, Part, Source
from vlbench.data.shard_order import ByShard, ShardOrder

T = TypeVar("T")

_ORDER, _BLOCK, _SAMPLE = 0, 1, 2  # keeps the three uses of one seed apart
_MIN_BAD = 10
_MAX_IN_A_ROW = 100
_SHOWN = 3


class BadTally:
    """The bad examples of a run, by kind, and the limit at which they stop it.

    Args:
        max_bad: below 1: the largest share of the samples drawn that may be bad, where at least ten have been; 1 or
            more: how many different examples may be bad.
    """

    def __init__(self, max_bad: float = 0.01) -> None:
        if not max_bad >= 0:
            raise UserError(f"max_bad: expected a share below 1 or a count, got {max_bad}")
        self.max_bad = max_bad
        self.drawn = 0
        self.seen: dict[str, dict[str, int]] = {}
        """Kind → where → how often."""

    @property
    def draws_lost(self) -> int:
        """How often a sample had to be replaced."""
        return sum(sum(wheres.values()) for wheres in self.seen.values())

    def counts(self) -> dict[str, int]:
        """Kind → number of different examples."""
        return {kind: len(wheres) for kind, wheres in sorted(self.seen.items())}

    def record(self, bad: Iterable[BadExample], *, drawn: int = 1) -> None:
        """Count ``drawn`` samples and the bad examples that were met on the way.

        Raises:
            RunError: once there are more of them than allowed, naming kinds and places.
        """
        self.drawn += drawn
        new = False
        for error in bad:
            wheres = self.seen.setdefault(error.kind, {})
            wheres[error.where] = wheres.get(error.where, 0) + 1
            new = True
        if new and self._too_many():
            allowed = f"{self.max_bad:g}" if self.max_bad >= 1 else f"{self.max_bad:.2%} of the samples"
            raise RunError(f"too many bad examples ({self.summary()}); allowed: {allowed}")

    def state(self) -> dict[str, Any]:
        """The account in plain values, for a checkpoint or another rank."""
        return {"drawn": self.drawn, "seen": {kind: dict(wheres) for kind, wheres in self.seen.items()}}

    def add(self, state: Mapping[str, Any]) -> None:
        """Add another account, as ``state`` gave it; an example that is in both is one example. Never raises."""
        self.drawn += state["drawn"]
        for kind, wheres in state["seen"].items():
            mine = self.seen.setdefault(kind, {})
            for where, times in wheres.items():
                mine[where] = mine.get(where, 0) + times

    def summary(self) -> str:
        """One line: counts by kind with the first places; empty where all was well."""
        parts = []
        for kind, wheres in sorted(self.seen.items()):
            shown = ", ".join(list(wheres)[:_SHOWN]) + (", …" if len(wheres) > _SHOWN else "")
            parts.append(f"{len(wheres)} {kind}: {shown}")
        return "; ".join(parts)

    def _too_many(self) -> bool:
        if self.max_bad >= 1:
            return sum(self.counts().values()) > self.max_bad
        return self.max_bad == 0 or self.draws_lost > max(_MIN_BAD, self.max_bad * self.drawn)


class Mixture:
    """Several sources as one endless sequence of positions.

    - Within a source, each epoch is a permutation of all its examples, without replacement; ``by_shard``, one that
      reads few shards at a time, and each rank its own (``shard_order`` says what is left out then).
    - Among sources, every block of ``block`` consecutive positions holds them in proportion to the weights, to the
      nearest whole, and what rounding leaves over is carried into the next block: over the run the shares are exact.
      Within the block the order is random. (UniCL's balanced sampling of image-label and image-text pairs.) With
      ``by_shard`` this holds for the stream of each rank, in blocks of its share.

    Args:
        sources: at least one.
        weights: shares, in any unit. None: proportional to the number of examples.
        seed: a non-negative integer.
        block: positions over which the proportions are held; the batch size is a good choice.
        max_bad: see BadTally.
        needs: the parts that an example must have, as a recipe says them. ``text`` may be missing where there is a
            label, from which a prompt can be made.
        by_shard: read shard by shard, in this way. None: in any order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        *,
        block: int = 64,
        max_bad: float = 0.01,
        needs: frozenset[Part] = frozenset({"image"}),
        by_shard: ByShard | None = None,
    ) -> None:
        assert sources, "a mixture needs at least one source"
        assert min(block - 1, seed) >= 0, f"block {block} must be positive, seed {seed} not negative"
        self.sources = tuple(sources)
        self.seed = seed
        self.block = block
        self.needs = needs
        self.tally = BadTally(max_bad)
        self._lengths = [len(source) for source in self.sources]
        for source, length in zip(self.sources, self._lengths):
            if not length:
                raise UserError(f"data {source.spec!r}: there is nothing in it to train on")
        self._shares = _shares(weights if weights is not None else self._lengths, len(self.sources))
        self.classes, self._labels = _union([source.classes for source in self.sources])
        self._by_shard = by_shard
        self._shard_orders = [
            ShardOrder(source, by_shard, (seed, number)) for number, source in enumerate(self.sources) if by_shard
        ]
        assert by_shard is None or block % by_shard.world == 0, f"a block of {block} for {by_shard.world} ranks"
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._layout: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Examples in all sources: positions in an epoch where the weights are the sizes."""
        return sum(self._lengths)

    def __getstate__(self) -> dict[str, Any]:
        # The caches are rebuilt where they are needed; a loader process need not receive them.
        return self.__dict__ | {"_orders": {}, "_layout": None}

    def locate(self, position: int) -> tuple[int, int, int]:
        """Source index, example index and visit (how often this source was gone through before) at ``position``."""
        source, rank, occurrence = self._occurrence(position)
        visit, step = divmod(occurrence, self._epoch(source))
        return source, self._index(source, rank, visit, step), visit

    def rng(self, position: int) -> np.random.Generator:
        """The generator of the sample at ``position``."""
        return np.random.default_rng([self.seed, _SAMPLE, position])

    def sample(
        self, position: int, make: Callable[[Example, int, np.random.Generator], T]
    ) -> tuple[T, tuple[BadExample, ...]]:
        """``make(example, label, rng)`` for the example at ``position``; safe in loader processes.

        ``label`` indexes ``classes`` (-1: none). Where the example or ``make`` (which decodes the image) raises
        BadExample, the next one in the source's order takes its place, with a fresh generator of the same seed. The
        bad ones come back beside the result: the main process hands them to ``tally.record``, which may stop the run.
        """
        source, rank, occurrence = self._occurrence(position)
        length = self._epoch(source)
        visit, step = divmod(occurrence, length)
        bad: list[BadExample] = []
        for attempt in range(min(length, _MAX_IN_A_ROW)):
            index = self._index(source, rank, visit, (step + attempt) % length)
            try:
                example, label = self._read(source, index)
                return make(example, label, self.rng(position)), tuple(bad)
            except BadExample as error:
                bad.append(self._placed(error, source, index))
        tally = BadTally(math.inf)
        tally.record(bad)
        raise RunError(f"data {self.sources[source].spec!r}: {len(bad)} bad examples in a row ({tally.summary()})")

    def example(self, position: int) -> tuple[Example, int, np.random.Generator]:
        """The example at ``position``, its label in ``classes`` or -1, and its generator. Bad ones are counted here."""
        drawn, bad = self.sample(position, lambda example, label, rng: (example, label, rng))
        self.tally.record(bad)
        return drawn

    def _read(self, source: int, index: int) -> tuple[Example, int]:
        example = self.sources[source][index]
        label = -1 if example.label is None else int(self._labels[source][example.label])
        for part in self.needs:
            if not _has(example, part):
                raise BadExample(f"missing {part}", example.id, f"training needs {part} of every example")
        return example, label

    def _placed(self, error: BadExample, source: int, index: int) -> BadExample:
        """The error with the data set before the place, where the place is only an id."""
        if error.where != self.sources[source].ids()[index]:
            return error
        return BadExample(error.kind, f"{self.sources[source].spec} {error.where}", error.reason)

    def _occurrence(self, position: int) -> tuple[int, int, int]:
        """Which source is at ``position``, for which rank, and how many times that source came before for it.

        Without ``by_shard`` all ranks read one stream, that of rank 0.
        """
        rank, own, size = 0, position, self.block
        if self._by_shard is not None:
            rank, own = self._by_shard.place(position)
            size = self.block // self._by_shard.world
        if len(self.sources) == 1:
            return 0, rank, own
        block, offset = divmod(own, size)
        if self._layout is None or self._layout[0] != (rank, block):
            before = _apportion(self._shares, block * size)
            counts = _apportion(self._shares, (block + 1) * size) - before
            arrangement = np.repeat(np.arange(len(self.sources)), counts)
            whose = [] if self._by_shard is None else [rank]
            np.random.default_rng([self.seed, _BLOCK, block, *whose]).shuffle(arrangement)
            self._layout = ((rank, block), before, arrangement)
        _, before, arrangement = self._layout
        source = int(arrangement[offset])
        return source, rank, int(before[source] + np.count_nonzero(arrangement[:offset] == source))

    def _epoch(self, source: int) -> int:
        """Occurrences of a source until it is gone through."""
        return self._shard_orders[source].length if self._by_shard is not None else self._lengths[source]

    def _index(self, source: int, rank: int, visit: int, step: int) -> int:
        if self._by_shard is not None:
            return self._shard_orders[source].index(rank, visit, step)
        return int(self._order(source, visit)[step])

    def _order(self, source: int, visit: int) -> np.ndarray:
        """The permutation of one epoch of one source, kept while it and the next one are in use."""
        key = (source, visit)
        order = self._orders.get(key)
        if order is None:
            length = self._lengths[source]
            kind = np.uint32 if length <= np.iinfo(np.uint32).max else np.uint64
            order = np.arange(length, dtype=kind)
            np.random.default_rng([self.seed, _ORDER, source, visit]).shuffle(order)
            for old in [old for old in self._orders if old[0] == source and abs(old[1] - visit) > 1]:
                self._orders.pop(old, None)
            self._orders[key] = order
        return order


def _shares(weights: Sequence[float], n: int) -> np.ndarray:
    assert len(weights) == n, f"{len(weights)} weights for {n} sources"
    shares = np.asarray(weights, dtype=np.float64)
    if not np.all(np.isfinite(shares)) or np.any(shares <= 0):
        raise UserError(f"mixture weights must be positive numbers, got {list(weights)}")
    return shares / shares.sum()


def _apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """How often each source occurs among the first ``total`` positions: shares times total, to whole numbers.

    Webster's (Sainte-Laguë's) rule: the k-th occurrence of source s is due at ``(k + 1/2) / share_s``, and occurrences
    are served by due time. Unlike largest remainders, a longer run never takes an occurrence back, so the counts of
    every block are whole and not negative.
    """
    n = len(shares)
    # All that is due well before the answer's time (which is at least total - n/2) at once, the last few one by one.
    safe = max(0.0, total - n / 2 - 2)
    counts = np.floor(shares * safe + 0.5).astype(np.int64)
    while (missing := total - int(counts.sum())) > 0:
        assert missing <= 2 * n + 4, "apportionment starts too far from its end"
        counts[int(np.argmin((counts + 0.5) / shares))] += 1
    assert int(counts.sum()) == total, "apportionment overshot"
    return counts


def _union(tables: Sequence[Sequence[str] | None]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """All class names in order of first appearance, and for each source its labels as indices into them."""
    index: dict[str, int] = {}
    maps = [np.array([index.setdefault(name, len(index)) for name in table or ()], dtype=np.int64) for table in tables]
    return tuple(index), maps


def _has(example: Example, part: Part) -> bool:
    if part == "image":
        return example.image is not None
    if part == "text":
        return example.label is not None or any(example.texts.values())
    if part == "label":
        return example.label is not None
    return bool(example.regions)
