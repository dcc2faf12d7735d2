from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from tests.data.making import png, write_tar
from tests.data.test_stream import Numbers
from vlbench.core.errors import UserError
from vlbench.data.shard_order import ByShard, ShardOrder, shard_sizes
from vlbench.data.sources import open_source
from vlbench.data.stream import Mixture

SIZES = [30, 0, 17, 40, 25, 33, 8, 21, 40, 19, 36, 27]  # 296 samples


class Sharded(Numbers):
    """Numbers in shards."""

    def __init__(self, name="a", sizes=SIZES, **about):
        super().__init__(name, sum(sizes), **about)
        self.sizes = list(sizes)

    def shards(self):
        return self.sizes


def shard_of(index, sizes=SIZES):
    return int(np.searchsorted(np.cumsum(sizes), index, side="right"))


def by_shard(world, share=4, open_shards=3):
    return ByShard(world, share, open_shards)


def stream(world, *, share=4, open_shards=3, seed=3, sources=None, **about):
    sources = [Sharded()] if sources is None else sources
    return Mixture(sources, None, seed, block=world * share, by_shard=by_shard(world, share, open_shards), **about)


def of_rank(mixture, rank, world, count, share=4):
    """The first ``count`` places of a rank, as ``Positions`` would ask for them."""
    asked = (
        turn * world * share + rank * share + offset for turn in range(-(-count // share)) for offset in range(share)
    )
    return [mixture.locate(position) for position, _ in zip(asked, range(count))]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_an_epoch_visits_no_sample_twice_and_leaves_out_less_than_one_a_rank(world):
    order = ShardOrder(Sharded(), by_shard(world), (0,))
    total = sum(SIZES)
    assert order.length == total // world
    left_out = []
    for visit in range(4):
        seen = [order.index(rank, visit, step) for rank in range(world) for step in range(order.length)]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(total))
        left_out.append(frozenset(range(total)) - set(seen))
        assert len(left_out[-1]) == total % world
    assert total % world == 0 or len(set(left_out)) > 1  # not always the same ones


def test_ranks_read_shards_of_their_own_but_for_the_two_at_their_ends():
    world = 4
    order = ShardOrder(Sharded(), by_shard(world), (0,))
    for visit in range(3):
        readers: dict[int, set[int]] = {}
        for rank in range(world):
            for step in range(order.length):
                readers.setdefault(shard_of(order.index(rank, visit, step)), set()).add(rank)
        assert sum(len(ranks) - 1 for ranks in readers.values()) <= world - 1


def test_what_is_read_in_a_row_lies_in_few_shards():
    sizes = [50] * 40
    order = ShardOrder(Sharded(sizes=sizes), by_shard(2, open_shards=4), (1,))
    for rank in range(2):
        shards = [shard_of(order.index(rank, 0, step), sizes) for step in range(order.length)]
        # A window holds 3 or 4 shards, 150 samples at least: that many in a row meet two windows at most.
        near = [len(set(shards[start : start + 150])) for start in range(len(shards) - 150)]
        assert max(near) <= 8
        for start in range(0, 800, 200):
            assert len(set(shards[start : start + 200])) == 4
            assert sorted(shards[start : start + 200]) != shards[start : start + 200]
    far = Mixture([Sharded(sizes=sizes)], seed=1)
    assert len({shard_of(far.locate(position)[1], sizes) for position in range(150)}) > 30


def test_epochs_differ_in_shards_and_within_them():
    order = ShardOrder(Sharded(), by_shard(1, open_shards=1), (0,))
    epochs = [[order.index(0, visit, step) for step in range(order.length)] for visit in range(2)]
    assert list(dict.fromkeys(map(shard_of, epochs[0]))) != list(dict.fromkeys(map(shard_of, epochs[1])))
    third = [[index for index in epoch if shard_of(index) == 3] for epoch in epochs]
    assert third[0] != third[1]
    assert sorted(third[0]) == sorted(third[1]) == list(range(47, 87))


def test_a_sample_is_as_likely_anywhere_in_its_window():
    places = np.zeros((60, 60))
    for seed in range(400):
        order = ShardOrder(Sharded(sizes=[20, 20, 20]), by_shard(1), (seed,))
        for step in range(60):
            places[order.index(0, 0, step), step] += 1
    expected = 400 / 60
    chi2 = ((places - expected) ** 2 / expected).sum()
    assert abs(chi2 - 59 * 59) < 5 * np.sqrt(2 * 59 * 59)


def test_locate_is_a_function_of_seed_position_and_ranks_alone():
    places = [stream(2).locate(position) for position in range(700)]
    jumping = stream(2)
    for position in np.random.default_rng(0).permutation(700):
        assert jumping.locate(int(position)) == places[position]
    assert [pickle.loads(pickle.dumps(jumping)).locate(position) for position in range(50)] == places[:50]
    assert [stream(2, seed=4).locate(position) for position in range(700)] != places
    assert stream(2).locate(10**12)[1] == stream(2).locate(10**12)[1]


def test_positions_of_a_rank_are_its_own_stream_whatever_its_share_of_a_part():
    whole, parts = stream(2, share=8), stream(2, share=4)
    for rank in range(2):
        assert of_rank(whole, rank, 2, 600, share=8) == of_rank(parts, rank, 2, 600, share=4)
    order = ShardOrder(Sharded(), by_shard(2, share=8), (3, 0))
    assert [index for _, index, _ in of_rank(whole, 1, 2, 100, share=8)] == [order.index(1, 0, s) for s in range(100)]
    assert of_rank(whole, 0, 2, 160, share=8)[148][2] == 1  # the second epoch, after 296 / 2 steps


def test_mixture_holds_the_proportions_on_every_rank():
    sources = [Sharded("a"), Numbers("b", 100), Sharded("c", sizes=[9, 9])]
    mixture = Mixture(sources, [0.5, 0.25, 0.25], 1, block=16, by_shard=by_shard(2, share=8))
    for block in range(30):
        for rank in range(2):
            first = block * 16 + rank * 8
            assert Counter(mixture.locate(first + i)[0] for i in range(8)) == {0: 4, 1: 2, 2: 2}
    first, second = (of_rank(mixture, rank, 2, 200, share=8) for rank in range(2))
    assert [source for source, _, _ in first] != [source for source, _, _ in second]
    assert not {(s, i) for s, i, visit in first if not visit} & {(s, i) for s, i, visit in second if not visit}


def test_a_bad_sample_is_replaced_by_the_ranks_own_next():
    mixture = stream(2, sources=[Sharded(bad=[100])])
    good = stream(2)
    replaced = 0
    for rank in range(2):
        places = of_rank(good, rank, 2, 148)
        for turn, (_, index, _) in enumerate(places[:-1]):
            position = turn // 4 * 8 + rank * 4 + turn % 4
            drawn, bad = mixture.sample(position, lambda example, label, rng: example.id)
            if index == 100:
                replaced += 1
                assert drawn == f"a{places[turn + 1][1]}"
                assert len(bad) == 1
            else:
                assert drawn == f"a{index}"
    assert replaced == 1


def test_sources_without_shards_count_as_runs():
    assert shard_sizes(Numbers("a", 2500)) == [1024, 1024, 452]
    assert shard_sizes(Numbers("a", 1024)) == [1024]
    assert shard_sizes(Sharded()) == [size for size in SIZES if size]
    order = ShardOrder(Numbers("a", 50), by_shard(3), (0,))
    seen = [order.index(rank, 0, step) for rank in range(3) for step in range(16)]
    assert len(set(seen)) == 48


def test_fewer_samples_than_ranks_are_refused():
    with pytest.raises(UserError, match="fake:a': 3 examples are too few for 4 ranks"):
        stream(4, sources=[Numbers("a", 3)])


def test_shards_of_webdataset_are_its_tars_with_the_broken_entry_of_a_damaged_one(tmp_path):
    sample = lambda n: {f"s{n}.png": png(n), f"s{n}.txt": b"a thing"}  # noqa: E731
    write_tar(tmp_path / "0.tar", sample(0) | sample(1))
    write_tar(tmp_path / "1.tar", sample(2) | sample(3) | sample(4), end=False)
    write_tar(tmp_path / "2.tar", sample(5))
    source = open_source(f"wds:{tmp_path}/{{0..2}}.tar")
    assert list(source.shards()) == [2, 4, 1]
    assert shard_sizes(source) == [2, 4, 1]
