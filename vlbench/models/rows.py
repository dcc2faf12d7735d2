"""Batches in whole blocks of rows: what an image or a text gives does not depend on how many stand beside it.

A matrix product of one or five rows is summed in another order than one of 64, so the last bit of an embedding would
change with ``--batch-size`` (CLIP's projection has one row an image), and with it now and then a rank. Batches are
therefore filled up to a multiple of eight rows by repeating the last, and what the repeated rows gave is dropped. Tried
on one and two threads of a CPU with sizes from 1 to 140: filled, all give the same bits.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vlbench.core.types import Features

ROW_STEP = 8


def filled(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` (B, anything) with its last row repeated until B is a multiple of ``ROW_STEP``."""
    missing = -len(rows) % ROW_STEP
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def filled_list(rows: Sequence[Any]) -> list[Any]:
    """``filled`` for texts and the like."""
    return [*rows, *rows[-1:] * (-len(rows) % ROW_STEP)]


def first_rows(features: Features, count: int) -> Features:
    """The features of the first ``count`` images."""

    def cut(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else part[:count]

    maps = None if features.maps is None else {stride: part[:count] for stride, part in features.maps.items()}
    return replace(
        features,
        pooled_BD=features.pooled_BD[:count],
        embed_BE=cut(features.embed_BE),
        tokens_BND=cut(features.tokens_BND),
        maps=maps,
    )
