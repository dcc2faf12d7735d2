"""Visual entailment: whether a sentence follows from an image, contradicts it, or neither (SNLI-VE, 1901.06706).

Image and sentence are read together; the pooled output goes to a classifier of three classes. The caption that
stands for the image in SNLI, the premise, is never read: with it the task would be one of text alone.

Reported is accuracy, over everything and by true class. The unit of sampling is the image.

N pairs of image and sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vlbench.adapters.common.classification import estimates, labels_of, majority_guess, same_classes
from vlbench.adapters.common.questions import (
    Reading,
    answer,
    log_frequencies,
    sentence_of,
    softmax,
    splits_of,
    where_of,
)
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows, Source
from vlbench.finetune.fusion.config import PAPER, TINY, FusionConfig
from vlbench.finetune.fusion.questions import Questions
from vlbench.stats.entailment import entailment_outcomes


class Config(FusionConfig):
    """Settings of visual entailment."""

    PRESETS: ClassVar[Mapping[str, dict[str, Any]]] = {"tiny": TINY, "paper": PAPER["entailment"]}


@dataclass(frozen=True)
class _Truth:
    """What is known of one pair."""

    hypothesis: str
    label: int
    image_id: str


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
        train, test = data.split("train"), data.split("test")
        same_classes([train, test])
        classes = list(test.classes)

        def head() -> Any:
            from vlbench.finetune.fusion.heads import ClassHead

            return ClassHead(len(classes))

        splits = splits_of(encoder, data, config, lambda source: _read(encoder, source), reported=("test",))
        train_N = _labels(splits.learn)
        prior = log_frequencies(train_N.tolist(), len(classes))
        found = answer(
            encoder,
            splits,
            config,
            head=head,
            judge=lambda reading, logits: float((np.stack(logits).argmax(1) == _labels(reading)).mean()),
            constant=lambda reading: [prior] * len(reading),
        )
        ((split, asked),) = splits.asked.items()
        logits_NC, label_N = np.stack(found.logits[split]), _labels(asked)
        pred_N = logits_NC.argmax(axis=1)
        by_class = {f"accuracy/{classes[label]}": 1 / len(classes) for label in np.unique(label_N)}
        meta = {
            "classes": classes,
            "train_pairs": len(splits.learn),
            "chance": {"accuracy": majority_guess(train_N, label_N), **by_class},
            "chosen": found.chosen,
            "notes": list(found.notes),
        }
        columns = {
            "id": list(asked.ids),
            "image": asked.image_column(),
            "image_id": [truth.image_id for truth in asked.truths],
            "hypothesis": [truth.hypothesis for truth in asked.truths],
            "label": label_N,
            "pred": pred_N,
            "truth": [classes[label] for label in label_N],
            "prediction": [classes[pred] for pred in pred_N],
            "p": softmax(logits_NC)[np.arange(len(pred_N)), pred_N].astype(np.float32),
            "right": pred_N == label_N,
        }
        return Rows(columns, meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``accuracy`` and ``accuracy/CLASS`` for each class that occurs."""
        labels, predicted = (np.asarray(rows[name]).tolist() for name in ("label", "pred"))
        ids, images = ([str(name) for name in rows[column]] for column in ("id", "image"))
        return entailment_outcomes(ids, predicted, labels, classes=rows.meta["classes"], images=images)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def _read(encoder: Any, source: Source) -> Reading[_Truth]:
    labels, truths = labels_of(source), []
    for index, label in enumerate(labels.tolist()):
        example = source[index]
        truths.append(_Truth(sentence_of(example, where_of(source)), label, str(example.extra.get("image_key", ""))))
    return Reading(
        Questions((source,), tuple(truth.hypothesis for truth in truths), tuple(labels.tolist())),
        tuple(source.ids()),
        tuple(truths),
        tuple((image,) for image in encoder.image_digests(source)),
    )


def _labels(reading: Reading[_Truth]) -> np.ndarray:
    return np.array([truth.label for truth in reading.truths], dtype=np.int64)


ADAPTER = Entailment()
