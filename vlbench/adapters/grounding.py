"""Referring expressions: which object of an image a phrase means (RefCOCO+: Yu et al., ECCV 2016, 1608.00272).

The phrase is read together with the image's candidate boxes, one token each; every box gets a score from its
token, and the highest is the answer. It is right where it overlaps the object that is meant by more than half
(``stats.grounding``).

The candidates are the boxes that people annotated in the image, all of them; the model reads the first ``max_regions``.
With fixed region features (``features``) they are the detector's, as in mu-VLA (2203.00242). A phrase is learnt as
pointing to the box that overlaps its object best; one whose object no box covers by half is not learnt from, and is
wrong where it is asked.

RefCOCO+ has three reported splits: val, the headline, testA (people) and testB (all other objects). None of them
chooses: a share of the training images does. A reference has several phrases, and each is a question. ``accuracy``
alone is over all of them. The unit of sampling is the image.

N phrases, K candidates of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlbench.adapters.common.classification import estimates
from vlbench.adapters.common.questions import Chosen, Reading, Splits, answer, softmax, splits_of, where_of
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Example, Outcomes, Part, Provides, Rows, Source
from vlbench.data.regions.sized import SizedRegions, image_key
from vlbench.data.sources import without_images
from vlbench.finetune.fusion.config import PAPER, TINY, FusionConfig
from vlbench.finetune.fusion.questions import Questions
from vlbench.stats.grounding import IOU, box_iou, grounding_outcomes
from vlbench.stats.grouped import by_group

if TYPE_CHECKING:
    from vlbench.data.regions.features import RegionStore


class Config(FusionConfig):
    """Settings of referring expressions."""

    PRESETS: ClassVar[Mapping[str, dict[str, Any]]] = {
        # What is meant stands in the answer, not only whether it fits: this begins to learn at once.
        "tiny": TINY
        | {
            "steps": 600,
            "batch_size": 64,
            "judge_every": 100,
            "optim": TINY["optim"] | {"lr": 1e-3},
            "stream": TINY["stream"] | {"init_std": 0.1},
        },
        "paper": PAPER["grounding"],
    }


@dataclass(frozen=True)
class _Truth:
    """What is known of one phrase."""

    phrase: str
    reference: str
    image_id: str
    split: str
    boxes_K4: np.ndarray
    """The candidates, in pixels of the stored image."""
    iou_K: np.ndarray
    """How far each overlaps the object that is meant."""
    target_4: np.ndarray


class Grounding:
    """The adapter. Reports test, and testA and testB where the data have them."""

    name: ClassVar[str] = "grounding"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "accuracy"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "regions", "expression"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "testA", "testB", "test")
    trains: ClassVar[bool] = True

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """One row a phrase: ``id, reference, image, image_id, split, phrase, box, target, …, p, right``."""
        store = _open(config.features)

        def read(source: Source) -> Reading[_Truth]:
            own = None if store is None else SizedRegions(store, str(config.features), [source])
            return _read(encoder, source, own, read=config.max_regions)

        def head() -> Any:
            from vlbench.finetune.fusion.heads import RegionHead

            return RegionHead()

        splits = _learnable(splits_of(encoder, data, config, read, reported=("test", "testA", "testB")), data.spec)
        found = answer(
            encoder,
            splits,
            config,
            head=head,
            judge=lambda reading, logits: float(np.mean(_overlaps(reading, logits) > IOU)),
            constant=lambda reading: [-np.arange(len(truth.boxes_K4), dtype=np.float64) for truth in reading.truths],
        )
        columns = _joined([_rows(reading, found.logits[name]) for name, reading in splits.asked.items()])
        hit_N = np.concatenate([_random_hits(reading) for reading in splits.asked.values()])
        whole = Outcomes(columns["id"], hit_N, columns["image"], binary=False)
        meta = {
            "train_phrases": len(splits.learn),
            "chance": {
                name: float(o.values.mean()) for name, o in by_group("accuracy", whole, columns["split"]).items()
            },
            "chosen": found.chosen,
            "notes": [_sizes(splits.asked), *found.notes],
        }
        return Rows(columns, meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``accuracy`` over all phrases and ``accuracy/SPLIT``."""
        ids, images, splits = ([str(name) for name in rows[column]] for column in ("id", "image", "split"))
        return grounding_outcomes(ids, rows["box"], rows["target"], images=images, splits=splits)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def _open(features: str | None) -> RegionStore | None:
    if features is None:
        return None
    from vlbench.data.regions.open import open_regions

    return open_regions(features)


