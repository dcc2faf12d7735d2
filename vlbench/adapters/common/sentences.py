"""A sentence about an image, or two, belongs to one of a few classes: what NLVR2 and visual entailment share.

N sentences, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlbench.adapters.common.classification import labels_of, same_classes
from vlbench.adapters.common.questions import (
    Reading,
    answer,
    log_frequencies,
    sentence_of,
    softmax,
    splits_of,
    where_of,
)
from vlbench.core.types import Rows, Source
from vlbench.data.sources import without_images
from vlbench.finetune.fusion.questions import Questions

if TYPE_CHECKING:
    from vlbench.finetune.fusion.config import FusionConfig


@dataclass(frozen=True)
class Sentence:
    """What is known of one sentence."""

    text: str
    label: int
    image_id: str


@dataclass(frozen=True)
class Judged:
    """The reported split with what a tuned model says of it."""

    asked: Reading[Sentence]
    classes: list[str]
    logits_NC: np.ndarray
    label_N: np.ndarray
    learnt_N: np.ndarray
    """The labels that were learnt from; another N."""
    chosen: dict[str, Any]
    notes: Sequence[str]

    def rows(self, text: str, *, chance: Mapping[str, float], more: Mapping[str, Any] | None = None) -> Rows:
        """One row a sentence.

        Args:
            text: the name of the column of sentences.
            chance: by metric, what the commonest class scores.
            more: further columns.
        """
        pred_N = self.logits_NC.argmax(axis=1)
        columns = {
            "id": list(self.asked.ids),
            "image": self.asked.image_column(),
            **(more or {}),
            "image_id": [truth.image_id for truth in self.asked.truths],
            text: [truth.text for truth in self.asked.truths],
            "label": self.label_N,
            "pred": pred_N,
            "truth": [self.classes[label] for label in self.label_N],
            "prediction": [self.classes[pred] for pred in pred_N],
            "p": softmax(self.logits_NC)[np.arange(len(pred_N)), pred_N].astype(np.float32),
            "right": pred_N == self.label_N,
        }
        meta = {
            "classes": self.classes,
            "train_pairs": len(self.learnt_N),
            "chance": dict(chance),
            "chosen": self.chosen,
            "notes": list(self.notes),
        }
        return Rows(columns, meta)


def judge_sentences(
    encoder: Any, data: Any, config: FusionConfig, read: Callable[[Source], Reading[Sentence]]
) -> Judged:
    """Tune on train, choose by accuracy, ask test; ``baseline:constant`` says the commonest class of train."""
    train, test = data.split("train"), data.split("test")
    same_classes([train, test])
    classes = list(test.classes)

    def head() -> Any:
        from vlbench.finetune.fusion.heads import ClassHead

        return ClassHead(len(classes))

    splits = splits_of(encoder, data, config, read, reported=("test",))
    learnt_N = _labels(splits.learn)
    prior_C = log_frequencies(learnt_N.tolist(), len(classes))
    found = answer(
        encoder,
        splits,
        config,
        head=head,
        judge=lambda reading, logits: float((np.stack(logits).argmax(1) == _labels(reading)).mean()),
        constant=lambda reading: [prior_C] * len(reading),
    )
    ((split, asked),) = splits.asked.items()
    return Judged(asked, classes, np.stack(found.logits[split]), _labels(asked), learnt_N, found.chosen, found.notes)


def read_sentences(
    encoder: Any, source: Source, views: tuple[Source, ...], *, groups: tuple[str, ...] | None = None
) -> Reading[Sentence]:
    """The sentences of a source, each about one image of every view."""
    truths = []
    for index, label in enumerate(labels_of(source).tolist()):
        example = without_images(source, index)
        truths.append(Sentence(sentence_of(example, where_of(source)), label, str(example.extra.get("image_key", ""))))
    return Reading(
        Questions(views, tuple(truth.text for truth in truths), tuple(truth.label for truth in truths)),
        tuple(source.ids()),
        tuple(truths),
        tuple(zip(*(encoder.image_digests(view) for view in views), strict=True)),
        groups=groups,
    )


def _labels(reading: Reading[Sentence]) -> np.ndarray:
    return np.array([truth.label for truth in reading.truths], dtype=np.int64)
