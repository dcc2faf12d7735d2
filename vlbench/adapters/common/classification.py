"""From class scores to rows, and from rows to accuracies: what zero-shot, linear probe and kNN share.

Shape suffixes: N examples, C classes.

Two classes tie where their scores agree to nine digits. A tie is broken by a hash of the example's id and the class's
name: each example keeps one prediction, right or wrong, no class is favoured for standing first, and a model whose
scores are all equal lands on chance rather than on the share of class 0. Where there are two classes, the rows keep the
margin between them, compared to the same nine digits: scores that are all equal have a ROC-AUC of 0.5 exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest
from vlbench.core.types import Estimate, Outcomes, Rows
from vlbench.stats.intervals import estimate
from vlbench.stats.ranked import pseudo_values, roc_auc

if TYPE_CHECKING:
    from vlbench.adapters.encoder import ImageFeatures

TIE_RESOLUTION = 1e9
"""Scores are compared as whole multiples of 1/TIE_RESOLUTION of the largest: sums in another order still tie."""

IMAGE_DIGITS = 16
"""Hexadecimal digits of an image's digest kept in the rows: enough to tell images apart, half the bytes."""


def unit(rows_ND: np.ndarray) -> np.ndarray:
    """Rows divided by their length, in float64. A row of zeros stays zero: it is equally far from everything."""
    rows_ND = np.asarray(rows_ND, dtype=np.float64)
    length_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return rows_ND / np.where(length_N1 > 0, length_N1, 1.0)


def labels_of(source: Any) -> np.ndarray:
    """The labels of a labelled source as int64 ``(N,)``.

    Raises:
        UserError: where the source has no labels, or some entries lack one; leaving those out would change the number.
    """
    labels = source.labels()
    if labels is None or source.classes is None:
        raise UserError(f"{source.spec} ({source.split}): has no labels")
    missing = [example for example, label in zip(source.ids(), labels) if label is None or label < 0]
    if missing:
        raise UserError(f"{source.spec} ({source.split}): {len(missing)} examples have no label, first {missing[0]!r}")
    return np.asarray(labels, dtype=np.int64)


def same_classes(sources: Iterable[Any]) -> None:
    """Require one list of classes over the splits. Raises UserError naming a class that only one of them has."""
    first, *others = sources
    for other in others:
        if other.classes != first.classes:
            odd = sorted(set(first.classes) ^ set(other.classes)) or ["the order"]
            raise UserError(
                f"{first.spec}: splits {first.split!r} and {other.split!r} have different classes ({odd[0]!r}, "
                f"{len(odd)} in all); every split needs the same class names"
            )


