from __future__ import annotations

import pickle
import time
from collections import Counter

import numpy as np
import pytest

from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Example
from vlbench.data.sources import BaseSource
from vlbench.data.stream import BadTally, Mixture, _apportion


class Numbers(BaseSource):
    """Entries ``name0``, ``name1``, ...; those in ``bad`` cannot be read."""

    def __init__(self, name, n, *, classes=None, bad=(), texts=None):
        super().__init__(f"fake:{name}", "train", provides=("image", "label"), classes=classes)
        self.name, self.n, self.bad, self.texts = name, n, frozenset(bad), texts or {}

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.bad:
            raise BadExample("truncated image", self.ids()[index], "cut")
        label = index % len(self.classes) if self.classes else None
        return Example(id=self.ids()[index], image=b"x", label=label, texts=self.texts)

    def ids(self):
        return [f"{self.name}{i}" for i in range(self.n)]

    def labels(self):
        return [i % len(self.classes) for i in range(self.n)] if self.classes else None


def mixture(**changes):
    sources = [Numbers("a", 40), Numbers("b", 25), Numbers("c", 7)]
    return Mixture(sources, [0.5, 0.3, 0.2], seed=3, block=10, **changes)


def test_locate_goes_through_each_source_without_replacement():
    stream = mixture()
    seen: dict[tuple[int, int], list[int]] = {}
    for position in range(400):
        source, index, visit = stream.locate(position)
        seen.setdefault((source, visit), []).append(index)
    for (source, visit), indices in seen.items():
        length = len(stream.sources[source])
        assert len(set(indices)) == len(indices)
        if (source, visit + 1) in seen:
            assert sorted(indices) == list(range(length))
    assert seen[0, 0] != seen[0, 1]
    assert seen[0, 0] != sorted(seen[0, 0])


def test_locate_holds_the_proportions_in_every_block():
    stream = mixture()
    for block in range(30):
        counts = Counter(stream.locate(block * 10 + i)[0] for i in range(10))
        assert counts == {0: 5, 1: 3, 2: 2}
    orders = {tuple(stream.locate(block * 10 + i)[0] for i in range(10)) for block in range(30)}
    assert len(orders) > 20


def test_locate_carries_what_rounding_leaves_over():
    weights = np.array([0.55, 0.37, 0.05, 0.03])
    stream = Mixture([Numbers(name, 50) for name in "abcd"], weights, seed=0, block=8)
    counts = np.zeros(4)
    for block in range(400):
        for i in range(8):
            counts[stream.locate(block * 8 + i)[0]] += 1
        assert np.all(np.abs(counts - weights * 8 * (block + 1)) <= 1)


def test_locate_is_a_function_of_seed_and_position_alone():
    rng = np.random.default_rng(0)
    straight = mixture()
    expected = [straight.locate(p) for p in range(500)]
    jumping = mixture()
    for position in rng.permutation(500):
        assert jumping.locate(int(position)) == expected[position]
    assert [pickle.loads(pickle.dumps(jumping)).locate(p) for p in range(500)] == expected
    other = Mixture(straight.sources, [0.5, 0.3, 0.2], seed=4, block=10)
    assert [other.locate(p) for p in range(500)] != expected


def test_locate_answers_at_once_far_into_a_run():
    stream = mixture()
    start = time.perf_counter()
    far = stream.locate(10**12 + 7)
    assert time.perf_counter() - start < 0.1
    assert far == mixture().locate(10**12 + 7)


def test_a_single_source_is_a_permutation_per_epoch():
    stream = Mixture([Numbers("a", 11)], seed=1)
    for visit in range(3):
        places = [stream.locate(visit * 11 + i) for i in range(11)]
        assert sorted(index for _, index, _ in places) == list(range(11))
        assert {v for _, _, v in places} == {visit}


def test_weights_default_to_the_sizes():
    stream = Mixture([Numbers("a", 30), Numbers("b", 10)], seed=1, block=8)
    counts = Counter(stream.locate(p)[0] for p in range(40))
    assert counts == {0: 30, 1: 10}
    assert len(stream) == 40


def test_apportion_is_near_the_quota_and_never_takes_back():
    rng = np.random.default_rng(0)
    for _ in range(500):
        shares = rng.dirichlet(np.full(rng.integers(1, 7), rng.choice([0.2, 1.0, 10.0]))) + 1e-6
        shares /= shares.sum()
        total, step = int(rng.integers(10 ** rng.integers(1, 9))), int(rng.integers(1, 300))
        before, after = _apportion(shares, total), _apportion(shares, total + step)
        assert before.sum() == total
        assert after.sum() == total + step
        assert np.all(after >= before)
        assert np.all(np.abs(before - shares * total) <= max(1.0, len(shares) / 2))


