"""The k nearest training images by cosine, with weights: what kNN on one label and on many share.

Training images that tie for the last of the k places share what places are left: the vote is the mean over every
way of choosing among them.

Shape suffixes: N test images, M training images, B block of test images, D pooled width, K neighbours, V votes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from vlbench.adapters.common.classification import unit

if TYPE_CHECKING:
    import torch

TIE = 1e-6
"""Cosines closer than this are one: float32 sums of equal vectors differ in the seventh digit."""


def neighbour_blocks(
    test_ND: np.ndarray,
    train_MD: np.ndarray,
    tally: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    k: int,
    temperature: float,
    block_bytes: int,
    device: str,
) -> Iterator[torch.Tensor]:
    """Votes ``(B, V)``, float64, for consecutive blocks of test images.

    Args:
        test_ND: features of the test images.
        train_MD: features of the training images.
        tally: weights ``(B, K)``, float64, and indices ``(B, K)`` of training images to votes ``(B, V)``.
        k: neighbours; all, where there are fewer.
        temperature: a neighbour's weight is ``exp(cosine / temperature)``, divided by that of the nearest.
        block_bytes: similarities held at once; changes no number.
        device: where the arithmetic happens.
    """
    import torch

    train = torch.from_numpy(unit(train_MD).astype(np.float32)).to(device)
    every_M = torch.arange(len(train), device=train.device)
    block = max(1, block_bytes // (4 * len(train)))
    for start in range(0, len(test_ND), block):
        test_BD = torch.from_numpy(unit(test_ND[start : start + block]).astype(np.float32)).to(device)
        similarity_BM = test_BD @ train.T
        # One more than k: a tie over the last place shows as the k-th and the (k+1)-th being equal.
        top_BK, index_BK = similarity_BM.topk(min(k + 1, len(train)), dim=1)
        top_BK, index_BK, beyond_BK = top_BK[:, :k], index_BK[:, :k], top_BK[:, k:]
        votes_BV = tally(torch.exp((top_BK.double() - top_BK[:, :1].double()) / temperature), index_BK)
        tied_B = (top_BK[:, -1:] - beyond_BK <= TIE).any(dim=1)
        for row in torch.nonzero(tied_B)[:, 0].tolist():
            weights_M = _shared_weights(similarity_BM[row], k, temperature)
            votes_BV[row] = tally(weights_M[None], every_M[None])[0]
        yield votes_BV


def _shared_weights(similarity_M: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """Weight of every training image ``(M,)`` where several tie for the last of the k places."""
    last = similarity_M.topk(k).values[-1]
    above_M, tied_M = similarity_M > last + TIE, (similarity_M - last).abs() <= TIE
    places = (k - above_M.sum()).double() / tied_M.sum()
    share_M = above_M.double() + tied_M.double() * places
    return share_M * ((similarity_M - similarity_M.max()).double() / temperature).exp()
