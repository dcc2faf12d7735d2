"""Few-shot linear probe: logistic regression on k images a class (5, 20 and 50, as ELEVATER's, arXiv 2204.08790).

For every seed the k images of a class are those whose content, hashed with the seed, comes first. So the draw is the
same for every model, on every machine and in any order of files: two models are compared on the same shots. With the
same seed the 5 are among the 20, and these among the 50.

The penalty is chosen by stratified cross-validation within the shots; a validation split would be many more labelled
images than the task grants, and is left alone. The metrics are means over the seeds: an image's value is the share of
the seeds whose probe is right on it. The interval is over test images; how much the draw of the shots matters besides
is in ``chosen`` and in a note, seed by seed.

Shape suffixes: N images, D pooled width, C classes, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from vlbench.adapters.common.classification import (
    IMAGE_DIGITS,
    decide,
    estimates,
    has_pairs,
    labels_of,
    levels,
    majority_guess,
    overlap_note,
    same_classes,
)
from vlbench.adapters.common.shots import Config, Draw, first_by_content, spread_note
from vlbench.adapters.common.softmax_regression import Fit, SoftmaxRegression
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows
from vlbench.stats.ranked import pseudo_values, roc_auc


class FewShot:
    """The adapter. Reads train and test."""

    name: ClassVar[str] = "fewshot"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "acc1@5"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "label"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, label``, and for every k the right class's ``rank@k`` by seed ``(N, S)``.

        Two classes have a ``score@k`` too, the margin of class 1 over class 0.
        """
        train, test = data.split("train"), data.split("test")
        same_classes([train, test])
        train_labels_N, labels_N = labels_of(train), labels_of(test)
        known, found = encoder.images(train), encoder.images(test)
        classes = list(test.classes)
        if len(np.unique(train_labels_N)) < 2:
            raise UserError(f"{data.spec}: the training images have one class only; a probe needs two")
        columns: dict[str, Any] = {
            "id": list(found.ids),
            "image": [image[:IMAGE_DIGITS] for image in found.digests],
            "label": labels_N,
        }
        notes, chosen = overlap_note(known.digests, found.digests), {}
        for shots in config.shots:
            ranks_SN, margins_SN, record, unfinished = [], [], [], 0
            for seed in config.seeds:
                draw = draw_shots(known.digests, train_labels_N, shots, seed=seed, folds=config.folds)
                features_ND, drawn_N = known.pooled_ND[draw.rows], train_labels_N[draw.rows]
                fit, present, c = _fit(features_ND, drawn_N, draw.folds, config=config, device=encoder.device)
                scores_NC = _all_classes(fit.logits(found.pooled_ND), present, len(classes))
                rank_N = decide(scores_NC, labels_N, ids=found.ids, classes=classes)[1]
                ranks_SN.append(rank_N)
                margins_SN.append(levels(scores_NC[:, 1] - scores_NC[:, 0]))
                unfinished += not fit.converged
                found_of = {"C": c, "at_grid_edge": config.at_grid_edge(c)}
                right = float((rank_N == 1).mean())
                record.append({"seed": seed, **found_of, "images": len(drawn_N), "acc1": right})
            columns[f"rank@{shots}"] = np.stack(ranks_SN, axis=1).astype(np.int32)
            if len(classes) == 2:
                columns[f"score@{shots}"] = np.stack(margins_SN, axis=1).astype(np.float32)
            chosen[f"@{shots}"] = record
            notes += _notes(known.digests, train_labels_N, shots, len(classes))
            if unfinished:
                notes.append(f"{unfinished} fits to {shots} shots stopped at {config.max_iterations} iterations")
            notes += spread_note(f"acc1@{shots}", [draw["acc1"] for draw in record])
        majority = majority_guess(train_labels_N, labels_N)
        chance = {"acc1": majority, "mean_per_class_recall": 1 / len(classes)}
        if len(classes) == 2 and has_pairs(labels_N):
            chance["roc_auc"] = 0.5
        meta = {
            "classes": classes,
            "chance": {f"{name}@{shots}": value for shots in config.shots for name, value in chance.items()},
            "chosen": chosen,
            "notes": notes,
        }
        return Rows(columns, meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``acc1@k`` and ``mean_per_class_recall@k``, and ``roc_auc@k`` of two classes; each the mean over seeds."""
        ids, images = [str(name) for name in rows["id"]], [str(name) for name in rows["image"]]
        labels_N = np.asarray(rows["label"])
        found = {}
        for shots in config.shots:
            correct_N = (np.asarray(rows[f"rank@{shots}"]) == 1).mean(axis=1)
            binary = len(config.seeds) == 1
            found[f"acc1@{shots}"] = Outcomes(ids, correct_N, images, binary=binary)
            found[f"mean_per_class_recall@{shots}"] = Outcomes(ids, correct_N, images, binary=binary, strata=labels_N)
            if f"score@{shots}" in rows.columns and has_pairs(labels_N):
                values_SN = [pseudo_values(roc_auc(labels_N, score_N)) for score_N in rows[f"score@{shots}"].T]
                values_N = np.mean(values_SN, axis=0)
                found[f"roc_auc@{shots}"] = Outcomes(ids, values_N, images, binary=False, pseudo=True)
        return found

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def draw_shots(digests: Sequence[str], labels_N: np.ndarray, shots: int, *, seed: int, folds: int) -> Draw:
    """``shots`` distinct images of every class, all of a class that has fewer, in an order made of content and seed.

    Folds are dealt out in the same order: each class has its images spread evenly over them.
    """
    rows, dealt = [], []
    for label in np.unique(labels_N):
        found = first_by_content(digests, np.flatnonzero(labels_N == label), shots, seed=seed)
        rows += found
        dealt += [place % folds for place in range(len(found))]
    return Draw(np.array(rows, dtype=np.int64), np.array(dealt, dtype=np.int64))


def choose_c(
    features_ND: np.ndarray, labels_N: np.ndarray, folds_N: np.ndarray, *, config: Config, device: str
) -> float | None:
    """The C of the best accuracy over all folds, then of the lowest log-loss, then the strongest penalty.

    A class of which a fold's other images show nothing cannot be right there, whatever C is, and is not counted.

    Returns:
        None where no fold has anything to check.
    """
    parts = []
    for fold in np.unique(folds_N):
        learn_N = folds_N != fold
        present, dense_N = np.unique(labels_N[learn_N], return_inverse=True)
        check_N = ~learn_N & np.isin(labels_N, present)
        if len(present) > 1 and check_N.any():
            problem = SoftmaxRegression(features_ND[learn_N], dense_N, len(present), device=device)
            parts.append((problem, features_ND[check_N], np.searchsorted(present, labels_N[check_N])))
    if not parts:
        return None
    options = {"tolerance": config.search_tolerance, "max_iterations": config.max_iterations}
    starts: list[Fit | None] = [None] * len(parts)
    tried: list[tuple[tuple[float, float], float]] = []
    for c in config.grid():
        right, log_p = 0.0, 0.0
        for place, (problem, check_ND, own_N) in enumerate(parts):
            starts[place] = fit = problem.fit(c, start=starts[place], **options)
            log_p_NC = _log_softmax(fit.logits(check_ND))
            right += float((log_p_NC.argmax(axis=1) == own_N).sum())
            log_p += float(log_p_NC[np.arange(len(own_N)), own_N].sum())
        tried.append(((right, log_p), c))
    return max(tried, key=lambda item: (item[0], -item[1]))[1]


def _fit(
    features_ND: np.ndarray, labels_N: np.ndarray, folds_N: np.ndarray, *, config: Config, device: str
) -> tuple[Fit, np.ndarray, float]:
    """The fit on all shots, the classes that it knows, and its C."""
    c = choose_c(features_ND, labels_N, folds_N, config=config, device=device)
    if c is None:
        raise UserError("one shot a class leaves nothing to choose C on: take two shots or more")
    present, dense_N = np.unique(labels_N, return_inverse=True)
    problem = SoftmaxRegression(features_ND, dense_N, len(present), device=device)
    return problem.fit(c, tolerance=config.tolerance, max_iterations=config.max_iterations), present, c


def _all_classes(logits_NP: np.ndarray, present: np.ndarray, n_classes: int) -> np.ndarray:
    """Log-probabilities over all classes; one that was never seen ranks last, by a finite margin."""
    log_p_NP = _log_softmax(logits_NP)
    scores_NC = np.full((len(log_p_NP), n_classes), log_p_NP.min() - 1.0)
    scores_NC[:, present] = log_p_NP
    return scores_NC


def _log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    return logits_NC - np.logaddexp.reduce(logits_NC, axis=1, keepdims=True)


def _notes(digests: Sequence[str], labels_N: np.ndarray, shots: int, n_classes: int) -> list[str]:
    counts = [len({digests[row] for row in np.flatnonzero(labels_N == label)}) for label in range(n_classes)]
    few, none = sum(0 < count < shots for count in counts), counts.count(0)
    notes = [f"{few} classes have fewer than {shots} training images and give all they have"] if few else []
    return notes + ([f"{none} classes have no training image and are never predicted"] if none else [])


ADAPTER = FewShot()