def test_apportion_equals_serving_by_due_time():
    shares = np.array([0.41, 0.33, 0.26])
    counts = np.zeros(3, dtype=int)
    for total in range(1, 500):
        counts[np.argmin((counts + 0.5) / shares)] += 1
        np.testing.assert_array_equal(_apportion(shares, total), counts)


def test_classes_are_joined_by_name():
    first = Numbers("a", 4, classes=("cat", "dog"))
    second = Numbers("b", 6, classes=("fish", "dog", "cat"))
    stream = Mixture([first, second, Numbers("c", 3)], [1, 1, 1], seed=0, block=3)
    assert stream.classes == ("cat", "dog", "fish")
    for position in range(30):
        example, label, _ = stream.example(position)
        source = stream.sources[stream.locate(position)[0]]
        if source.classes is None:
            assert label == -1
        else:
            assert stream.classes[label] == source.classes[example.label]


def test_sample_gives_each_position_its_own_generator():
    stream = mixture()
    draw = lambda example, label, rng: (example.id, rng.integers(2**60))  # noqa: E731
    values = [stream.sample(p, draw)[0] for p in range(100)]
    assert len({value for _, value in values}) == 100
    assert [mixture().sample(p, draw)[0] for p in range(100)] == values


def test_sample_replaces_a_bad_example_by_the_next_and_hands_it_back():
    good, broken = Mixture([Numbers("a", 50)], seed=2), Mixture([Numbers("a", 50, bad=[7])], seed=2)
    keep = lambda example, label, rng: (example.id, rng.random())  # noqa: E731
    replaced = 0
    for position in range(49):
        value, bad = broken.sample(position, keep)
        expected, none = good.sample(position, keep)
        assert none == ()
        if bad:
            replaced += 1
            assert expected[0] == "a7"
            assert value == (good.sample(position + 1, keep)[0][0], expected[1])
            assert [(error.kind, error.where) for error in bad] == [("truncated image", "fake:a a7")]
            assert pickle.loads(pickle.dumps(bad))[0].where == "fake:a a7"
        else:
            assert value == expected
    assert replaced == 1
    assert broken.tally.drawn == 0  # nothing is counted before the main process does


def test_sample_replaces_what_cannot_be_decoded():
    def decode(example, label, rng):
        if example.id == "a3":
            raise BadExample("not an image", example.id, "text")
        return example.id

    stream = Mixture([Numbers("a", 10)], seed=2)
    results = [stream.sample(p, decode) for p in range(10)]
    assert "a3" not in [value for value, _ in results]
    assert sum(len(bad) for _, bad in results) == 1


def test_sample_stops_where_nothing_can_be_read():
    stream = Mixture([Numbers("a", 5, bad=range(5))], seed=2)
    with pytest.raises(UserError, match=r"5 bad examples in a row.*truncated image"):
        stream.example(0)


def test_sample_refuses_examples_without_what_is_needed():
    captioned = Numbers("a", 4, texts={"en": ("a cat",)})
    assert Mixture([captioned], needs=frozenset({"image", "text"})).example(0)[0].id
    labelled = Numbers("b", 4, classes=("cat",))
    assert Mixture([labelled], needs=frozenset({"image", "text"})).example(0)[1] == 0
    with pytest.raises(UserError, match="missing text"):
        Mixture([Numbers("c", 4)], needs=frozenset({"image", "text"})).example(0)


def test_example_counts_and_stops_above_the_limit():
    stream = Mixture([Numbers("a", 1000, bad=range(0, 1000, 4))], seed=0)

    def train():
        for position in range(1000):
            stream.example(position)

    with pytest.raises(UserError, match=r"too many bad examples .*truncated image: fake:a a.*allowed: 1.00% of"):
        train()
    assert stream.tally.draws_lost == 11


def test_tally_allows_a_share_or_a_number():
    bad = [BadExample("empty file", f"f{i}", "") for i in range(30)]
    share = BadTally(0.1)
    share.record([], drawn=200)
    share.record(bad[:20], drawn=0)
    with pytest.raises(UserError, match=r"allowed: 10\.00%"):
        share.record(bad[20:21], drawn=0)
    number = BadTally(2)
    for _ in range(100):
        number.record(bad[:2])  # the same two again and again
    assert number.counts() == {"empty file": 2}
    with pytest.raises(UserError, match="3 empty file: f0, f1, f2"):
        number.record(bad[2:3])
    with pytest.raises(UserError):
        BadTally(0).record(bad[:1])


def test_mixture_refuses_empty_sources_and_bad_weights():
    with pytest.raises(UserError, match="nothing in it"):
        Mixture([Numbers("a", 0)])
    with pytest.raises(UserError, match="positive"):
        Mixture([Numbers("a", 3), Numbers("b", 3)], [1, 0])
