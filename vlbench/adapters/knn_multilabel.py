"""k nearest neighbours on images with several labels: a class's score is its share of the neighbours' weight.

Neighbours, weights and ties are those of ``knn``. A neighbour whose label of a class is -1 has no vote on that class;
where nobody has one, the score is that class's share among the training images.

Shape suffixes: M training images, B block of test images, C classes, K neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from vlbench.adapters.common.classification import estimates, overlap_note, same_classes
from vlbench.adapters.common.multilabel import multilabel_outcomes, multilabel_rows, multilabels_of
from vlbench.adapters.common.neighbours import neighbour_blocks
from vlbench.core.config import Config as BaseConfig
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows

if TYPE_CHECKING:
    import torch


class Config(BaseConfig):
    """Settings of the vote."""

    k: int = Field(default=20, ge=1, description="neighbours that vote; all, where there are fewer (DINO's best k: 20)")
    temperature: float = Field(default=0.07, gt=0, description="of the vote's weights (DINO, Wu et al.: 0.07)")
    block_bytes: int = Field(default=1 << 26, ge=1, description="similarities held at once; changes no number")


class KNNMultilabel:
    """The adapter. Reads train and test; a validation split is left alone, since nothing is chosen."""

    name: ClassVar[str] = "knn_multilabel"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "map11"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "labels"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, labels, scores``."""
        train, test = data.split("train"), data.split("test")
        same_classes([train, test])
        train_labels_MC, labels_NC = multilabels_of(train), multilabels_of(test)
        known, found = encoder.images(train), encoder.images(test)
        scores_NC = vote_shares(
            found.pooled_ND, known.pooled_ND, labels_MC=train_labels_MC, config=config, device=encoder.device
        )
        notes = overlap_note(known.digests, found.digests)
        if config.k > len(train_labels_MC):
            notes.append(f"k = {config.k} is more than the {len(train_labels_MC)} training images: all of them vote")
        meta = {"classes": list(test.classes), "train_images": len(train_labels_MC), "notes": notes}
        return multilabel_rows(found, labels_NC, scores_NC, meta=meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``map11`` and ``map``."""
        return multilabel_outcomes(rows)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def vote_shares(
    test_ND: np.ndarray, train_MD: np.ndarray, *, labels_MC: np.ndarray, config: Config, device: str
) -> np.ndarray:
    """Share of every class in the weight of the neighbours that have a label of it: ``scores_NC``, float64."""
    import torch

    present_MC, known_MC = (torch.from_numpy(of_MC).to(device) for of_MC in (labels_MC == 1, labels_MC >= 0))
    shares_C = (labels_MC == 1).sum(axis=0) / np.maximum((labels_MC >= 0).sum(axis=0), 1)

    def tally(weights_BK: torch.Tensor, index_BK: torch.Tensor) -> torch.Tensor:
        sums = [torch.einsum("bk,bkc->bc", weights_BK, of_MC[index_BK].double()) for of_MC in (present_MC, known_MC)]
        return torch.cat(sums, dim=1)

    settings = {"k": config.k, "temperature": config.temperature, "block_bytes": config.block_bytes}
    blocks = neighbour_blocks(test_ND, train_MD, tally, device=device, **settings)
    present_NC, known_NC = np.split(np.concatenate([votes.cpu().numpy() for votes in blocks]), 2, axis=1)
    return np.where(known_NC > 0, present_NC / np.where(known_NC > 0, known_NC, 1.0), shares_C)


ADAPTER = KNNMultilabel()
