"""Few-shot linear probe of images with several labels: one-vs-rest logistic regression on k images a class.

For every seed and class the k images that show the class whose content, hashed with the seed, comes first are drawn;
all of them together are the training set, each once and with all its labels. So the draw is the same for every model,
on every machine and in any order of files or classes, and the 5 are among the 20; a class that often stands beside
others has more than k. Images that show no class are never drawn. A label of -1 draws nothing, and is left out of that
class's loss and metric.

ELEVATER (arXiv 2204.08790; ``vision-datasets``) shuffles the images with the seed and goes through them until every
class has k, leaving out those whose classes have enough of them, and takes up to k images without any label.

C is chosen by cross-validation within the shots, by ``map11``; folds have as even a share of every class as its images
allow. A validation split is left alone. The metrics are means over the seeds: an image's value is the mean of its
pseudo-values. The interval is over test images; what each draw gave is in ``chosen`` and in a note.

Shape suffixes: N images, D pooled width, C classes, F folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from vlbench.adapters.common.classification import estimates, overlap_note, same_classes
from vlbench.adapters.common.logistic_regression import LogisticRegressions, OneVsRest
from vlbench.adapters.common.multilabel import (
    METRICS,
    multilabel_outcomes,
    multilabel_rows,
    multilabels_of,
    training_gaps,
)
from vlbench.adapters.common.shots import Config, Draw, first_by_content, spread_note
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows
from vlbench.stats.ranked import macro


class FewShotMultilabel:
    """The adapter. Reads train and test."""

    name: ClassVar[str] = "fewshot_multilabel"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "map11@5"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "labels"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, labels``, and for every k the logits ``scores@k`` by seed ``(N, S, C)``."""
        train, test = data.split("train"), data.split("test")
        same_classes([train, test])
        labels_NC, test_labels_NC = multilabels_of(train), multilabels_of(test)
        if training_gaps(labels_NC).all():
            raise UserError(f"{data.spec}: no class has both a positive and a negative training image")
        known, found = encoder.images(train), encoder.images(test)
        scores, chosen, notes = {}, {}, overlap_note(known.digests, found.digests)
        for shots in config.shots:
            draws, record, unlearnt, unfinished = [], [], 0, 0
            for seed in config.seeds:
                draw = draw_shots(known.digests, labels_NC, shots, seed=seed, folds=config.folds)
                drawn_NC = labels_NC[draw.rows]
                fit = _fit(known.pooled_ND[draw.rows], drawn_NC, draw.folds, config=config, device=encoder.device)
                draws.append(fit.logits(found.pooled_ND))
                unlearnt = max(unlearnt, int(training_gaps(drawn_NC).sum()))
                unfinished += not fit.converged
                found_of = {"C": fit.c, "at_grid_edge": config.at_grid_edge(fit.c)}
                quality = macro(METRICS["map11"], test_labels_NC, draws[-1]).value
                record.append({"seed": seed, **found_of, "images": len(draw.rows), "map11": quality})
            scores[f"@{shots}"], chosen[f"@{shots}"] = np.stack(draws, axis=1), record
            notes += _notes(known.digests, labels_NC, shots, unlearnt=unlearnt)
            if unfinished:
                notes.append(f"{unfinished} fits to {shots} shots stopped at {config.max_iterations} iterations")
            notes += spread_note(f"map11@{shots}", [draw["map11"] for draw in record])
        meta = {"classes": list(test.classes), "chosen": chosen, "notes": notes}
        return multilabel_rows(found, test_labels_NC, scores, meta=meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``map11@k`` and ``map@k``, each the mean over seeds."""
        found: dict[str, Outcomes] = {}
        for shots in config.shots:
            found |= multilabel_outcomes(rows, ending=f"@{shots}")
        return found

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def draw_shots(digests: Sequence[str], labels_NC: np.ndarray, shots: int, *, seed: int, folds: int) -> Draw:
    """Of every class ``shots`` distinct images that show it, all of a class that has fewer; each image once.

    Of copies one stands, the same in any order of files, also where their labels differ.
    """
    ordered = sorted(range(len(digests)), key=lambda row: (digests[row], labels_NC[row].tobytes()), reverse=True)
    single = np.array(list({digests[row]: row for row in ordered}.values()))
    drawn: set[int] = set()
    for present_N in (labels_NC[single] == 1).T:
        drawn.update(first_by_content(digests, single[present_N], shots, seed=seed))
    rows = np.array(first_by_content(digests, np.array(sorted(drawn)), len(drawn), seed=seed), dtype=np.int64)
    return Draw(rows, deal_folds(labels_NC[rows] == 1, min(folds, shots)))


def deal_folds(present_NC: np.ndarray, folds: int) -> np.ndarray:
    """The fold of every image, such that every fold has its share of every class.

    Images of the rarest class are dealt first. Each goes to the fold with the fewest of its rarest class, then of the
    next, then with the fewest images. Only numbers of images decide, never which class stands first.
    """
    total_C = present_NC.sum(axis=0)
    count_FC, size_F = np.zeros((folds, len(total_C)), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    rarest_N = np.where(present_NC, total_C, len(present_NC)).min(axis=1)
    dealt_N = np.zeros(len(present_NC), dtype=np.int64)
    for image in np.argsort(rarest_N, kind="stable").tolist():
        own = np.flatnonzero(present_NC[image])
        fullness = [
            (sorted(zip(total_C[own].tolist(), count_FC[fold, own].tolist())), int(size_F[fold]), fold)
            for fold in range(folds)
        ]
        fold = dealt_N[image] = min(fullness)[-1]
        count_FC[fold, own] += 1
        size_F[fold] += 1
    return dealt_N


def choose_c(
    features_ND: np.ndarray, labels_NC: np.ndarray, folds_N: np.ndarray, *, config: Config, device: str
) -> float | None:
    """The C of the best ``map11`` over all folds, then of the lowest log-loss, then the strongest penalty.

    A class that a fold's other images do not teach has the same part in it whatever C is.

    Returns:
        None where no fold has anything to check.
    """
    parts = []
    for fold in np.unique(folds_N):
        learn_N = folds_N != fold
        if not training_gaps(labels_NC[learn_N]).all():
            problem = LogisticRegressions(features_ND[learn_N], labels_NC[learn_N], device=device)
            parts.append((problem, features_ND[~learn_N], labels_NC[~learn_N]))
    if not parts:
        return None
    options = {"tolerance": config.search_tolerance, "max_iterations": config.max_iterations}
    starts: list[OneVsRest | None] = [None] * len(parts)
    tried: list[tuple[tuple[float, float], float]] = []
    for c in config.grid():
        quality, log_p = 0.0, 0.0
        for place, (problem, check_ND, check_NC) in enumerate(parts):
            starts[place] = fit = problem.fit(c, start=starts[place], **options)
            logits_NC = fit.logits(check_ND)
            quality += macro(METRICS["map11"], check_NC, logits_NC).value
            log_p -= float(np.logaddexp(0, np.where(check_NC == 1, -logits_NC, logits_NC))[check_NC >= 0].sum())
        tried.append(((quality, log_p), c))
    return max(tried, key=lambda item: (item[0], -item[1]))[1]


def _fit(
    features_ND: np.ndarray, labels_NC: np.ndarray, folds_N: np.ndarray, *, config: Config, device: str
) -> OneVsRest:
    """The fit to all shots."""
    c = choose_c(features_ND, labels_NC, folds_N, config=config, device=device)
    if c is None:
        raise UserError("these shots leave nothing to choose C on: take two a class or more, of two classes or more")
    problem = LogisticRegressions(features_ND, labels_NC, device=device)
    return problem.fit(c, tolerance=config.tolerance, max_iterations=config.max_iterations)


def _notes(digests: Sequence[str], labels_NC: np.ndarray, shots: int, *, unlearnt: int) -> list[str]:
    counts = [len({digests[row] for row in np.flatnonzero(of_class_N == 1)}) for of_class_N in labels_NC.T]
    few = sum(0 < count < shots for count in counts)
    notes = [f"{few} classes have fewer than {shots} training images and give all they have"] if few else []
    if unlearnt:
        notes.append(f"{unlearnt} classes have no positive or no negative among {shots} shots and score all alike")
    return notes


ADAPTER = FewShotMultilabel()
