from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from vlbench.data.weak import search
from vlbench.data.weak.search import has_faiss, in_blocks, nearest, normalised, pair_scores

BACKENDS = ["numpy", pytest.param("faiss", marks=pytest.mark.skipif(not has_faiss(), reason="faiss is not installed"))]


def brute(queries, pool, k, metric):
    """Places and scores in float64, by score and then by position."""
    q, p = queries.astype(np.float64), pool.astype(np.float64)
    scores = (q[:, None] * p).sum(-1) if metric == "cosine" else -((q[:, None] - p) ** 2).sum(-1)
    places = np.array([sorted(range(len(p)), key=lambda j: (-row[j], j))[:k] for row in scores])
    return places, np.take_along_axis(scores, places, axis=1)


def vectors(seed, n, width=24):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32) * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("size", [7, 64, 1000])
def test_nearest_is_the_brute_force_answer_in_any_block_size(backend, metric, size):
    queries, pool = vectors(0, 40), vectors(1, 300)
    if metric == "cosine":
        queries, pool = normalised(queries), normalised(pool)
    top = nearest(queries, in_blocks(pool, size), 5, metric=metric, backend=backend)
    places, scores = brute(queries, pool, 5, metric)
    assert np.array_equal(top.places_QK, places)
    np.testing.assert_allclose(top.scores_QK, scores, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("size", [50, 110, 1000])
def test_ties_go_to_the_earlier_sentence(backend, metric, size):
    """Five vectors, each forty times: all of the best forty tie, more than any margin of candidates holds."""
    distinct = normalised(vectors(2, 5))
    pool = distinct[np.random.default_rng(3).permutation(np.repeat(np.arange(5), 40))]
    queries = normalised(vectors(4, 9))
    top = nearest(queries, in_blocks(pool, size), 6, metric=metric, backend=backend)
    assert np.array_equal(top.places_QK, brute(queries, pool, 6, metric)[0])
    assert (np.diff(top.places_QK, axis=1) > 0).all()
    assert (np.ptp(top.scores_QK, axis=1) == 0).all()


def test_near_ties_below_float32_are_ranked_by_their_exact_scores():
    """Candidates that differ by less than float32 rounds are ranked in float64, whatever the fast pass thought."""
    rng = np.random.default_rng(5)
    base = normalised(rng.normal(size=(1, 64)).astype(np.float32))
    pool = base + rng.normal(size=(400, 64)).astype(np.float32) * 1e-7
    top = nearest(base, in_blocks(pool, 130), 25, backend="numpy")
    assert np.array_equal(top.places_QK, brute(base, pool, 25, "cosine")[0])


def test_l2_and_cosine_disagree_about_length_and_agree_on_the_sphere():
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    pool = np.array([[10.0, 0.0], [0.9, 0.3]], dtype=np.float32)
    assert nearest(query, in_blocks(pool, 9), 2, metric="l2").places_QK.tolist() == [[1, 0]]
    assert nearest(normalised(query), in_blocks(normalised(pool), 9), 2).places_QK.tolist() == [[0, 1]]
    queries, sphere = normalised(vectors(6, 20)), normalised(vectors(7, 100))
    by = [nearest(queries, in_blocks(sphere, 30), 10, metric=metric).places_QK for metric in ("cosine", "l2")]
    assert np.array_equal(*by)


def test_a_pool_smaller_than_k_leaves_places_empty():
    top = nearest(normalised(vectors(0, 3)), in_blocks(normalised(vectors(1, 2)), 9), 4)
    assert (top.places_QK[:, :2] >= 0).all()
    assert (top.places_QK[:, 2:] == -1).all()
    assert (top.scores_QK[:, 2:] == -np.inf).all()


def test_sparse_search_finds_only_what_shares_a_word():
    rng = np.random.default_rng(8)
    pool = normalised(scipy.sparse.random(200, 60, density=0.05, random_state=1, format="csr"))
    asked = np.where(rng.random((12, 60)) < 0.04, 1.0, 0.0)
    asked[3] = 0  # a query of words that the pool does not have finds nothing
    queries = normalised(scipy.sparse.csr_matrix(asked))
    for size in (13, 500):
        top = nearest(queries, in_blocks(pool, size), 7)
        scores = (queries @ pool.T).toarray()
        for row in range(12):
            expected = [j for j in sorted(range(200), key=lambda j: (-scores[row, j], j))[:7] if scores[row, j] > 0]
            assert [place for place in top.places_QK[row] if place >= 0] == expected
    assert (top.places_QK[3] == -1).all()


def test_normalised_rows_have_length_one_and_zeros_stay():
    rows = normalised(np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-7)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_pair_scores_are_the_diagonal(metric):
    a, b = vectors(0, 30), vectors(1, 30)
    full = a.astype(float) @ b.T.astype(float) if metric == "cosine" else -((a[:, None].astype(float) - b) ** 2).sum(-1)
    np.testing.assert_allclose(pair_scores(a, b, metric), np.diag(full), rtol=1e-12)
    if metric == "cosine":
        sparse = pair_scores(scipy.sparse.csr_matrix(a), scipy.sparse.csr_matrix(b), metric)
        np.testing.assert_allclose(sparse, np.diag(full), rtol=1e-5)


def test_exact_scores_come_in_chunks(monkeypatch):
    a, b = vectors(0, 30), vectors(1, 30)
    whole = pair_scores(a, b, "cosine")
    monkeypatch.setattr(search, "_PAIRS", 7)
    assert np.array_equal(pair_scores(a, b, "cosine"), whole)
