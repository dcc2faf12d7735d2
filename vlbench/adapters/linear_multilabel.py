"""Linear probe of images with several labels: one-vs-rest logistic regression on frozen pooled features.

One C for all classes is chosen on data that are never reported, by the metric itself: on the validation split, or,
where there is none, on a fifth of the training images, held out by content. The grid is that of ``linear``; all of its
coarse values are tried before any finer one. The classifiers are then fitted again on training and validation images
together. A label of -1 is left out of that class's loss; a class whose training images are all positive, or all not,
scores every image the same.

Shape suffixes: N images, D pooled width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from vlbench.adapters.common.classification import estimates, overlap_note, same_classes
from vlbench.adapters.common.logistic_regression import LogisticRegressions
from vlbench.adapters.common.multilabel import (
    METRICS,
    held_out,
    multilabel_outcomes,
    multilabel_rows,
    multilabels_of,
)
from vlbench.adapters.common.search import Point, Searched, coarse_to_fine
from vlbench.core.config import Config as BaseConfig
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows
from vlbench.stats.ranked import macro


class Config(BaseConfig):
    """Settings of the probe."""

    c_low: float = Field(default=1e-6, gt=0, description="weakest C of the grid (CLIP A.3)")
    c_high: float = Field(default=1e6, gt=0, description="strongest C of the grid (CLIP A.3)")
    c_steps: int = Field(default=96, ge=1, description="steps between them on a log scale (CLIP A.3)")
    c_stride: int = Field(default=16, ge=1, description="steps between the first values tried; halved until it is one")
    c: float | None = Field(default=None, gt=0, description="a fixed C: nothing is searched")
    chosen_by: Literal["map11", "map"] = Field(default="map11", description="the metric that C is chosen by")
    held_out: float = Field(default=0.2, gt=0, lt=1, description="share of train held out where there is no val split")
    max_iterations: int = Field(default=1000, ge=1, description="of L-BFGS (CLIP A.3)")
    tolerance: float = Field(default=1e-5, gt=0, description="largest gradient entry of the final fit")
    search_tolerance: float = Field(default=1e-4, gt=0, description="largest gradient entry while C is searched")


class LinearMultilabel:
    """The adapter. Reads train, val where there is one, and test."""

    name: ClassVar[str] = "linear_multilabel"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "map11"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "labels"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, labels, scores``; the scores are logits."""
        names = ["train", "val"] if data.has("val") else ["train"]
        sources, test = [data.split(name) for name in names], data.split("test")
        same_classes([*sources, test])
        labels = [multilabels_of(source) for source in sources]
        features = [encoder.images(source) for source in sources]
        train_ND = np.concatenate([part.pooled_ND for part in features])
        train_labels_NC = np.concatenate(labels)
        digests = [image for part in features for image in part.digests]
        choosing_N = (
            np.arange(len(digests)) >= len(labels[0]) if len(names) == 2 else held_out(digests, config.held_out)
        )
        c, meta = config.c, {"chosen": {"C": config.c}, "notes": []}
        if c is None:
            c, meta = _choose_c(train_ND, train_labels_NC, choosing_N, config=config, device=encoder.device)
        problem = LogisticRegressions(train_ND, train_labels_NC, device=encoder.device)
        fit = problem.fit(c, tolerance=config.tolerance, max_iterations=config.max_iterations)
        found = encoder.images(test)
        notes = [*meta.pop("notes"), *overlap_note(digests, found.digests)]
        if not fit.converged:
            notes.append(f"the final fit stopped after {fit.iterations} iterations without converging")
        if gaps := int((~problem.learnt_C).sum()):
            notes.append(f"{gaps} classes have no positive or no negative training image")
        meta |= {"classes": list(test.classes), "train_images": len(digests), "notes": notes}
        return multilabel_rows(found, multilabels_of(test), fit.logits(found.pooled_ND), meta=meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``map11`` and ``map``."""
        return multilabel_outcomes(rows)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def _choose_c(
    features_ND: np.ndarray, labels_NC: np.ndarray, choosing_N: np.ndarray, *, config: Config, device: str
) -> tuple[float, dict[str, Any]]:
    """The C that is best on the images held out, of equals the one tried first, and what to record of the search."""
    grid = np.logspace(np.log10(config.c_low), np.log10(config.c_high), config.c_steps + 1)
    metric, held_NC = METRICS[config.chosen_by], labels_NC[choosing_N]
    options = {"tolerance": config.search_tolerance, "max_iterations": config.max_iterations}
    problem = LogisticRegressions(features_ND[~choosing_N], labels_NC[~choosing_N], device=device)

    def evaluate(points: Sequence[Point]) -> list[float]:
        qualities, fit = [], None
        for _, index in points:
            fit = problem.fit(float(grid[index]), start=fit, **options)
            qualities.append(macro(metric, held_NC, fit.logits(features_ND[choosing_N])).value)
        return qualities

    if not (held_NC == 1).any():
        raise UserError("the images held out to choose C have no positive; set the protocol's c, or give more images")
    search: Searched = coarse_to_fine(len(grid), evaluate, stride=config.c_stride)
    c = float(grid[search.best[1]])
    chosen = {"C": c, f"val_{config.chosen_by}": search.quality, "at_grid_edge": search.at_edge}
    notes = [f"the best C, {c:g}, is at the edge of the grid"] if search.at_edge else []
    return c, {"chosen": chosen, "fit": {"searched": search.tried}, "notes": notes}


ADAPTER = LinearMultilabel()
