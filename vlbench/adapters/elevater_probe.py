"""ELEVATER's linear probe with its automatic search (Li et al. 2022, arXiv 2204.08790), and what its flaw is worth.

Frozen features pass a BatchNorm without weights and a linear layer, trained by SGD (momentum 0.9, constant rate, batch
64, no augmentation). Learning rate and weight decay are searched on a fifth of the training images: six rates, and for
each a grid of 97 decays from coarse to fine, 10 epochs a fit, a fit being worth its best epoch there. The best pair
trains 50 epochs on all training images; an official val split is left alone, as it is there.

ELEVATER then reports the best of the 50 epochs *on test*. Here the last epoch is the number; beside it stand
``<metric>_best_on_test``, which is ELEVATER's, and their difference ``best_on_test_gap``.

What differs besides:

- the fifth is taken in the order of the images' content, not of a file list; with several labels it is a fifth of all
  images where ELEVATER balances classes greedily; a class with one image keeps it for learning;
- features are computed once in evaluation mode; there a BatchNorm or dropout inside the frozen tower runs in training
  mode;
- every fit draws the same batches and starts at the same weights;
- the right-hand neighbour of a weight decay is tried for what it is: the first release fitted the left one again;
- several labels are ranked by their logits: there a softmax over classes comes between;
- a fit that diverges is the worst there is, and counted, not a score of 0 in silence;
- the random head reads the pooled feature; ``language`` starts at the zero-shot class embeddings, reads the joint space
  and keeps the logit scale at 1, which is ELEVATER's default;
- patch-camelyon's search on 10,000 images a class is not made smaller.

Shape suffixes: N images, D width of the features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

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
from vlbench.adapters.common.minibatch import Heads, Problem, Training, random_head, train_heads
from vlbench.adapters.common.multilabel import held_out, multilabel_outcomes, multilabel_rows, multilabels_of
from vlbench.adapters.common.prompts import class_embeddings, templates_of
from vlbench.adapters.common.search import Point, coarse_to_fine
from vlbench.adapters.common.selection import Checked, MetricName, qualities
from vlbench.core.config import Config as BaseConfig
from vlbench.core.errors import UserError
from vlbench.core.types import BEST_ON_TEST_GAP, Estimate, Outcomes, Part, Provides, Rows

BEST = "_best_on_test"


class Config(BaseConfig):
    """Settings of the probe; the defaults are ELEVATER's."""

    head: Literal["random", "language"] = Field(
        default="random", description="first weights: random, or the class embeddings of the model's own text tower"
    )
    metric: MetricName | None = Field(
        default=None,
        description="what chooses settings, and the best epoch on test; none: acc1, or map11 of many labels",
    )
    lr_log_low: float = Field(default=-6, description="log10 of the lowest learning rate")
    lr_log_high: float = Field(default=-1, description="log10 of the highest")
    lr_count: int = Field(default=6, ge=1, description="learning rates, evenly on a log scale")
    wd_log_low: float = Field(default=-6, description="log10 of the weakest weight decay")
    wd_log_high: float = Field(default=6, description="log10 of the strongest")
    wd_count: int = Field(default=97, ge=1, description="weight decays, evenly on a log scale")
    wd_stride: int = Field(default=16, ge=1, description="steps between the first decays tried; halved until it is one")
    held_out: float = Field(default=0.2, gt=0, lt=1, description="share of every class held out for the search")
    search_epochs: int = Field(default=10, ge=1, description="of a fit of the search")
    epochs: int = Field(default=50, ge=1, description="of the final fit")
    batch_size: int = Field(default=64, ge=2, description="images in a step")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD")
    seed: int = Field(default=0, ge=0, description="of the order of batches and of a random head")


@dataclass(frozen=True)
class _Task:
    """One task's training images and how heads are trained on them."""

    features_ND: np.ndarray
    labels: np.ndarray
    digests: tuple[str, ...]
    start: tuple[np.ndarray, np.ndarray]
    metric: MetricName
    training: Training
    device: str

    def problem(self, rows: np.ndarray | slice = slice(None)) -> Problem:
        """Some of the images."""
        digests = np.array(self.digests)[rows].tolist()
        return Problem.of(self.features_ND[rows], self.labels[rows], digests, device=self.device)