def decide(
    scores_NC: np.ndarray, labels_N: np.ndarray, *, ids: Sequence[str], classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted class and the rank of the right one (1 is best) of every row, ties broken as the module says.

    Returns:
        ``pred_N`` and ``rank_N``, int64; ``pred == label`` exactly where ``rank == 1``.
    """
    size_N1 = np.maximum(np.abs(scores_NC).max(axis=1, keepdims=True), 1.0)
    levels_NC = np.rint(scores_NC / size_N1 * TIE_RESOLUTION)
    own_N1 = np.take_along_axis(levels_NC, labels_N[:, None], axis=1)
    top_N1 = levels_NC.max(axis=1, keepdims=True)
    pred_N = levels_NC.argmax(axis=1)
    rank_N = 1 + (levels_NC > own_N1).sum(axis=1)

    tied = np.flatnonzero(((levels_NC == own_N1).sum(axis=1) > 1) | ((levels_NC == top_N1).sum(axis=1) > 1))
    if len(tied):
        draw_TC = _draws([ids[row] for row in tied], classes)
        at_top_TC = levels_NC[tied] == top_N1[tied]
        last = np.iinfo(np.uint64).max
        pred_N[tied] = np.where(at_top_TC, draw_TC, last).argmin(axis=1)
        own_draw_T1 = np.take_along_axis(draw_TC, labels_N[tied, None], axis=1)
        rank_N[tied] += ((levels_NC[tied] == own_N1[tied]) & (draw_TC < own_draw_T1)).sum(axis=1)
    return pred_N.astype(np.int64), rank_N.astype(np.int64)


def prediction_rows(
    features: ImageFeatures, labels_N: np.ndarray, score_blocks: Iterable[np.ndarray], *, meta: Mapping[str, Any]
) -> Rows:
    """Rows of a classification: ``id, image, label, pred, rank, correct``; ``score`` where there are two classes.

    ``score`` is the margin of class 1 over class 0.

    Args:
        features: of the reported split; its ids and image digests become columns.
        labels_N: the right classes.
        score_blocks: class scores ``(block, C)`` of consecutive examples, higher is better.
        meta: must hold ``classes``, the class names by label, and ``chance`` by metric.
    """
    preds, ranks, margins, start = [], [], [], 0
    for scores_BC in score_blocks:
        stop = start + len(scores_BC)
        pred_B, rank_B = decide(scores_BC, labels_N[start:stop], ids=features.ids[start:stop], classes=meta["classes"])
        preds.append(pred_B)
        ranks.append(rank_B)
        if len(meta["classes"]) == 2:
            margins.append(scores_BC[:, 1] - scores_BC[:, 0])
        start = stop
    assert start == len(labels_N), f"scores for {start} of {len(labels_N)} examples"
    rank_N = np.concatenate(ranks)
    columns = {
        "id": list(features.ids),
        "image": [digest[:IMAGE_DIGITS] for digest in features.digests],
        "label": labels_N,
        "pred": np.concatenate(preds),
        "rank": rank_N,
        "correct": rank_N == 1,
    }
    if not margins:
        return Rows(columns, dict(meta))
    columns["score"] = levels(np.concatenate(margins)).astype(np.float32)
    if not has_pairs(labels_N):
        notes = [*meta.get("notes", ()), "roc_auc is left out: it needs two images of each class"]
        return Rows(columns, {**meta, "notes": notes})
    return Rows(columns, {**meta, "chance": {**meta["chance"], "roc_auc": 0.5}})


def levels(scores: np.ndarray) -> np.ndarray:
    """Scores rounded to whole multiples of 1/TIE_RESOLUTION of the largest: what ties for ``decide`` is equal here."""
    size = max(float(np.abs(scores).max(initial=0.0)), 1.0)
    return np.rint(scores / size * TIE_RESOLUTION) * (size / TIE_RESOLUTION)


def has_pairs(labels_N: np.ndarray) -> bool:
    """Whether there are two images of either of two classes, without which there is no ROC-AUC."""
    return bool((np.bincount(labels_N, minlength=2) >= 2).all())


def classification_outcomes(rows: Rows, *, top5: bool) -> dict[str, Outcomes]:
    """``acc1``, ``acc5`` (where asked for and there are more than five classes) and ``mean_per_class_recall``.

    ``roc_auc`` too, where there are two classes, each with two images or more, and the rows keep a ``score``.
    The unit is the image: examples with the same bytes are one cluster. ``mean_per_class_recall`` is the plain mean of
    the recalls of the classes that occur.
    """
    labels_N = np.asarray(rows["label"])
    rank_N = np.asarray(rows["rank"])
    ids, images = [str(name) for name in rows["id"]], [str(name) for name in rows["image"]]
    correct_N = (rank_N == 1).astype(np.float64)
    found = {"acc1": Outcomes(ids, correct_N, images, binary=True)}
    if top5 and len(rows.meta["classes"]) > 5:
        found["acc5"] = Outcomes(ids, (rank_N <= 5).astype(np.float64), images, binary=True)
    found["mean_per_class_recall"] = Outcomes(ids, correct_N, images, binary=True, strata=labels_N)
    if "score" in rows.columns and has_pairs(labels_N):
        values_N = pseudo_values(roc_auc(labels_N, rows["score"]))
        found["roc_auc"] = Outcomes(ids, values_N, images, binary=False, pseudo=True)
    return found


def estimates(outcomes: Mapping[str, Outcomes]) -> dict[str, Estimate]:
    """Every metric with its interval."""
    return {metric: estimate(values) for metric, values in outcomes.items()}


def chance_of(n_classes: int, constant_guess: float, *, top5: bool) -> dict[str, float]:
    """What a model that knows nothing of the images scores.

    Args:
        n_classes: classes to choose from.
        constant_guess: accuracy of always answering with what is known without images.
        top5: whether ``acc5`` is reported.
    """
    known = {"acc1": constant_guess, "mean_per_class_recall": 1 / n_classes}
    return known | ({"acc5": 5 / n_classes} if top5 and n_classes > 5 else {})


def majority_guess(train_labels: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on the test labels of always answering with the training set's most frequent class."""
    return float((test_labels == np.bincount(train_labels).argmax()).mean())


def overlap_note(train: Iterable[str], test: Sequence[str]) -> list[str]:
    """A note where test images are, byte for byte, among the training images; empty otherwise."""
    seen = set(train)
    count = sum(image in seen for image in test)
    return [f"{count} of {len(test)} test images are, byte for byte, training images too"] if count else []


def _distinct(classes: Sequence[str]) -> list[str]:
    """Class names that occur twice, told apart by their number: CLIP's ImageNet names have two "missile"."""
    seen: Counter[str] = Counter()
    names = []
    for name in classes:
        names.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _draws(ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """A pseudo-random uint64 for every pair of example id and class name, the same for ever: ``(len(ids), C)``."""
    by_id = np.array([int(digest(name.encode())[:16], 16) for name in ids], dtype=np.uint64)
    by_class = np.array([int(digest(name.encode())[:16], 16) for name in _distinct(classes)], dtype=np.uint64)
    mixed = by_id[:, None] ^ by_class[None, :]
    # The finaliser of SplitMix64: a bijection that spreads every input bit over all output bits.
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
