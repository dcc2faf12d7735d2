from __future__ import annotations

import numpy as np
import pytest

from vlbench.adapters.common import exact_ranks
from vlbench.adapters.common.classification import unit
from vlbench.adapters.common.exact_ranks import TIE, error_bound, ranks
from vlbench.core.errors import UserError


def oracle(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> tuple[list[int], list[int]]:
    """All scores in float64 at once."""
    score_NM = unit(images) @ unit(texts).T
    own_M = score_NM[owner, np.arange(len(texts))]
    mine_NM = owner[None, :] == np.arange(len(images))[:, None]
    best_N = np.where(mine_NM, score_NM, -np.inf).max(axis=1)
    to_image = 1 + ((score_NM >= own_M - TIE) & ~mine_NM).sum(axis=0)
    to_text = 1 + ((score_NM >= best_N[:, None] - TIE) & ~mine_NM).sum(axis=1)
    return to_image.tolist(), to_text.tolist()


def _embeddings(kind: str, n: int = 150, captions: int = 3, width: int = 24) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    owner = np.concatenate([np.arange(n), rng.integers(0, n, n * (captions - 1))])
    images = rng.standard_normal((n, width))
    texts = images[owner] + rng.standard_normal((len(owner), width))
    if kind == "unrelated":
        texts = rng.standard_normal(texts.shape)
    elif kind == "close":  # thousands of cosines within float32's error of one another, and not equal
        images = 1 + 1e-4 * images
        texts = 1 + 1e-4 * texts
    elif kind == "duplicated":
        images, texts = images[np.arange(n) % 7], np.repeat(texts[:9], n * captions // 9 + 1, axis=0)[: len(owner)]
    elif kind == "scattered copies":  # few enough that pairs are scored one by one
        images[[3, 40, 90]] = images[7]
        texts[[5, 100, 300]] = texts[7]
    elif kind == "constant":
        images, texts = np.full_like(images, 0.3), np.full_like(texts, 0.7)
    elif kind == "zero":
        images = np.zeros_like(images)
    elif kind == "of any length":
        images, texts = images * 1e18, texts * 1e-18
    return images.astype(np.float32), texts.astype(np.float32), owner


KINDS = (
    "related",
    "unrelated",
    "close",
    "duplicated",
    "scattered copies",
    "constant",
    "zero",
    "of any length",
)


@pytest.mark.parametrize("block_bytes", [8 * 70 * 70, 1 << 26])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_those_of_float64(kind: str, block_bytes: int) -> None:
    images, texts, owner = _embeddings(kind)
    to_image, to_text = ranks(images, texts, owner_M=owner, block_bytes=block_bytes)
    assert (to_image.tolist(), to_text.tolist()) == oracle(images, texts, owner)


@pytest.mark.parametrize("kind", ["related", "unrelated", "scattered copies"])
def test_pairs_scored_one_by_one_and_whole_tiles_agree(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    images, texts, owner = _embeddings(kind)
    expected = oracle(images, texts, owner)
    for crowded in (0.0, 1.0):  # 0: every tile with a near pair in float64; 1: never
        for sparse in (0.0, 1.0):
            monkeypatch.setattr(exact_ranks, "CROWDED", crowded)
            monkeypatch.setattr(exact_ranks, "SPARSE", sparse)
            to_image, to_text = ranks(images, texts, owner_M=owner)
            assert (to_image.tolist(), to_text.tolist()) == expected


def test_order_of_images_and_captions_does_not_matter() -> None:
    images, texts, owner = _embeddings("scattered copies")
    to_image, to_text = ranks(images, texts, owner_M=owner, block_bytes=8 * 64 * 64)
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(len(images)), rng.permutation(len(texts))
    moved = ranks(images[rows], texts[columns], owner_M=np.argsort(rows)[owner[columns]], block_bytes=8 * 64 * 64)
    assert (moved[0] == to_image[columns]).all()
    assert (moved[1] == to_text[rows]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["image", "text"])
def test_embeddings_that_are_not_finite_are_refused(side: str, value: float) -> None:
    images, texts, owner = _embeddings("related")
    (images if side == "image" else texts)[11, 3] = value
    with pytest.raises(UserError, match=rf"{side} embeddings are not finite \(first: number 11\)"):
        ranks(images, texts, owner_M=owner)


def test_the_bound_holds_and_is_of_float32s_size() -> None:
    import torch

    assert 512 * 2.0**-24 < error_bound(512) < 1.02 * 518 * 2.0**-24
    rng = np.random.default_rng(2)
    for width in (1, 8, 512):
        a, b = (unit(np.abs(rng.standard_normal((200, width)))) for _ in range(2))
        float32 = torch.from_numpy(a.astype(np.float32)) @ torch.from_numpy(b.astype(np.float32)).T
        assert np.abs(float32.numpy() - a @ b.T).max() <= error_bound(width)


def test_the_callers_matmul_precision_comes_back() -> None:
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        images, texts, owner = _embeddings("unrelated", width=200)
        to_image, to_text = ranks(images, texts, owner_M=owner)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (to_image.tolist(), to_text.tolist()) == oracle(images, texts, owner)
