"""Token ids of several texts as one tensor.

Rows are as long as the longest text, rounded up: so that a batch has one of few lengths, and a text's embedding is the
same whatever stands beside it (why that needs rounding: ``text.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LENGTH_STEP = 16
"""Tokens of a row come in multiples of it."""


def padded_ids(
    rows: Sequence[Sequence[int]], *, step: int = LENGTH_STEP, most: int | None = None, pad: int = 0
) -> torch.Tensor:
    """``tokens_BL``, int64, of rows of unequal length.

    Args:
        rows: the ids of each text.
        step: L is a multiple of it, or ``most`` where that is less.
        most: the largest L; None: there is none. No row may be longer.
        pad: the id that fills a row.
    """
    longest = max(map(len, rows), default=1)
    length = -(-longest // step) * step
    tokens_BL = torch.full((len(rows), length if most is None else min(most, length)), pad, dtype=torch.long)
    for row_L, ids in zip(tokens_BL, rows, strict=True):
        row_L[: len(ids)] = torch.tensor(ids)
    return tokens_BL
