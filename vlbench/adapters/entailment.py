"""Visual entailment: whether a sentence follows from an image, contradicts it, or neither (SNLI-VE, 1901.06706).

Image and sentence are read together; the pooled output goes to a classifier of three classes. The caption that
stands for the image in SNLI, the premise, is never read: with it the task would be one of text alone.

Reported is accuracy, over everything and by true class. The unit of sampling is the image.

N pairs of image and sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vlbench.adapters.common.classification import estimates, majority_guess
from vlbench.adapters.common.sentences import judge_sentences, read_sentences
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows
from vlbench.finetune.fusion.config import PAPER, TINY, FusionConfig
from vlbench.stats.entailment import entailment_outcomes


class Config(FusionConfig):
    """Settings of visual entailment."""

    PRESETS: ClassVar[Mapping[str, dict[str, Any]]] = {"tiny": TINY, "paper": PAPER["entailment"]}


class Entailment:
    """The adapter. Val chooses, test is reported."""

    name: ClassVar[str] = "entailment"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "accuracy"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "hypothesis"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    trains: ClassVar[bool] = True

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """One row a pair: ``id, image, image_id, hypothesis, label, pred, truth, prediction, p, right``."""
        judged = judge_sentences(encoder, data, config, lambda source: read_sentences(encoder, source, (source,)))
        by_class = {f"accuracy/{judged.classes[label]}": 1 / len(judged.classes) for label in np.unique(judged.label_N)}
        chance = {"accuracy": majority_guess(judged.learnt_N, judged.label_N), **by_class}
        return judged.rows("hypothesis", chance=chance)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``accuracy`` and ``accuracy/CLASS`` for each class that occurs."""
        labels, predicted = (np.asarray(rows[name]).tolist() for name in ("label", "pred"))
        ids, images = ([str(name) for name in rows[column]] for column in ("id", "image"))
        return entailment_outcomes(ids, predicted, labels, classes=rows.meta["classes"], images=images)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


ADAPTER = Entailment()
