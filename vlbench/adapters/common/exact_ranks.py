"""Ranks of the right candidates in both directions of retrieval: float64's answer at the price of float32.

A score made in float32 is off by no more than ``error_bound(width)``. A candidate whose float32 score is farther than
that from the score it must reach is decided; the few that are nearer are scored again in float64. So every rank is
the one that float64 gives, and the work is a float32 matrix product, tile by tile: memory is the embeddings, their
unit-length copies and one tile. Where a tile has many near candidates (constant features, copies of one image) it is
made in float64 as a whole, which is slower and no larger.

Shape suffixes: N images, M captions, B images and K captions of a tile, E joint width, P pairs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlbench.adapters.common.classification import unit
from vlbench.core.errors import UserError

if TYPE_CHECKING:  # never at run time: adapters must load without torch
    import torch

TIE = 1e-9
"""Cosines (in float64) closer than this are tied: sums in another order differ in the fifteenth digit."""
CPU_TILE = 1 << 20
"""Scores in a tile on a CPU: they stay in its cache between the product and the comparisons."""
CROWDED = 1 / 64
"""Share of a tile's scores that may be made again one by one; above it the whole tile in float64 is quicker."""
SPARSE = 1 / 16
"""Share of a tile's scores up to which candidates are listed rather than counted."""
_ROWS = 8192


