"""Loader processes keep the order, and bring the user's errors home as themselves and ours with their tracebacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing import active_children
from typing import Any

import numpy as np
import pytest

from vlbench.core.errors import BadExample, RunError, UserError
from vlbench.data.loading import in_batches, loaded

WORKERS = pytest.mark.parametrize("workers", [0, 2])


def until_error(made: Iterator[Any]) -> tuple[list[Any], Exception]:
    """What comes before an error, and the error."""
    found = []
    try:
        for one in made:
            found.append(one)
    except Exception as error:
        return found, error
    raise AssertionError(f"no error after {found}")


@WORKERS
def test_results_come_in_the_order_of_their_keys_and_as_they_are(workers: int) -> None:
    scale = 3  # a closure: what is inherited by a fork need not be picklable

    def make(batch: Any) -> Any:
        return {"sum": sum(batch) * scale, "array": np.array(batch)}, os.getpid()

    found = list(loaded(make, in_batches(range(7), 2), workers=workers, ahead=1))
    assert [said["sum"] for said, _ in found] == [3, 15, 27, 18]
    assert all(type(said["array"]) is np.ndarray for said, _ in found)
    assert len({where for _, where in found}) == max(workers, 1)
    assert ({where for _, where in found} == {os.getpid()}) == (workers == 0)
    assert list(loaded(make, [], workers=workers)) == []


@WORKERS
@pytest.mark.parametrize(
    "error", [UserError("one line"), RunError("one line"), BadExample("truncated image", "a.png", "it ends early")]
)
def test_a_users_error_arrives_as_itself_after_all_that_comes_before_it(workers: int, error: UserError) -> None:
    def make(key: int) -> int:
        if key >= 3:  # every later one too: the first is told
            raise error if key == 3 else UserError(f"key {key}")
        return key

    before, told = until_error(loaded(make, range(6), workers=workers))
    assert before == [0, 1, 2]
    assert type(told) is type(error)
    assert str(told) == str(error)
    assert vars(told) == vars(error)


@WORKERS
def test_a_defect_of_ours_keeps_the_traceback_of_where_it_was_raised(workers: int) -> None:
    def make(key: int) -> int:
        return broken_on_purpose(key)

    before, told = until_error(loaded(make, range(6), workers=workers))
    assert before == [0]
    assert type(told) is ZeroDivisionError
    names, frame = [str(told)], told.__traceback__
    while frame is not None:
        names.append(frame.tb_frame.f_code.co_name)
        frame = frame.tb_next
    assert any("broken_on_purpose" in name for name in names)  # of the process in its words, or our own


def broken_on_purpose(key: int) -> int:
    return key // (1 - key)


def test_keys_are_read_as_they_are_needed() -> None:
    def endless() -> Iterator[int]:
        yield from range(10**9)

    made = loaded(lambda key: key, endless(), workers=1)
    assert [next(made) for _ in range(3)] == [0, 1, 2]


def test_the_processes_end_where_nobody_asks_for_more() -> None:
    before = set(active_children())
    made = loaded(lambda key: key, range(100), workers=2)
    assert next(made) == 0
    assert len(set(active_children()) - before) == 2
    made.close()
    assert not set(active_children()) - before


def test_the_last_of_the_batches_may_be_smaller() -> None:
    assert in_batches("abcde", 2) == ["ab", "cd", "e"]
    assert in_batches("ab", 2) == ["ab"]
    assert in_batches("", 2) == []
