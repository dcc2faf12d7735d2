"""Several labels an image: reading them, rows of scores, and average precision with intervals.

A label is 1 (present), 0 (absent) or -1 (not to be judged: VOC's "difficult"); an image with -1 does not exist for that
class, neither where it is reported nor, unless a protocol says otherwise, where it is learnt from.

Shape suffixes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlbench.adapters.common.classification import IMAGE_DIGITS, levels
from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes, Rows
from vlbench.data.sources import without_images
from vlbench.stats.ranked import average_precision, average_precision_11, macro, pseudo_values

if TYPE_CHECKING:
    from vlbench.adapters.encoder import ImageFeatures

METRICS = {"map11": average_precision_11, "map": average_precision}
"""Metrics of several labels an image, each of one class; the number reported is their mean over classes."""


def multilabels_of(source: Any) -> np.ndarray:
    """The labels of a source with several labels an image: int8 ``(N, C)`` of 1, 0 and -1.

    Raises:
        UserError: where the source has none, or an entry's are missing or of another form.
    """
    if "labels" not in source.provides or source.classes is None:
        raise UserError(f"{source.spec} ({source.split}): has no lists of labels; this task needs several an image")
    rows, where = [], f"{source.spec} ({source.split})"
    for index in range(len(source)):
        example = without_images(source, index)
        found = np.asarray(example.extra.get("labels", ()))
        if found.shape != (len(source.classes),) or not np.isin(found, (-1, 0, 1)).all():
            raise UserError(f"{where}: {example.id}: its labels are not {len(source.classes)} numbers of -1, 0 and 1")
        rows.append(found.astype(np.int8))
    if not rows:
        raise UserError(f"{where}: there is no example")
    return np.stack(rows)


def multilabel_rows(
    features: ImageFeatures,
    labels_NC: np.ndarray,
    scores: np.ndarray | Mapping[str, np.ndarray],
    *,
    meta: Mapping[str, Any],
) -> Rows:
    """Rows ``id, image, labels, scores``; chance and notes are added to ``meta``.

    Args:
        features: of the reported split; its ids and image digests become columns.
        labels_NC: 1, 0 or -1.
        scores: ``(N, C)``, higher is more likely present; comparable among the images of one class only. Where a
            protocol has several, by what the names of its metrics end in; ``(N, S, C)`` of S draws.
        meta: must hold ``classes``.

    Raises:
        UserError: where no class has a positive image.
    """
    positives_C = (labels_NC == 1).sum(axis=0)
    if not positives_C.any():
        raise UserError("no class has a positive image in the reported split: average precision has no value")
    notes = list(meta.get("notes", ()))
    if absent := [name for name, count in zip(meta["classes"], positives_C) if not count]:
        notes.append(f"{len(absent)} classes have no positive image and are left out of the mean, first {absent[0]!r}")
    if single := int((positives_C == 1).sum()):
        notes.append(f"{single} classes have one positive image: the interval does not see what hangs on it")
    columns = {
        "id": list(features.ids),
        "image": [digest[:IMAGE_DIGITS] for digest in features.digests],
        "labels": labels_NC.astype(np.int8),
    }
    of = scores if isinstance(scores, Mapping) else {"": scores}
    columns |= {f"scores{ending}": levels(found).astype(np.float32) for ending, found in of.items()}
    chance = dict.fromkeys([f"{name}{ending}" for ending in of for name in METRICS], prevalence(labels_NC))
    return Rows(columns, {**meta, "chance": chance, "notes": notes})


def multilabel_outcomes(rows: Rows, *, ending: str = "") -> dict[str, Outcomes]:
    """``map11`` and ``map`` as pseudo-values per image; examples with the same bytes are one cluster.

    Of several draws an image's value is the mean of its pseudo-values, so that their mean is the mean of the metric.
    """
    ids, images = [str(name) for name in rows["id"]], [str(name) for name in rows["image"]]
    scores = np.asarray(rows[f"scores{ending}"])
    draws_SNC = scores[None] if scores.ndim == 2 else scores.swapaxes(0, 1)
    found = {}
    for name, metric in METRICS.items():
        values_SN = [pseudo_values(macro(metric, rows["labels"], scores_NC)) for scores_NC in draws_SNC]
        found[f"{name}{ending}"] = Outcomes(ids, np.mean(values_SN, axis=0), images, binary=False, pseudo=True)
    return found


def prevalence(labels_NC: np.ndarray) -> float:
    """What equal scores for all images give: the mean share of positives over the classes that have one.

    A ranking at random gives more, the fewer the images: slightly so for ``map``, which counts the images that happen
    to stand first, and clearly so for ``map11``, which picks the best precision of eleven stretches.
    """
    positives_C, known_C = (labels_NC == 1).sum(axis=0), (labels_NC >= 0).sum(axis=0)
    return float((positives_C / np.maximum(known_C, 1))[positives_C > 0].mean())


def held_out(digests: Sequence[str], share: float) -> np.ndarray:
    """Which images to hold out: the first ``share`` in the order of their digests, copies on one side."""
    images = sorted(set(digests))
    chosen = set(images[: min(max(1, round(share * len(images))), len(images) - 1)])
    return np.array([image in chosen for image in digests])


def training_gaps(labels_NC: np.ndarray) -> np.ndarray:
    """Which classes cannot be learnt ``(C,)``: the images that may be learnt from are all positive, or all not."""
    return ~((labels_NC == 1).any(axis=0) & (labels_NC == 0).any(axis=0))
