from __future__ import annotations

import numpy as np
import pytest

from tests.report.toy import N, Toy, overlapping
from vlbench.report.columns import make_columns, row_labels


def columns_of(toy: Toy):
    return make_columns(toy.results, toy.outcomes_of)


def test_column_ranks_what_is_separated() -> None:
    toy = Toy()
    toy.add("low", right=200)
    toy.add("high", right=300)
    toy.add("nearly", right=299)
    (column,) = columns_of(toy)
    assert column.title == "cifar10: acc1"
    assert column.ranks == {"high": 1, "nearly": 1, "low": 3}
    assert column.best is None
    assert column.test_method == "exact McNemar"
    assert column.interval_method == "wilson"
    assert len(column.tests) == 3


def test_column_names_a_winner_that_is_separated() -> None:
    toy = Toy()
    for name, right in (("low", 200), ("high", 300), ("middle", 250)):
        toy.add(name, right=right)
    (column,) = columns_of(toy)
    assert column.ranks == {"high": 1, "middle": 2, "low": 3}
    assert column.best == "high"


def test_column_of_one_model_has_no_rank() -> None:
    toy = Toy()
    toy.add("only")
    (column,) = columns_of(toy)
    assert (column.ranks, column.best, column.problem) == ({}, None, None)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"data": {"spec": "hf:x", "split": "test", "n": N, "fingerprint": "other"}}, "data"),
        ({"data": {"spec": "hf:x", "split": "val", "n": N, "fingerprint": "d"}}, "data"),
        ({"task_fingerprint": "other"}, "card"),
        ({"config": {"c": 2.0}}, "settings"),
        ({"task_version": 2}, "v2"),
    ],
)
def test_results_under_different_protocols_never_share_a_column(change: dict, word: str) -> None:
    toy = Toy()
    toy.add("a", right=300)
    toy.add("b", right=200)
    toy.add("c", right=100, **change)
    columns = columns_of(toy)
    assert sorted(sorted(column.results) for column in columns) == [["a", "b"], ["c"]]
    assert len({column.title for column in columns}) == 2
    (alone,) = [column for column in columns if "c" in column.results]
    assert word in alone.title
    assert not alone.ranks


def test_weights_that_changed_under_one_name_are_two_rows() -> None:
    toy = Toy()
    toy.add("a", "linear/x", model={"backbone_fingerprint": "1111112"})
    toy.add("a", "linear/y", model={"backbone_fingerprint": "2222223"})
    assert sorted(row_labels(toy.results).values()) == ["a (weights 111111)", "a (weights 222222)"]
    assert [list(column.results) for column in columns_of(toy)] == [["a (weights 111111)"], ["a (weights 222222)"]]


def test_examples_that_do_not_match_leave_a_column_without_ranks() -> None:
    toy = Toy()
    toy.add("a")
    toy.add("b", right=np.ones(N - 1))
    (column,) = columns_of(toy)
    assert column.ranks == {}
    assert column.problem is not None
    assert "different examples" in column.problem


def test_a_metric_without_examples_leaves_a_column_without_ranks() -> None:
    toy = Toy()
    toy.add("a")
    toy.add("b")
    columns = make_columns(toy.results, lambda result: {})
    assert columns[0].problem == "acc1 has no value for a single example"


def test_holm_is_over_all_pairs_of_the_column() -> None:
    """A difference at p = 0.03 alone separates two models; among ten pairs it must not."""
    toy = Toy()
    rng = np.random.default_rng(0)
    base = (rng.random(N) < 0.6).astype(float)
    better = base.copy()
    wrong, right = np.flatnonzero(base == 0), np.flatnonzero(base == 1)
    better[wrong[:16]], better[right[:5]] = 1, 0  # 16 against 5 discordant: exact McNemar p = 0.027
    toy.add("a", right=base)
    toy.add("b", right=better)
    assert columns_of(toy)[0].ranks == {"a": 2, "b": 1}
    for seed in range(3):
        toy.add(f"other{seed}", right=overlapping(int(base.sum()), N, seed))
    ranks = columns_of(toy)[0].ranks
    assert ranks["a"] == ranks["b"] == 1
