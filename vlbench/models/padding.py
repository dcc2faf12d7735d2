"""Token ids of several texts as one tensor.

Rows are as long as the longest text, rounded up: so that a batch has one of few lengths, and a text's embedding is the
same whatever stands beside it (why that needs rounding: ``text.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LENGTH_STEP = 16
"""Tokens of a row come in multiples of it."""


def runs_whole(rows_BL: torch.Tensor, *, asked: bool) -> bool:
    """Whether a causal or masked tower runs these rows (B, L, anything) together, or may run the short ones apart.

    On a CPU rows that end within the first ``LENGTH_STEP`` tokens are worth a call of their own: most captions are
    short, one long caption would make them all long, and a row's output is the same to the bit. On a GPU, or compiled,
    the padding costs less than shapes that change from batch to batch.

    Args:
        rows_BL: token ids, or what was made of them.
        asked: whether one call is asked for, whatever the texts (``train/sharding``).
    """
    return asked or rows_BL.shape[1] <= LENGTH_STEP or rows_BL.device.type != "cpu" or torch.compiler.is_compiling()


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
