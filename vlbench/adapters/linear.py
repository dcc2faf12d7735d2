"""Linear probe: logistic regression on frozen pooled features (the protocol of CLIP, arXiv 2103.00020).

The penalty is chosen on data that are never reported: the validation split, or, where there is none, a fifth of the
training images held out by class and by content. The classifier is then fitted again on training and validation images
together, and the test split is looked at once.

The search is the paper's: C in [1e-6, 1e6], 96 steps on a log scale, first every sixteenth, then half-way round the
best until neighbours are one step apart. ``search: grid`` tries every value instead, along one regularisation path
(``common.softmax_path``). C is scikit-learn's, on features divided by one number (``common.softmax_regression``).

Shape suffixes: N examples, D pooled width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat, SerializerFunctionWrapHandler, model_serializer, model_validator

from vlbench.adapters.common.classification import (
    chance_of,
    classification_outcomes,
    estimates,
    labels_of,
    majority_guess,
    overlap_note,
    prediction_rows,
    same_classes,
)
from vlbench.adapters.common.search import Point, coarse_to_fine
from vlbench.adapters.common.softmax_regression import Fit, SoftmaxRegression
from vlbench.core.config import Config as BaseConfig
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows

if TYPE_CHECKING:
    from vlbench.adapters.encoder import ImageFeatures


class Config(BaseConfig):
    """Settings of the probe."""

    c_low: float = Field(default=1e-6, gt=0, description="weakest C of the grid (CLIP A.3)")
    c_high: float = Field(default=1e6, gt=0, description="strongest C of the grid (CLIP A.3)")
    c_steps: int = Field(default=96, ge=1, description="steps between them on a log scale (CLIP A.3)")
    c_stride: int = Field(default=16, ge=1, description="steps between the first values tried; halved until it is one")
    search: Literal["coarse", "grid"] = Field(default="coarse", description="coarse: as in CLIP A.3; grid: every value")
    c_grid: tuple[PositiveFloat, ...] = Field(
        default=(), description="the values of `search: grid`; none: every step from c_low to c_high"
    )
    c: float | None = Field(default=None, gt=0, description="a fixed C: nothing is searched")
    held_out: float = Field(default=0.2, gt=0, lt=1, description="share of train held out where there is no val split")
    max_iterations: int = Field(default=1000, ge=1, description="of L-BFGS (CLIP A.3)")
    tolerance: float = Field(default=1e-5, gt=0, description="largest gradient entry of the final fit")
    search_tolerance: float = Field(
        default=1e-4,
        gt=0,
        description="largest gradient entry while C is searched; of `search: grid` ten times its square is the share "
        "of the objective that a fit may leave",
    )

    @property
    def path_tolerance(self) -> float:
        """The share of the objective that a fit of the path may leave: it falls with the square of the gradient."""
        return 10 * self.search_tolerance**2

    @model_validator(mode="after")
    def _grid_has_a_search(self) -> Config:
        if self.c_grid and self.search != "grid":
            raise ValueError("c_grid is read by `search: grid` alone: add it, or leave c_grid out")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The default search is recorded as it was before there was another: so older results stay comparable."""
        values = write(self)
        return values if self.search == "grid" else {k: v for k, v in values.items() if k not in ("search", "c_grid")}