def ranks(
    image_NE: np.ndarray, text_ME: np.ndarray, *, owner_M: np.ndarray, block_bytes: int = 1 << 26, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Pessimistic rank, from 1, of the best right candidate of every query.

    Args:
        image_NE: image embeddings, of any length.
        text_ME: caption embeddings.
        owner_M: the image each caption belongs to; every image owns at least one.
        block_bytes: how many bytes of scores may exist at once.
        device: where the products are made; no number depends on it.

    Returns:
        ``text_to_image_M`` and ``image_to_text_N``, int64.

    Raises:
        UserError: where an embedding is not finite.
    """
    images, texts = _side(image_NE, "image", device), _side(text_ME, "text", device)
    n_images, n_texts = len(images), len(texts)
    own_M = _pair_scores(images, texts, owner_M, np.arange(n_texts))
    best_own_N = np.full(n_images, -np.inf)
    np.maximum.at(best_own_N, owner_M, own_M)
    ahead_of_image_M = np.zeros(n_texts, dtype=np.int64)
    ahead_of_text_N = np.zeros(n_images, dtype=np.int64)
    scores = max(1, min(block_bytes // 8, CPU_TILE) if device == "cpu" else block_bytes // 8)
    n_rows = min(n_images, math.isqrt(scores))
    n_columns = scores // n_rows
    with _full_float32():
        for row in range(0, n_images, n_rows):
            for column in range(0, n_texts, n_columns):
                rows = slice(row, min(row + n_rows, n_images))
                columns = slice(column, min(column + n_columns, n_texts))
                tile = _Tile(images, texts, rows, columns, owner_M[columns])
                by_column_K, by_row_B = tile.count(own_M[columns] - TIE, best_own_N[rows] - TIE)
                ahead_of_image_M[columns] += by_column_K
                ahead_of_text_N[rows] += by_row_B
    return 1 + ahead_of_image_M, 1 + ahead_of_text_N


def error_bound(width: int) -> float:
    """How far a float32 score of two unit vectors can be from the exact one, thresholds rounded to float32 included.

    With unit roundoff u and E terms, in whatever order they are added and with or without fused multiply-add, a
    computed inner product is off by at most ``E u / (1 - E u) * sum |a_e b_e|`` (Higham 2002, 3.5), and the sum is at
    most one. Rounding the two vectors to float32 adds ``2 u + u^2``, rounding the threshold ``2 u``, underflow less
    than the last term.
    """
    u = 2.0**-24
    return width * u / (1 - width * u) * (1 + u) ** 2 + 4 * u + u * u + 2.0**-100


@dataclass(frozen=True)
class _Side:
    """The embeddings of one side, as they came and as unit vectors in float32."""

    raw_XE: np.ndarray
    unit_XE: torch.Tensor

    def __len__(self) -> int:
        return len(self.raw_XE)


def _side(raw_XE: np.ndarray, what: str, device: str) -> _Side:
    import torch

    unit_XE = torch.empty(raw_XE.shape, dtype=torch.float32, device=device)
    for start in range(0, len(raw_XE), _ROWS):
        rows = slice(start, start + _ROWS)
        finite_R = np.isfinite(raw_XE[rows]).all(axis=1)
        if not finite_R.all():
            first = start + int(finite_R.argmin())
            raise UserError(f"{what} embeddings are not finite (first: number {first}); check the weights")
        unit_XE[rows] = torch.from_numpy(unit(raw_XE[rows]).astype(np.float32))
    return _Side(raw_XE, unit_XE)


def _pair_scores(images: _Side, texts: _Side, image_P: np.ndarray, text_P: np.ndarray) -> np.ndarray:
    """The cosine of each pair in float64, ``(P,)``."""
    found_P = np.empty(len(image_P))
    for start in range(0, len(image_P), _ROWS):
        pairs = slice(start, start + _ROWS)
        image_RE, text_RE = unit(images.raw_XE[image_P[pairs]]), unit(texts.raw_XE[text_P[pairs]])
        found_P[pairs] = np.einsum("re,re->r", text_RE, image_RE)
    return found_P


class _Tile:
    """The scores of some images with some captions."""

    def __init__(self, images: _Side, texts: _Side, rows: slice, columns: slice, owner_K: np.ndarray) -> None:
        self.images, self.texts, self.rows, self.columns = images, texts, rows, columns
        own_columns = np.flatnonzero((owner_K >= rows.start) & (owner_K < rows.stop))
        self.own = (owner_K[own_columns] - rows.start, own_columns)
        """Row and column of the right pairs: taken out, so that whatever is left and scores as well stands ahead."""

    def count(self, least_K: np.ndarray, least_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many wrong candidates score at least ``least_K`` in each column, and ``least_B`` in each row."""
        score_BK = self._without_own(self.images.unit_XE[self.rows] @ self.texts.unit_XE[self.columns].T)
        bound = error_bound(self.images.unit_XE.shape[1])
        sure_K, near_by_column = _compare(score_BK, least_K[None, :], bound, axis=0)
        sure_B, near_by_row = _compare(score_BK, least_B[:, None], bound, axis=1)
        if len(near_by_column) + len(near_by_row) > CROWDED * score_BK.numel():
            return self._count_exactly(least_K, least_B)
        rows, columns = self._near(near_by_column, least_K[None, :])
        sure_K += np.bincount(columns, minlength=len(sure_K))
        rows, columns = self._near(near_by_row, least_B[:, None])
        sure_B += np.bincount(rows, minlength=len(sure_B))
        return sure_K, sure_B

    def _near(self, flat_P: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of those of the near pairs that do reach ``least``, by their score in float64."""
        n_columns = self.columns.stop - self.columns.start
        row_P, column_P = np.divmod(flat_P, n_columns)
        score_P = _pair_scores(self.images, self.texts, row_P + self.rows.start, column_P + self.columns.start)
        least_P = np.broadcast_to(least, (self.rows.stop - self.rows.start, n_columns))[row_P, column_P]
        reached_P = score_P >= least_P
        return row_P[reached_P], column_P[reached_P]

    def _count_exactly(self, least_K: np.ndarray, least_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        def exact(side: _Side, rows: slice) -> torch.Tensor:
            return torch.from_numpy(unit(side.raw_XE[rows])).to(side.unit_XE.device)

        score_BK = self._without_own(exact(self.images, self.rows) @ exact(self.texts, self.columns).T)
        by_column_K = (score_BK >= _like(score_BK, least_K)[None, :]).sum(dim=0)
        by_row_B = (score_BK >= _like(score_BK, least_B)[:, None]).sum(dim=1)
        return by_column_K.cpu().numpy(), by_row_B.cpu().numpy()

    def _without_own(self, score_BK: torch.Tensor) -> torch.Tensor:
        score_BK[self.own] = -math.inf
        return score_BK


def _compare(score_BK: torch.Tensor, least: np.ndarray, bound: float, *, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """How many scores along ``axis`` surely reach ``least``, and which (flat positions) are too near to say."""
    reach_BK = score_BK >= _like(score_BK, least - bound)
    surely = _like(score_BK, least + bound)
    if _total(reach_BK) > SPARSE * score_BK.numel():
        sure_BK = score_BK >= surely
        return sure_BK.sum(dim=axis).cpu().numpy(), _positions(reach_BK & ~sure_BK)
    flat_P = _positions(reach_BK)
    place_P = flat_P % score_BK.shape[1] if axis == 0 else flat_P // score_BK.shape[1]
    score_P = score_BK.flatten()[flat_P].cpu().numpy()
    is_sure_P = score_P >= surely.cpu().numpy().ravel()[place_P]
    return np.bincount(place_P[is_sure_P], minlength=score_BK.shape[1 - axis]), flat_P[~is_sure_P]


def _like(score_BK: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(values).to(score_BK.device, score_BK.dtype)


# numpy counts and lists what is true several times faster than torch does on a CPU.


def _total(mask_BK: torch.Tensor) -> int:
    return np.count_nonzero(mask_BK.numpy()) if mask_BK.device.type == "cpu" else int(mask_BK.sum())


def _positions(mask_BK: torch.Tensor) -> np.ndarray:
    if mask_BK.device.type == "cpu":
        return np.flatnonzero(mask_BK.numpy())
    return mask_BK.flatten().nonzero()[:, 0].cpu().numpy()


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products: the error bound is float32's."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
