"""Linear SVMs on frozen features: the VOC07 protocol of VirTex (arXiv 2006.06666; scripts/clf_voc07.py of its code).

Pooled features are L2-normalised. For each class a linear SVM (squared hinge, positives weighted twice) is fitted on
train and val together, with the C of {0.01, 0.1, 1, 10} that has the best mean average precision over three folds of
them; the first where several are best. The number is scikit-learn's average precision on test, averaged over classes.

Difficult images (label -1) are negatives where the SVM learns and are left out where it is tested, as there.

Two things are settled here that are open there: liblinear's random state is a setting, and images stand in the order of
their content, which decides the folds, rather than in that of a file list. So no number depends on either.

Shape suffixes: N images, D pooled width, C classes.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from vlbench.adapters.common.classification import estimates, overlap_note, same_classes, unit
from vlbench.adapters.common.multilabel import multilabel_outcomes, multilabel_rows, multilabels_of
from vlbench.core.config import Config as BaseConfig
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows
from vlbench.stats.ranked import average_precision


class Config(BaseConfig):
    """Settings of the SVMs; the defaults are VirTex's."""

    costs: tuple[float, ...] = Field(default=(0.01, 0.1, 1.0, 10.0), min_length=1, description="values of C tried")
    positive_weight: float = Field(
        default=2.0, gt=0, description="weight of a positive image's loss; a negative's is 1"
    )
    folds: int = Field(default=3, ge=2, description="of cross-validation")
    max_iterations: int = Field(default=2000, ge=1, description="of liblinear")
    random_state: int = Field(default=0, ge=0, description="of liblinear's coordinate descent")


class SVM:
    """The adapter. Reads train, val where there is one (together they are trainval), and test."""

    name: ClassVar[str] = "svm"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "map"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "labels"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    peer: ClassVar[str] = "VirTex"

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, labels, scores``; the scores are distances from the hyperplane."""
        sources, test = [data.split(name) for name in ("train", "val") if data.has(name)], data.split("test")
        same_classes([*sources, test])
        features = [encoder.images(source) for source in sources]
        digests = [image for part in features for image in part.digests]
        labels_NC = np.concatenate([multilabels_of(source) for source in sources])
        train_ND = unit(np.concatenate([part.pooled_ND for part in features]))
        # Copies of an image are told apart by their labels.
        order = sorted(range(len(digests)), key=lambda row: (digests[row], labels_NC[row].tobytes()))
        found = encoder.images(test)
        test_ND = unit(found.pooled_ND)
        scores_NC, costs, constant, unfinished = np.zeros((len(test_ND), labels_NC.shape[1])), [], [], 0
        for c, name in enumerate(test.classes):
            positive_N = labels_NC[order, c] == 1
            if min(positive_N.sum(), (~positive_N).sum()) < config.folds:
                constant.append(name)
                costs.append(None)
                continue
            cost, machine = fit_svm(train_ND[order], positive_N, config)
            costs.append(cost)
            unfinished += int(machine.n_iter_ >= config.max_iterations)
            scores_NC[:, c] = machine.decision_function(test_ND)
        if len(constant) == len(costs):
            raise UserError(f"{data.spec}: no class has {config.folds} positive and {config.folds} negative images")
        meta = {
            "classes": list(test.classes),
            "train_images": len(digests),
            "chosen": {"C": costs},
            "notes": [*_notes(constant, unfinished, config), *overlap_note(digests, found.digests)],
        }
        return multilabel_rows(found, multilabels_of(test), scores_NC, meta=meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``map11`` and ``map``."""
        return multilabel_outcomes(rows)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def fit_svm(features_ND: np.ndarray, positive_N: np.ndarray, config: Config) -> tuple[float, Any]:
    """The C of the best cross-validated average precision, and the SVM that has it, fitted on all images."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold

    target_N = np.where(positive_N, 1, -1)
    folds = list(StratifiedKFold(config.folds).split(features_ND, target_N))  # what cross_val_score makes of cv=3

    def quality(cost: float) -> float:
        found = []
        for learn, check in folds:
            machine = _machine(cost, config).fit(features_ND[learn], target_N[learn])
            found.append(average_precision(positive_N[check], machine.decision_function(features_ND[check])).value)
        return float(np.mean(found))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead, of the SVMs that are reported
        best = max(config.costs, key=quality)  # of equals, the first
        return best, _machine(best, config).fit(features_ND, target_N)


def _machine(cost: float, config: Config) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(
        C=cost,
        class_weight={1: config.positive_weight, -1: 1},
        penalty="l2",
        loss="squared_hinge",
        dual=True,  # scikit-learn's default when the protocol was written
        max_iter=config.max_iterations,
        random_state=config.random_state,
    )


def _notes(constant: list[str], unfinished: int, config: Config) -> list[str]:
    notes = []
    if constant:
        few = f"{len(constant)} classes lack {config.folds} images on one side and score all alike"
        notes.append(f"{few}, first {constant[0]!r}")
    if unfinished:
        notes.append(f"{unfinished} SVMs stopped after {config.max_iterations} iterations without converging")
    return notes


ADAPTER = SVM()
