"""Token ids in one tensor: rounded up, capped, filled."""

from __future__ import annotations

import torch

from vlbench.models.padding import LENGTH_STEP, padded_ids


def test_rows_are_filled_to_a_multiple_of_the_step_and_no_longer_than_allowed() -> None:
    rows = [[5, 6, 7], (8,), [1, 2, 3, 4, 5]]
    found = padded_ids(rows, step=4, pad=9)
    assert found.dtype == torch.int64
    assert found.tolist() == [[5, 6, 7, 9, 9, 9, 9, 9], [8, 9, 9, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 9, 9, 9]]
    assert padded_ids(rows, step=4, most=5).tolist() == [[5, 6, 7, 0, 0], [8, 0, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert padded_ids(rows).shape == (3, LENGTH_STEP)
    assert padded_ids([[1] * 16]).shape == (1, 16)
    assert padded_ids([[1] * 17]).shape == (1, 32)


def test_no_rows_and_a_row_of_nothing_are_no_mistake() -> None:
    assert padded_ids([]).shape == (0, LENGTH_STEP)
    assert padded_ids([[], [3]], step=2).tolist() == [[0, 0], [3, 0]]