def _read(encoder: Any, source: Source, store: RegionStore | None, *, read: int) -> Reading[_Truth]:
    """Every phrase of every reference, each with its reference's image; of a target only what is ``read``."""
    truths, ids, places = [], [], []
    for index in range(len(source)):
        example = without_images(source, index)
        boxes_K4 = _candidates(example, store, where=where_of(source))
        target_4 = np.asarray(example.regions[example.extra["target"]].box_xyxy, dtype=np.float64)
        iou_K = box_iou(boxes_K4, np.broadcast_to(target_4, boxes_K4.shape))
        image_id = str(example.extra.get("image_key", ""))
        for sentence, phrase in zip(example.extra["sentence_ids"], example.texts["en"], strict=True):
            truths.append(_Truth(phrase, example.id, image_id, source.split, boxes_K4, iou_K, target_4))
            ids.append(str(sentence))
            places.append(index)
    digests = encoder.image_digests(source)
    return Reading(
        Questions(
            (Chosen(source, places, split=source.split),),
            tuple(truth.phrase for truth in truths),
            tuple(int(truth.iou_K[:read].argmax()) for truth in truths),
            regions=True,
        ),
        tuple(ids),
        tuple(truths),
        tuple((digests[place],) for place in places),
    )


def _candidates(example: Example, store: RegionStore | None, *, where: str) -> np.ndarray:
    """The boxes that a phrase may point to, ``(K, 4)``."""
    boxes: Any = [region.box_xyxy for region in example.regions]
    if store is not None:
        key = image_key(example)
        if key not in store:
            raise UserError(f"{where}: {example.id}: image {key!r} has no region features")
        boxes = store[key].boxes_N4
    if not len(boxes):
        raise UserError(f"{where}: {example.id}: its image has no box that a phrase could point to")
    return np.asarray(boxes, dtype=np.float64)


def _learnable(splits: Splits[_Truth], where: str) -> Splits[_Truth]:
    """Without training phrases whose object no box that is read covers by half: they would teach a wrong one."""
    learn = splits.learn
    covered = [place for place, truth in enumerate(learn.truths) if truth.iou_K[learn.questions.targets[place]] > IOU]
    if len(covered) == len(learn):
        return splits
    if not covered:
        raise UserError(f"{where}: no candidate box overlaps the object of a training phrase by more than half")
    left_out = len(learn) - len(covered)
    note = f"{left_out:,} of {len(learn):,} training phrases are not learnt from: no box covers their object"
    return replace(splits, learn=learn.take(covered), notes=(*splits.notes, note))


def _sizes(asked: Mapping[str, Reading[_Truth]]) -> str:
    """What was asked, split by split: a result's own number of examples is the headline's split's alone."""
    counts = [
        f"{len({truth.reference for truth in reading.truths}):,} references with {len(reading):,} phrases of {name}"
        for name, reading in asked.items()
    ]
    return f"asked {', '.join(counts)}"


def _overlaps(reading: Reading[_Truth], logits: Sequence[np.ndarray]) -> np.ndarray:
    """``(N,)``: how far the box that is pointed to overlaps the right one."""
    pairs = zip(reading.truths, logits, strict=True)
    return np.array([truth.iou_K[int(scores_K.argmax())] for truth, scores_K in pairs], dtype=np.float64)


def _random_hits(reading: Reading[_Truth]) -> np.ndarray:
    """``(N,)``: the share of the candidates that are right."""
    return np.array([float((truth.iou_K > IOU).mean()) for truth in reading.truths])


def _rows(reading: Reading[_Truth], logits: Sequence[np.ndarray]) -> dict[str, Any]:
    chosen = [int(scores_K.argmax()) for scores_K in logits]
    boxes_N4 = np.stack([truth.boxes_K4[place] for truth, place in zip(reading.truths, chosen, strict=True)])
    overlaps_N = _overlaps(reading, logits)
    return {
        "id": list(reading.ids),
        "reference": [truth.reference for truth in reading.truths],
        "image": reading.image_column(),
        "image_id": [truth.image_id for truth in reading.truths],
        "split": [truth.split for truth in reading.truths],
        "phrase": [truth.phrase for truth in reading.truths],
        "candidates": np.array([len(truth.boxes_K4) for truth in reading.truths]),
        "chosen": np.array(chosen),
        "box": boxes_N4,
        "target": np.stack([truth.target_4 for truth in reading.truths]),
        "iou": overlaps_N,
        "p": np.array([softmax(scores).max() for scores in logits], dtype=np.float32),
        "right": overlaps_N > IOU,
    }


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of several splits, one after the other."""
    joined: dict[str, Any] = {}
    for name, first in parts[0].items():
        columns = [part[name] for part in parts]
        is_array = isinstance(first, np.ndarray)
        joined[name] = np.concatenate(columns) if is_array else [value for column in columns for value in column]
    return joined


ADAPTER = Grounding()
