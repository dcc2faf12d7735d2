"""k nearest neighbours with temperature-weighted votes (Wu et al. 2018, arXiv 1805.01978; DINO, arXiv 2104.14294, 4.1).

Features are compared by cosine; each of the ``k`` nearest training images votes for its class with
``exp(similarity / temperature)``. Nothing is fitted and nothing chosen.

Training images that tie for the last of the k places share what places are left: the vote is the mean over every
way of choosing among them, so neither the order of the images nor that of the labels matters. Classes that then tie
are resolved by a hash of the image's id (``common.classification.decide``).

Shape suffixes: N test images, M training images, B block of test images, C classes, D pooled width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from vlbench.adapters.common.classification import (
    chance_of,
    classification_outcomes,
    estimates,
    labels_of,
    majority_guess,
    overlap_note,
    prediction_rows,
    same_classes,
    unit,
)
from vlbench.core.config import Config as BaseConfig
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows

if TYPE_CHECKING:
    import torch

TIE = 1e-6
"""Cosines closer than this are one: float32 sums of equal vectors differ in the seventh digit."""


class Config(BaseConfig):
    """Settings of the vote."""

    k: int = Field(default=20, ge=1, description="neighbours that vote; all, where there are fewer (DINO's best k: 20)")
    temperature: float = Field(default=0.07, gt=0, description="of the vote's weights (DINO, Wu et al.: 0.07)")
    block_bytes: int = Field(default=1 << 28, ge=1, description="similarities held at once; changes no number")


class KNN:
    """The adapter. Reads train and test; a validation split is left alone, since nothing is chosen."""

    name: ClassVar[str] = "knn"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "acc1"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "label"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, label, pred, rank, correct``."""
        train, test = data.split("train"), data.split("test")
        same_classes([train, test])
        train_labels_M, labels_N = labels_of(train), labels_of(test)
        known, features = encoder.images(train), encoder.images(test)
        classes = list(test.classes)
        votes = vote_blocks(
            features.pooled_ND,
            known.pooled_ND,
            labels_M=train_labels_M,
            n_classes=len(classes),
            config=config,
            device=encoder.device,
        )
        notes = overlap_note(known.digests, features.digests)
        if config.k > len(train_labels_M):
            notes.append(f"k = {config.k} is more than the {len(train_labels_M)} training images: all of them vote")
        meta = {
            "classes": classes,
            "train_images": len(train_labels_M),
            "chance": chance_of(len(classes), majority_guess(train_labels_M, labels_N), top5=False),
            "notes": notes,
        }
        return prediction_rows(features, labels_N, votes, meta=meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``acc1`` and ``mean_per_class_recall``. A top five would mostly rank classes that nobody voted for."""
        return classification_outcomes(rows, top5=False)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def vote_blocks(
    test_ND: np.ndarray, train_MD: np.ndarray, *, labels_M: np.ndarray, n_classes: int, config: Config, device: str
) -> Iterator[np.ndarray]:
    """Shares of the vote ``(B, C)`` for consecutive blocks of test images, each row summing to one."""
    import torch

    train = torch.from_numpy(unit(train_MD).astype(np.float32)).to(device)
    labels = torch.from_numpy(labels_M).to(device)
    block = max(1, config.block_bytes // (4 * len(labels_M)))
    for start in range(0, len(test_ND), block):
        test_BD = torch.from_numpy(unit(test_ND[start : start + block]).astype(np.float32)).to(device)
        yield _votes(test_BD @ train.T, labels, n_classes, config).cpu().numpy()


def _votes(similarity_BM: torch.Tensor, labels_M: torch.Tensor, n_classes: int, config: Config) -> torch.Tensor:
    """Shares of the vote ``(B, C)``, float64."""
    import torch

    n_train = similarity_BM.shape[1]
    k = min(config.k, n_train)
    # One more than k: a tie over the last place shows as the k-th and the (k+1)-th being equal.
    top_BK, index_BK = similarity_BM.topk(min(k + 1, n_train), dim=1)
    last_B1 = top_BK[:, k - 1 : k]
    weights_BK = torch.exp((top_BK[:, :k].double() - top_BK[:, :1].double()) / config.temperature)
    votes_BC = torch.zeros(len(top_BK), n_classes, dtype=torch.float64, device=top_BK.device)
    votes_BC.scatter_add_(1, labels_M[index_BK[:, :k]], weights_BK)
    if k < n_train:
        for row in torch.nonzero(last_B1[:, 0] - top_BK[:, k] <= TIE)[:, 0].tolist():
            weights_M = _shared_weights(similarity_BM[row], k, config)
            votes_BC[row] = torch.zeros_like(votes_BC[row]).scatter_add_(0, labels_M, weights_M)
    return votes_BC / votes_BC.sum(dim=1, keepdim=True)


def _shared_weights(similarity_M: torch.Tensor, k: int, config: Config) -> torch.Tensor:
    """Weight of every training image ``(M,)`` where several tie for the last of the k places."""
    last = similarity_M.topk(k).values[-1]
    above_M, tied_M = similarity_M > last + TIE, (similarity_M - last).abs() <= TIE
    places = (k - above_M.sum()).double() / tied_M.sum()
    share_M = above_M.double() + tied_M.double() * places
    return share_M * ((similarity_M - similarity_M.max()).double() / config.temperature).exp()


ADAPTER = KNN()
