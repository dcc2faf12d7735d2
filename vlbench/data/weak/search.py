"""Exact nearest sentences: every query against every sentence, in blocks, so that memory does not grow with the pool.

Ranks are by score, then by position in the pool, and are the same whatever computes them: a fast pass (FAISS where it
is installed, else numpy) picks candidates with a margin for the rounding of float32, and the candidates' scores are
made again in float64, each from its two vectors alone. So neither the block size nor FAISS's order of additions moves
a tie.

Q queries, B sentences of a block, D width of the embedding.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np

Metric: TypeAlias = Literal["cosine", "l2"]
"""How vectors are compared. ``cosine``: the paper. ``l2``: the released code, whose FAISS ``IndexFlatL2`` holds vectors
that are not normalised: of two sentences in the same direction it prefers the one whose length is the query's, so
its ranks are not the paper's unless the encoder normalises (``minilm`` does) [H:Caption_Retrieval_BertEmbedding*.py]"""

Backend: TypeAlias = Literal["auto", "faiss", "numpy"]

Blocks: TypeAlias = Callable[[], Iterator[tuple[int, Any]]]
"""The pool, to be gone through from its start at each call: (position of the first sentence, ``sentences_BD``)."""

_MARGIN = 16
_PAIRS = 65_536


class TopK:
    """The best sentences of each query so far.

    Args:
        n: queries.
        k: sentences kept of each.

    Attributes:
        scores_QK: float64, best first, -inf where there are fewer.
        places_QK: positions in the pool, -1 where there are fewer.
    """

    def __init__(self, n: int, k: int) -> None:
        self.scores_QK = np.full((n, k), -np.inf)
        self.places_QK = np.full((n, k), -1, dtype=np.int64)

    @property
    def floor_Q(self) -> np.ndarray:
        """What a sentence must reach to enter."""
        floor_Q: np.ndarray = self.scores_QK[:, -1]
        return floor_Q

    def add(self, rows: np.ndarray, places: np.ndarray, scores: np.ndarray) -> None:
        """Offer sentences: query, position in the pool, exact score. No pair may be offered twice."""
        k = self.scores_QK.shape[1]
        held = self.places_QK >= 0
        held_rows, held_columns = np.nonzero(held)
        rows = np.concatenate([held_rows, rows])
        places = np.concatenate([self.places_QK[held_rows, held_columns], places])
        scores = np.concatenate([self.scores_QK[held_rows, held_columns], scores])
        order = np.lexsort((places, -scores, rows))
        rows, places, scores = rows[order], places[order], scores[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        kept = rank < k
        self.scores_QK.fill(-np.inf)
        self.places_QK.fill(-1)
        self.scores_QK[rows[kept], rank[kept]] = scores[kept]
        self.places_QK[rows[kept], rank[kept]] = places[kept]


def nearest(
    queries_QD: Any,
    blocks: Blocks,
    k: int,
    *,
    metric: Metric = "cosine",
    backend: Backend = "auto",
) -> TopK:
    """The ``k`` best sentences of each query.

    Args:
        queries_QD: float32, or CSR. For ``cosine`` normalised, as the sentences are (``normalised``).
        blocks: the pool.
        k: how many.
        metric: the score is the inner product, or minus the squared distance.
        backend: what picks the candidates; the answer is the same.

    Of CSR vectors only sentences that share a word with the query are found, so there may be fewer than ``k``.
    """
    top = TopK(queries_QD.shape[0], k)
    search = _sparse if not isinstance(queries_QD, np.ndarray) else _dense
    fast = backend == "faiss" or (backend == "auto" and has_faiss())
    for first, sentences_BD in blocks():
        search(top, queries_QD, sentences_BD, first, metric, fast)
    return top


def normalised(vectors_ND: Any) -> Any:
    """Rows of unit length, each computed from itself alone; rows of zeros stay."""
    if isinstance(vectors_ND, np.ndarray):
        exact = vectors_ND.astype(np.float64)
        norms_N = np.sqrt((exact * exact).sum(axis=1, keepdims=True))
        return (exact / np.where(norms_N > 0, norms_N, 1.0)).astype(np.float32)
    from sklearn.preprocessing import normalize

    return normalize(vectors_ND)


def has_faiss() -> bool:
    """Whether FAISS is installed."""
    return importlib.util.find_spec("faiss") is not None


def pair_scores(queries_ND: Any, sentences_ND: Any, metric: Metric) -> np.ndarray:
    """The score of each query with the sentence in the same row, in float64."""
    if isinstance(queries_ND, np.ndarray):
        everyone = np.arange(len(queries_ND))
        return exact_scores(queries_ND, sentences_ND, everyone, everyone, metric)
    assert metric == "cosine", "sparse vectors are compared by cosine"
    return np.asarray(queries_ND.multiply(sentences_ND).sum(axis=1), dtype=np.float64).reshape(-1)


def exact_scores(
    queries_QD: np.ndarray, sentences_BD: np.ndarray, rows: Any, columns: Any, metric: Metric
) -> np.ndarray:
    """Scores of single pairs in float64: a function of the two vectors alone."""
    scores = np.empty(len(rows))
    for start in range(0, len(rows), _PAIRS):
        part = slice(start, start + _PAIRS)
        a = queries_QD[rows[part]].astype(np.float64)
        b = sentences_BD[columns[part]].astype(np.float64)
        scores[part] = (a * b).sum(axis=1) if metric == "cosine" else -((a - b) ** 2).sum(axis=1)
    return scores


def _sparse(top: TopK, queries_QD: Any, sentences_BD: Any, first: int, metric: Metric, fast: bool) -> None:
    assert metric == "cosine", "sparse vectors are compared by cosine"
    # Each entry is summed over the words of its own pair: exact already, and alike in any block.
    scores_QB = (queries_QD @ sentences_BD.T).toarray()
    rows, columns = _above(scores_QB, top, 0.0)
    found = scores_QB[rows, columns]
    shared = found > 0
    top.add(rows[shared], columns[shared] + first, found[shared])


def _dense(top: TopK, queries_QD: np.ndarray, sentences_BD: Any, first: int, metric: Metric, fast: bool) -> None:
    sentences_BD = np.ascontiguousarray(sentences_BD)
    margin = _rounding(queries_QD, sentences_BD, metric)
    k = top.scores_QK.shape[1]
    everyone = np.arange(len(queries_QD))
    if fast and len(sentences_BD) > k + _MARGIN:
        rows, columns, everyone = _faiss(queries_QD, sentences_BD, k, metric, margin)
        top.add(rows, columns + first, exact_scores(queries_QD, sentences_BD, rows, columns, metric))
    if len(everyone):
        part_QD = queries_QD[everyone]
        scores_QB = part_QD @ sentences_BD.T
        if metric == "l2":
            scores_QB *= 2
            scores_QB -= (sentences_BD**2).sum(axis=1)
            scores_QB -= (part_QD**2).sum(axis=1)[:, None]
        rows, columns = _above(scores_QB, top, margin, everyone)
        rows = everyone[rows]
        top.add(rows, columns + first, exact_scores(queries_QD, sentences_BD, rows, columns, metric))


def _rounding(queries_QD: np.ndarray, sentences_BD: np.ndarray, metric: Metric) -> float:
    """Twice what float32 may lose in one score."""
    a, b = (float(np.sqrt((v**2).sum(axis=1)).max(initial=0.0)) for v in (queries_QD, sentences_BD))
    scale = a * b if metric == "cosine" else (a + b) ** 2
    return float(2 * np.finfo(np.float32).eps * queries_QD.shape[1] * max(scale, 1e-12))


def _above(scores_QB: np.ndarray, top: TopK, margin: float, who: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every score that may be among the best k, of this block or of all so far."""
    k = min(top.scores_QK.shape[1], scores_QB.shape[1])
    if not k:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    best_Q = np.partition(scores_QB, scores_QB.shape[1] - k, axis=1)[:, -k]
    floor_Q = np.maximum(best_Q, top.floor_Q[who]) - margin
    rows, columns = np.nonzero(scores_QB >= floor_Q[:, None])
    return rows, columns


def _faiss(
    queries_QD: np.ndarray, sentences_BD: np.ndarray, k: int, metric: Metric, margin: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates by FAISS, and the queries whose k-th place is too crowded to be sure that none was cut off."""
    faiss: Any = importlib.import_module("faiss")
    index = (faiss.IndexFlatIP if metric == "cosine" else faiss.IndexFlatL2)(queries_QD.shape[1])
    index.add(sentences_BD)
    found_QM, columns_QM = index.search(np.ascontiguousarray(queries_QD), k + _MARGIN)
    scores_QM = found_QM if metric == "cosine" else -found_QM
    sure_Q = scores_QM[:, -1] < scores_QM[:, k - 1] - margin
    sure = np.flatnonzero(sure_Q)
    rows = np.repeat(sure, columns_QM.shape[1])
    return rows, columns_QM[sure].reshape(-1).astype(np.int64), np.flatnonzero(~sure_Q)


def in_blocks(vectors: Any, size: int) -> Blocks:
    """``vectors_ND`` as ``nearest`` takes a pool, ``size`` rows at a time."""

    def blocks() -> Iterator[tuple[int, Any]]:
        for first in range(0, vectors.shape[0], size):
            yield first, vectors[first : first + size]

    return blocks
