"""Zero-shot classification of images with several labels: every class ranks the images by cosine with its prompts.

The class embeddings are those of ``zeroshot``. ELEVATER (arXiv 2204.08790) takes the softmax over classes of 100 times
the cosine before it ranks the images of each class: a class then stands lower in an image that shows another class
too, and the numbers are others. ``softmax`` does the same, for the sake of the numbers published with it.

Shape suffixes: N images, C classes, E joint width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from vlbench.adapters.common.classification import estimates, unit
from vlbench.adapters.common.multilabel import multilabel_outcomes, multilabel_rows, multilabels_of
from vlbench.adapters.common.prompts import class_embeddings, templates_of
from vlbench.core.config import Config as BaseConfig
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows

SCALE = 100.0
"""CLIP's logit scale, by which ELEVATER multiplies cosines."""


class Config(BaseConfig):
    """Settings of zero-shot classification. The prompts belong to the task card."""

    softmax: bool = Field(
        default=False, description="rank by the softmax over classes of 100 x cosine (ELEVATER), not by the cosine"
    )


class ZeroShotMultilabel:
    """The adapter. The data give class names and templates, the model a joint image-text space."""

    name: ClassVar[str] = "zeroshot_multilabel"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "map11"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "labels"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"embed", "text"})
    splits: ClassVar[tuple[str, ...]] = ("test",)

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, labels, scores``."""
        source = data.split("test")
        labels_NC = multilabels_of(source)
        classes, templates = list(data.classnames), templates_of(data)
        if config.softmax and len(classes) < 2:
            raise UserError(f"{data.spec}: a softmax over one class says nothing; leave the protocol's softmax out")
        class_CE = class_embeddings(encoder, classes, templates)
        features = encoder.images(source)
        scores_NC = unit(features.embed_NE) @ class_CE.T
        if config.softmax:
            scores_NC = _log_odds(SCALE * scores_NC)
        return multilabel_rows(features, labels_NC, scores_NC, meta={"classes": classes, "templates": len(templates)})

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``map11`` and ``map``."""
        return multilabel_outcomes(rows)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def _log_odds(logits_NC: np.ndarray) -> np.ndarray:
    """Log-odds of the softmax: they rank as it does, and what is close to 0 or to 1 stays apart."""
    others_NC = [np.logaddexp.reduce(np.delete(logits_NC, c, axis=1), axis=1) for c in range(logits_NC.shape[1])]
    return logits_NC - np.stack(others_NC, axis=1)


ADAPTER = ZeroShotMultilabel()
