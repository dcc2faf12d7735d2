from __future__ import annotations

import numpy as np
import pytest

from vlbench.stats.ranking import holm, tie_groups, winner


def symmetric(m: int, pairs: dict[tuple[int, int], float], rest: float = 1.0) -> np.ndarray:
    p = np.full((m, m), rest)
    for (i, j), value in pairs.items():
        p[i, j] = p[j, i] = value
    return p


def test_holm_worked_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, of which the last is raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_of_one_and_of_none() -> None:
    assert holm([0.03]) == pytest.approx([0.03])
    assert len(holm([])) == 0
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_holm_is_permutation_equivariant_and_keeps_order() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(30) ** 4
    order = rng.permutation(30)
    assert holm(p[order]) == pytest.approx(holm(p)[order])
    assert (np.diff(holm(np.sort(p))) >= 0).all()
    assert (holm(p) >= p).all()


def test_holm_keeps_the_family_wise_error() -> None:
    rng = np.random.default_rng(1)
    false = np.mean([(holm(rng.random(10)) < 0.05).any() for _ in range(4000)])
    assert 0.035 < false < 0.062


def test_holm_refuses_what_is_no_p_value() -> None:
    with pytest.raises(AssertionError):
        holm([0.1, 1.2])
    with pytest.raises(AssertionError):
        holm([0.1, float("nan")])


def test_ranks_count_the_significantly_better() -> None:
    # a > b > c > d in value; only d is separated, from a and b.
    p = symmetric(4, {(0, 3): 0.001, (1, 3): 0.01})
    assert tie_groups(list("abcd"), [0.9, 0.8, 0.7, 0.6], p) == {"a": 1, "b": 1, "c": 1, "d": 3}
    assert winner(list("abcd"), [0.9, 0.8, 0.7, 0.6], p) is None


def test_ranks_of_inseparable_models_are_all_one() -> None:
    assert set(tie_groups(list("abc"), [0.9, 0.5, 0.1], symmetric(3, {})).values()) == {1}
    assert winner(list("abc"), [0.9, 0.5, 0.1], symmetric(3, {})) is None


def test_ranks_of_separated_models_are_their_order() -> None:
    p = symmetric(3, {}, rest=0.001)
    assert tie_groups(list("abc"), [0.1, 0.9, 0.5], p) == {"b": 1, "c": 2, "a": 3}
    assert winner(list("abc"), [0.1, 0.9, 0.5], p) == "b"


def test_winner_must_beat_every_other() -> None:
    # b is beaten by a; c, more variable, is beaten by nobody: rank 1 is shared.
    p = symmetric(3, {(0, 1): 0.001})
    ranks = tie_groups(list("abc"), [0.9, 0.7, 0.8], p)
    assert ranks == {"a": 1, "b": 2, "c": 1}
    assert winner(list("abc"), [0.9, 0.7, 0.8], p) is None


def test_winner_needs_a_rival_and_a_difference() -> None:
    assert winner(["a"], [0.9], np.ones((1, 1))) is None
    assert winner(["a", "b"], [0.5, 0.5], np.zeros((2, 2))) is None
