"""Zero-shot classification by a prompt ensemble (the protocol of CLIP, arXiv 2103.00020).

Every class name goes into every template; the texts' embeddings are normalised, averaged over templates and normalised
again; an image belongs to the class whose mean is nearest by cosine. Averaging logits instead, or leaving out a
normalisation, is another method with other numbers.

Shape suffixes: N images, C classes, T templates, E joint width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from vlbench.adapters.common.classification import (
    chance_of,
    classification_outcomes,
    estimates,
    labels_of,
    prediction_rows,
    unit,
)
from vlbench.adapters.common.prompts import class_embeddings, templates_of
from vlbench.core.config import Config as BaseConfig
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows


class Config(BaseConfig):
    """Settings of zero-shot classification. The prompts belong to the task card."""

    block: int = Field(default=4096, ge=1, description="images scored at once; bounds memory, changes no number")


class ZeroShot:
    """The adapter. The data give class names and templates, the model a joint image-text space."""

    name: ClassVar[str] = "zeroshot"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "acc1"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "label"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"embed", "text"})
    splits: ClassVar[tuple[str, ...]] = ("test",)

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, label, pred, rank, correct``; ``rank`` is the right class's place among all classes.

        Two classes have a ``score`` too.
        """
        source = data.split("test")
        labels_N = labels_of(source)
        classes, templates = list(data.classnames), templates_of(data)
        class_CE = class_embeddings(encoder, classes, templates)
        features = encoder.images(source)

        def scores() -> Iterator[np.ndarray]:
            for start in range(0, len(labels_N), config.block):
                yield unit(features.embed_NE[start : start + config.block]) @ class_CE.T

        meta = {
            "classes": classes,
            "templates": len(templates),
            "chance": chance_of(len(classes), 1 / len(classes), top5=True),
        }
        return prediction_rows(features, labels_N, scores(), meta=meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``acc1``, ``acc5`` where there are more than five classes, ``mean_per_class_recall``; ``roc_auc`` of two."""
        return classification_outcomes(rows, top5=True)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


ADAPTER = ZeroShot()
