from __future__ import annotations

import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from vlbench.data.filters.tables import (
    MERGE_BYTES_PER_ROW,
    Table,
    distinct_pairs,
    frequency_floor,
    key_of,
    keys_array,
    pairs_array,
)


def key(number: int) -> bytes:
    """A digest, or one that numpy could take for another: zero bytes at its end, in its middle, everywhere."""
    special = [bytes(16), b"a" + bytes(15), b"a\0b" + bytes(13), bytes(15) + b"a", b"\xff" * 16]
    return special[number] if number < len(special) else key_of(str(number).encode())


def write_counts(table: Table, runs: list[Counter[int]]) -> None:
    for shard, run in enumerate(runs):
        rows = sorted((key(number), count) for number, count in run.items())
        numbers = np.array([count for _, count in rows], dtype=np.int64)
        table.write_run(shard, keys_array([row for row, _ in rows]), numbers)


@pytest.mark.parametrize("parts", [1, 3, 16])
def test_counts_are_those_of_one_big_counter(tmp_path, parts):
    rng = np.random.default_rng(0)
    runs = [Counter(rng.zipf(1.3, 400).clip(0, 300).tolist()) for _ in range(6)] + [Counter()]
    table = Table("ngrams", tmp_path, len(runs))
    write_counts(table, runs)
    for part in range(parts):
        table.merge(part, parts)
        assert table.is_merged(part, parts)
    total = sum(runs, Counter())
    for shard, run in enumerate(runs):
        expected = [count for _, count in sorted((key(number), total[number]) for number in run)]
        assert table.totals(shard, parts).tolist() == expected
    assert table.histogram(parts) == Counter(total.values())


@pytest.mark.parametrize("limit", [1, 3, 1000])
@pytest.mark.parametrize("parts", [1, 5])
def test_pairs_count_different_values_up_to_the_limit(tmp_path, limit, parts):
    rng = np.random.default_rng(limit)
    runs = [[tuple(pair) for pair in rng.integers(0, 30, (200, 2)).tolist()] for _ in range(4)] + [[]]
    table = Table("texts", tmp_path, len(runs), limit)
    values = defaultdict(set)
    for shard, run in enumerate(runs):
        for first, second in run:
            values[key(first)].add(second)
        columns = [keys_array([key(pair[side]) for pair in run]) for side in (0, 1)]
        table.write_run(shard, distinct_pairs(pairs_array(*columns), limit))
    for part in range(parts):
        table.merge(part, parts)
    for shard, run in enumerate(runs):
        own = sorted({key(first) for first, _ in run})
        assert table.totals(shard, parts).tolist() == [min(len(values[each]), limit + 1) for each in own]


def test_distinct_pairs_keep_no_more_values_than_decide():
    keys, values = keys_array([key(7)] * 50 + [key(8)] * 2), keys_array([key(n) for n in range(50)] + [key(9)] * 2)
    assert len(distinct_pairs(pairs_array(keys, values), 10)) == 11 + 1


def test_floor_keeps_the_most_frequent_and_their_ties():
    histogram = {100: 1, 7: 3, 2: 10, 1: 500}
    assert [frequency_floor(histogram, top) for top in (1, 2, 4, 5, 14, 15, 514, 10_000)] == [100, 7, 7, 2, 2, 1, 1, 1]
    assert frequency_floor({}, 5) == 1


def test_merging_takes_no_more_memory_when_there_is_four_times_as_much(tmp_path):
    memory = 1 << 20
    peaks = [peak_of_merging(tmp_path / str(shards), shards, memory) for shards in (8, 32)]
    assert max(peaks) < memory
    assert peaks[1] < 1.3 * peaks[0]


def peak_of_merging(folder: Path, shards: int, memory: int) -> int:
    rng = np.random.default_rng(0)
    table = Table("texts", folder, shards, 10)
    for shard in range(shards):
        own = [[rng.bytes(16) for _ in range(2000)] for _ in range(2)]
        own[0][:500] = [key(9)] * 500  # a key that is everywhere
        own = [keys_array(column) for column in own]
        table.write_run(shard, distinct_pairs(pairs_array(*own), 10))
    parts = table.partitions(memory)
    assert parts >= shards * 1500 * MERGE_BYTES_PER_ROW // memory  # there is something to bound
    tracemalloc.start()
    for part in range(parts):
        table.merge(part, parts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