class Linear:
    """The adapter. Reads train, val where there is one, and test."""

    name: ClassVar[str] = "linear"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "acc1"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "label"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, label, pred, rank, correct, p`` (``p`` is the right class's probability)."""
        names = ["train", "val"] if data.has("val") else ["train"]
        sources = [data.split(name) for name in names]
        test = data.split("test")
        same_classes([*sources, test])
        labels = [labels_of(source) for source in sources]
        test_labels_N = labels_of(test)
        features = [encoder.images(source) for source in sources]
        train_ND, train_labels_N, choosing = _choosing_set(features, labels, config)

        classes = list(test.classes)
        present = np.unique(train_labels_N)
        if len(present) < 2:
            raise UserError(f"{data.spec}: the training images have one class only; a probe needs two")
        fit, search = _search_and_fit(train_ND, train_labels_N, choosing, config=config, device=encoder.device)

        found = encoder.images(test)
        p_N = np.empty(len(test_labels_N))
        scores = _logit_blocks(fit, found.pooled_ND, present, test_labels_N, n_classes=len(classes), p_N=p_N)
        n_answers = data.told_apart or len(classes)
        classes, scores = classes[:n_answers], (scores_BC[:, :n_answers] for scores_BC in scores)
        notes = [*search.pop("notes"), *overlap_note({d for f in features for d in f.digests}, found.digests)]
        unseen = sum(label not in present for label in range(n_answers))
        if unseen:
            notes.append(f"{unseen} classes have no training image and are never predicted")
        majority = majority_guess(train_labels_N, test_labels_N)
        meta = {
            "classes": classes,
            "train_images": len(train_labels_N),
            "chance": chance_of(len(classes), majority, top5=True),
            "notes": notes,
            **search,
        }
        rows = prediction_rows(found, test_labels_N, scores, meta=meta)
        return Rows({**rows.columns, "p": p_N}, rows.meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``acc1``, ``acc5`` where there are more than five classes, ``mean_per_class_recall``."""
        return classification_outcomes(rows, top5=True)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def hold_out(digests: Sequence[str], labels_N: np.ndarray, share: float) -> np.ndarray:
    """Which examples to hold out: a bool array with ``share`` of the distinct images of every class.

    Images are taken in the order of their digests, which is random to their content and the same for ever, on any
    machine and in any order of files. Copies of one image stay on one side. A class with one image keeps it.
    """
    held = set()
    for label in np.unique(labels_N):
        images = sorted({digests[row] for row in np.flatnonzero(labels_N == label)})
        held.update(images[: min(max(1, round(share * len(images))), len(images) - 1)])
    return np.array([image in held for image in digests])


def search_c(
    problem: SoftmaxRegression, val_ND: np.ndarray, val_labels_N: np.ndarray, config: Config
) -> dict[str, Any]:
    """The C that is best on ``val``: highest accuracy, then lowest log-loss, then strongest penalty.

    Returns:
        ``c``, ``val_accuracy``, ``fits`` (how many were made), ``edge`` (whether C is the first or last of the grid),
        ``unconverged`` (how many fits of a path were given up on).
    """
    grid = np.logspace(np.log10(config.c_low), np.log10(config.c_high), config.c_steps + 1)
    if config.search == "grid":
        grid = np.unique(config.c_grid) if config.c_grid else grid
        path = problem.path(grid, tolerance=config.path_tolerance, max_iterations=config.max_iterations)
        judged = [(_quality(fit.logits(val_ND), val_labels_N), fit.converged) for fit in path]
        chosen = max(range(len(grid)), key=lambda index: (judged[index][0], -index))
        return {
            "c": float(grid[chosen]),
            "val_accuracy": judged[chosen][0][0],
            "edge": len(grid) > 1 and chosen in (0, len(grid) - 1),
            "fits": len(grid),
            "unconverged": sum(not converged for _, converged in judged),
        }
    fits: dict[int, Fit] = {}

    def evaluate(points: Sequence[Point]) -> list[tuple[float, float]]:
        for _, index in points:
            near = min(fits, key=lambda other: (abs(other - index), other), default=None)
            start = fits[near] if near is not None else None
            options = {"tolerance": config.search_tolerance, "max_iterations": config.max_iterations}
            fits[index] = problem.fit(float(grid[index]), start=start, **options)
        return [_quality(fits[index].logits(val_ND), val_labels_N) for _, index in points]

    # Upwards, from the strongest penalty: each fit starts at the one before, and the hard ones start near their end.
    # Past the point where accuracy and log-loss both get worse lies only overfitting, and the slowest fits of all.
    found = coarse_to_fine(
        len(grid), evaluate, stride=config.c_stride, give_up=lambda before, now: all(np.less(now, before))
    )
    return {
        "c": float(grid[found.best[1]]),
        "val_accuracy": found.quality[0],
        "edge": found.at_edge,
        "fits": found.tried,
        "unconverged": 0,
    }


def _choosing_set(
    features: Sequence[ImageFeatures], labels: Sequence[np.ndarray], config: Config
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All images that may be learnt from, their labels, and which of them C is chosen on."""
    pooled_ND = np.concatenate([part.pooled_ND for part in features])
    labels_N = np.concatenate(list(labels))
    if len(features) == 2:
        choosing = np.arange(len(labels_N)) >= len(labels[0])
    else:
        choosing = hold_out(features[0].digests, labels_N, config.held_out)
    return pooled_ND, labels_N, choosing


def _search_and_fit(
    train_ND: np.ndarray, labels_N: np.ndarray, choosing: np.ndarray, *, config: Config, device: str
) -> tuple[Fit, dict[str, Any]]:
    """The final fit on everything, and what to record of how it came about."""
    found: dict[str, Any] = {"c": config.c, "val_accuracy": None, "fits": 0, "edge": False}
    notes = []
    if config.c is None:
        classes, dense_N = np.unique(labels_N[~choosing], return_inverse=True)
        # A class that only the choosing set has cannot be right there, whatever C is: it does not help to choose.
        usable = choosing & np.isin(labels_N, classes)
        if len(classes) < 2 or not usable.any():
            raise UserError("too few training images to choose C; set the protocol's c, or give more images a class")
        problem = SoftmaxRegression(train_ND[~choosing], dense_N, len(classes), device=device)
        found = search_c(problem, train_ND[usable], np.searchsorted(classes, labels_N[usable]), config)
        if found["edge"]:
            notes.append(f"the best C, {found['c']:g}, is at the edge of the grid")
        if found["unconverged"]:
            notes.append(f"{found['unconverged']} of {found['fits']} fits of the path did not converge")
    classes, dense_N = np.unique(labels_N, return_inverse=True)
    problem = SoftmaxRegression(train_ND, dense_N, len(classes), device=device)
    fit = problem.fit(found["c"], tolerance=config.tolerance, max_iterations=config.max_iterations)
    if not fit.converged:
        notes.append(f"the final fit stopped after {fit.iterations} iterations without converging")
    record = {
        "chosen": {"C": found["c"], "val_accuracy": found["val_accuracy"], "at_grid_edge": found["edge"]},
        "fit": {"iterations": fit.iterations, "converged": fit.converged, "searched": found["fits"]},
        "notes": notes,
    }
    return fit, record


def _logit_blocks(
    fit: Fit, pooled_ND: np.ndarray, present: np.ndarray, labels_N: np.ndarray, *, n_classes: int, p_N: np.ndarray
) -> Iterator[np.ndarray]:
    """Logits over all classes, block by block; the right class's probability is left in ``p_N``."""
    for start in range(0, len(pooled_ND), 4096):
        log_p_NC = _log_softmax(fit.logits(pooled_ND[start : start + 4096]))
        log_all_NC = np.full((len(log_p_NC), n_classes), -np.inf)
        log_all_NC[:, present] = log_p_NC
        rows = slice(start, start + len(log_p_NC))
        p_N[rows] = np.exp(log_all_NC[np.arange(len(log_p_NC)), labels_N[rows]])
        # A class that was never seen ranks last, by a finite margin.
        yield np.where(np.isfinite(log_all_NC), log_all_NC, log_p_NC.min() - 1.0)


def _quality(logits_NC: np.ndarray, labels_N: np.ndarray) -> tuple[float, float]:
    """Accuracy and minus log-loss."""
    log_p_NC = _log_softmax(logits_NC)
    own_N = log_p_NC[np.arange(len(labels_N)), labels_N]
    return float((logits_NC.argmax(axis=1) == labels_N).mean()), float(own_N.mean())


def _log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    return shifted_NC - np.log(np.exp(shifted_NC).sum(axis=1, keepdims=True))


ADAPTER = Linear()
