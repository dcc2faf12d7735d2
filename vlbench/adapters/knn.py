"""k nearest neighbours with temperature-weighted votes (Wu et al. 2018, arXiv 1805.01978; DINO, arXiv 2104.14294, 4.1).

Features are compared by cosine; each of the ``k`` nearest training images votes for its class with
``exp(similarity / temperature)``. Nothing is fitted and nothing chosen.

Neither the order of the images nor that of the labels matters: those that tie for the last place share it
(``common.neighbours``), classes that tie are resolved by a hash of the image's id (``common.classification.decide``).

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
)
from vlbench.adapters.common.neighbours import neighbour_blocks
from vlbench.core.config import Config as BaseConfig
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows

if TYPE_CHECKING:
    import torch


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
        """Rows ``id, image, label, pred, rank, correct``, and ``score`` where there are two classes."""
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
        n_answers = data.told_apart or len(classes)  # neighbours of other classes have no say
        classes, votes = classes[:n_answers], (votes_BC[:, :n_answers] for votes_BC in votes)
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
        """``acc1``, ``mean_per_class_recall``; ``roc_auc`` of two. A top five would rank classes without votes."""
        return classification_outcomes(rows, top5=False)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def vote_blocks(
    test_ND: np.ndarray, train_MD: np.ndarray, *, labels_M: np.ndarray, n_classes: int, config: Config, device: str
) -> Iterator[np.ndarray]:
    """Shares of the vote ``(B, C)`` for consecutive blocks of test images, each row summing to one."""
    import torch

    labels = torch.from_numpy(labels_M).to(device)

    def tally(weights_BK: torch.Tensor, index_BK: torch.Tensor) -> torch.Tensor:
        votes_BC = torch.zeros(len(weights_BK), n_classes, dtype=torch.float64, device=weights_BK.device)
        return votes_BC.scatter_add_(1, labels[index_BK], weights_BK)

    settings = {"k": config.k, "temperature": config.temperature, "block_bytes": config.block_bytes}
    for votes_BC in neighbour_blocks(test_ND, train_MD, tally, device=device, **settings):
        yield (votes_BC / votes_BC.sum(dim=1, keepdim=True)).cpu().numpy()


ADAPTER = KNN()
