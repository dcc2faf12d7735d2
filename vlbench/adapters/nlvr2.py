"""NLVR2: whether a sentence is true of two photographs side by side (Suhr et al., ACL 2019, 1811.00491).

Each photograph is read with the sentence by itself; the two pooled outputs, one after the other, go to a classifier of
two classes, as in LXMERT and mu-VLA (2203.00242).

Reported are accuracy and consistency, the share of sentences that are judged right on every pair of images they belong
to. The unit of sampling is the set of images that sentences share (``stats.consistency``).

N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from vlbench.adapters.common.classification import estimates, labels_of, same_classes
from vlbench.adapters.common.questions import (
    Reading,
    answer,
    log_frequencies,
    sentence_of,
    softmax,
    splits_of,
    where_of,
)
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Example, Outcomes, Part, Provides, Rows, Source
from vlbench.data.digests import content_digests
from vlbench.data.sources import BaseSource
from vlbench.finetune.fusion.config import PAPER, TINY, FusionConfig
from vlbench.finetune.fusion.questions import Questions
from vlbench.stats.consistency import image_set, nlvr2_outcomes


class Config(FusionConfig):
    """Settings of NLVR2."""

    PRESETS: ClassVar[Mapping[str, dict[str, Any]]] = {"tiny": TINY, "paper": PAPER["nlvr2"]}


@dataclass(frozen=True)
class _Truth:
    """What is known of one pair."""

    sentence: str
    label: int
    pair: str


class Side(BaseSource):
    """The left (0) or the right (1) images of a source of pairs."""

    def __init__(self, pairs: Source, place: int) -> None:
        super().__init__(pairs.spec, pairs.split, provides={"image"})
        self._pairs = pairs
        self._place = place
        if place == 0:  # what the task's data were known by already
            self._content_digests = content_digests(pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        example = self._pairs[index]
        image = example.extra.get("right") if self._place else example.image
        if not isinstance(image, bytes):
            raise UserError(f"{where_of(self._pairs)}: {example.id} has no {('left', 'right')[self._place]} image")
        # Named as its file is: so the files of region features name it too.
        key = f"{example.extra.get('image_key', example.id)}-img{self._place}"
        return replace(example, image=image, extra={"image_key": key})

    def ids(self) -> list[str]:
        """The pairs'."""
        return list(self._pairs.ids())

    def labels(self) -> None:
        """None: a label is about both images."""


class Nlvr2:
    """The adapter. Val (the data's dev) chooses, test (test1) is reported."""

    name: ClassVar[str] = "nlvr2"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "accuracy"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "pair"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    trains: ClassVar[bool] = True

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """One row a pair: ``id, image, right_image, image_id, sentence, label, pred, prediction, truth, p, right``."""
        train, test = data.split("train"), data.split("test")
        same_classes([train, test])
        classes = list(test.classes)

        def head() -> Any:
            from vlbench.finetune.fusion.heads import ClassHead

            return ClassHead(len(classes))

        splits = splits_of(encoder, data, config, lambda source: _read(encoder, source), reported=("test",))
        prior = log_frequencies([truth.label for truth in splits.learn.truths], len(classes))
        found = answer(
            encoder,
            splits,
            config,
            head=head,
            judge=lambda reading, logits: float((np.stack(logits).argmax(1) == _labels(reading)).mean()),
            constant=lambda reading: [prior] * len(reading),
        )
        ((split, asked),) = splits.asked.items()
        p_N2, label_N = softmax(np.stack(found.logits[split])), _labels(asked)
        pred_N = np.stack(found.logits[split]).argmax(axis=1)
        blind = nlvr2_outcomes(asked.ids, label_N == int(prior.argmax()))
        meta = {
            "classes": classes,
            "train_pairs": len(splits.learn),
            "chance": {name: float(o.values.mean()) for name, o in blind.items()},
            "chosen": found.chosen,
            "notes": list(found.notes),
        }
        columns = {
            "id": list(asked.ids),
            "image": asked.image_column(),
            "right_image": [own[1][: len(name)] for own, name in zip(asked.images, asked.image_column())],
            "image_id": [truth.pair for truth in asked.truths],
            "sentence": [truth.sentence for truth in asked.truths],
            "label": label_N,
            "pred": pred_N,
            "truth": [classes[label] for label in label_N],
            "prediction": [classes[pred] for pred in pred_N],
            "p": p_N2[np.arange(len(pred_N)), pred_N].astype(np.float32),
            "right": pred_N == label_N,
        }
        return Rows(columns, meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``accuracy`` and ``consistency``."""
        return nlvr2_outcomes([str(name) for name in rows["id"]], np.asarray(rows["right"], dtype=bool).tolist())

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Both metrics with their intervals."""
        return estimates(self.outcomes(rows, config))


def _read(encoder: Any, source: Source) -> Reading[_Truth]:
    labels, truths = labels_of(source), []
    for index, label in enumerate(labels.tolist()):
        example = source[index]
        truths.append(_Truth(sentence_of(example, where_of(source)), label, str(example.extra.get("image_key", ""))))
    views = (Side(source, 0), Side(source, 1))
    return Reading(
        Questions(views, tuple(truth.sentence for truth in truths), tuple(labels.tolist())),
        tuple(source.ids()),
        tuple(truths),
        tuple(zip(*(encoder.image_digests(view) for view in views), strict=True)),
        groups=tuple(image_set(identifier) for identifier in source.ids()),
    )


def _labels(reading: Reading[_Truth]) -> np.ndarray:
    return np.array([truth.label for truth in reading.truths], dtype=np.int64)


ADAPTER = Nlvr2()