class ElevaterProbe:
    """The adapter. Reads train and test, of one label an image or of several."""

    name: ClassVar[str] = "elevater_probe"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "acc1"
    needs: ClassVar[frozenset[Part]] = frozenset({"image"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    peer: ClassVar[str] = "ELEVATER"

    def reads_prompts(self, config: Config) -> bool:
        """Whether class names and templates decide the number."""
        return config.head == "language"

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows of the last epoch, as of ``linear`` or ``linear_multilabel``, and of the best on test (``..._best``)."""
        train, test = data.split("train"), data.split("test")
        same_classes([train, test])
        read = multilabels_of if "labels" in test.provides else labels_of
        labels, test_labels = read(train), read(test)
        known, found = encoder.images(train), encoder.images(test)
        features_ND, test_ND, start = _features_and_start(encoder, data, known, found, config=config)
        training = Training(
            optimizer="sgd",
            schedule="constant",
            batch_norm=True,
            multilabel=labels.ndim == 2,
            batch_size=config.batch_size,
            seed=config.seed,
            momentum=config.momentum,
        )
        metric = _metric(config.metric, labels, data.spec)
        task = _Task(features_ND, labels, known.digests, start, metric, training, encoder.device)
        setting, meta = _search(task, config)
        last_NC, best_NC, epoch = _final(
            task, setting, Checked.of(test_ND, test_labels, metric, device=task.device), config
        )
        meta |= {
            "classes": list(test.classes),
            "train_images": len(labels),
            "selected_by": metric,
            "best_epoch_on_test": epoch,
            "notes": [*meta["notes"], *overlap_note(known.digests, found.digests)],
        }
        if labels.ndim == 1:
            majority = majority_guess(labels, test_labels)
            meta["chance"] = chance_of(len(test.classes), majority, top5=True)
        make = multilabel_rows if labels.ndim == 2 else _one_label_rows
        last, best = (make(found, test_labels, scores_NC, meta=meta) for scores_NC in (last_NC, best_NC))
        return _joined(last, best, metric)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """The metrics of the last epoch, and of ``selected_by`` the best on test and the gap between the two."""
        best_rows = Rows({**rows.columns, **_best_columns(rows)}, rows.meta)
        last, best = (
            multilabel_outcomes(of) if "labels" in of.columns else classification_outcomes(of, top5=True)
            for of in (rows, best_rows)
        )
        metric = rows.meta["selected_by"]
        if metric not in last:
            return last
        a, b = last[metric], best[metric]
        gap = Outcomes(a.ids, np.asarray(b.values) - np.asarray(a.values), a.clusters, binary=False, strata=a.strata)
        return {**last, metric + BEST: b, BEST_ON_TEST_GAP: gap}

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def hold_out_first(digests: Sequence[str], labels: np.ndarray, share: float) -> np.ndarray:
    """The first ``ceil(share * n)`` distinct images of every class in the order of their content, never all of them."""
    if labels.ndim == 2:
        return held_out(digests, share)
    held = set()
    for label in np.unique(labels):
        images = sorted({digests[row] for row in np.flatnonzero(labels == label)})
        held.update(images[: min(math.ceil(share * len(images)), len(images) - 1)])
    return np.array([image in held for image in digests])


def _metric(asked: MetricName | None, labels: np.ndarray, spec: str) -> MetricName:
    several = labels.ndim == 2
    metric: MetricName = asked or ("map11" if several else "acc1")
    if (metric in ("map11", "map")) != several:
        form = "many labels" if several else "one label"
        raise UserError(f"{spec}: the protocol's metric {metric!r} is not one of data with {form}")
    if metric == "roc_auc" and labels.max() > 1:
        raise UserError(f"{spec}: the protocol's metric 'roc_auc' needs two classes")
    return metric


def _features_and_start(
    encoder: Any, data: Any, known: Any, found: Any, *, config: Config
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Features of training and test images, and the weights and biases that every fit starts from."""
    if config.head == "random":
        classes = list(data.split("test").classes)
        return known.pooled_ND, found.pooled_ND, random_head(classes, known.pooled_ND.shape[1], seed=config.seed)
    if known.embed_NE is None:
        raise UserError("the protocol's head 'language' needs a model with a text tower; use 'random'")
    class_CE = class_embeddings(encoder, list(data.classnames), templates_of(data))
    return known.embed_NE, found.embed_NE, (class_CE, np.zeros(len(class_CE)))


def _search(task: _Task, config: Config) -> tuple[tuple[float, float], dict[str, Any]]:
    """The best (learning rate, weight decay) on the images held out, and what to record of the search."""
    rates = np.logspace(config.lr_log_low, config.lr_log_high, config.lr_count)
    decays = np.logspace(config.wd_log_low, config.wd_log_high, config.wd_count)
    held_N = hold_out_first(task.digests, task.labels, config.held_out)
    if not held_N.any():
        raise UserError("every class has one training image only: nothing can be held out to choose settings")
    checked = Checked.of(task.features_ND[held_N], task.labels[held_N], task.metric, device=task.device)
    problem = task.problem(~held_N)
    diverged = 0

    def evaluate(points: Sequence[Point]) -> list[float]:
        nonlocal diverged
        settings = [(float(rates[rate]), float(decays[decay])) for rate, decay in points]
        found = qualities(
            problem, task.start, settings, checked, epochs=config.search_epochs, training=task.training, best_epoch=True
        )
        diverged += int(np.isneginf(found).sum())
        return found

    search = coarse_to_fine(len(decays), evaluate, stride=config.wd_stride, searches=len(rates))
    if np.isneginf(search.quality):
        raise UserError("every fit of the search diverged: lower the protocol's learning rates or weight decays")
    lr, wd = float(rates[search.best[0]]), float(decays[search.best[1]])
    notes = [f"the best weight decay, {wd:g}, is at the edge of the grid"] if search.at_edge else []
    return (lr, wd), {
        "chosen": {"lr": lr, "weight_decay": wd, f"val_{task.metric}": search.quality, "at_grid_edge": search.at_edge},
        "fit": {"searched": search.tried, "diverged": diverged},
        "notes": notes,
    }


def _final(
    task: _Task, setting: tuple[float, float], test: Checked, config: Config
) -> tuple[np.ndarray, np.ndarray, int]:
    """Logits on test after the last epoch and after the one best on test, and which that was, from 1."""
    seen: list[float] = []
    best: list[np.ndarray] = []

    def look(heads: Heads, part: slice) -> None:
        logits_NC = test.logits(heads, 0)
        quality = test.quality(logits_NC)
        if not seen or quality > max(seen):
            best[:] = [logits_NC]
        seen.append(quality)

    heads = train_heads(
        task.problem(), task.start, [setting], epochs=config.epochs, training=task.training, after_epoch=look
    )
    last_NC = test.logits(heads, 0)
    if not np.isfinite(last_NC).all():
        raise UserError(f"the final fit diverged at learning rate {setting[0]:g}: lower the protocol's lr_log_high")
    return last_NC, best[0], 1 + int(np.argmax(seen))


def _one_label_rows(features: Any, labels_N: np.ndarray, scores_NC: np.ndarray, *, meta: dict[str, Any]) -> Rows:
    return prediction_rows(features, labels_N, [scores_NC], meta=meta)


def _joined(last: Rows, best: Rows, metric: str) -> Rows:
    """The rows of the last epoch with what is needed of the best, and the chance level of the added metrics."""
    added = {f"{name}_best": best[name] for name in ("pred", "rank", "score", "scores") if name in best.columns}
    chance = dict(last.meta["chance"])
    if metric in chance:
        chance |= {metric + BEST: chance[metric], BEST_ON_TEST_GAP: 0.0}
    return Rows({**last.columns, **added}, {**last.meta, "chance": chance})


def _best_columns(rows: Rows) -> dict[str, Any]:
    return {name.removesuffix("_best"): rows[name] for name in rows if name.endswith("_best")}


ADAPTER = ElevaterProbe()
