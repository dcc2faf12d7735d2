"""CLIP_benchmark's linear probe, as a protocol of its own: its numbers, to be seen beside those of ``linear``.

Features are L2-normalised; a linear layer is trained by AdamW at a learning rate of 0.1 that falls to 0 by a cosine,
10 epochs in batches of 64. Where there is a val split, the weight decay is the best of a grid of 97 on it, from coarse
to fine, and the layer is then trained again on train and val together; else it is 0. The rate is never searched and
training stops far from convergence, so the probe may say more of the feature's length and spread than of what it holds.

Features are the joint embedding of a model that has one, as there (``encode_image``), and the pooled feature of any
other. The order of batches and the first weights depend on the seed, the images and the names of the classes alone, not
on whether features were computed or read; of equally good weight decays the one tried first is kept, where there
the smaller one is; arithmetic is float32, where there mixed precision is the default.

Shape suffixes: N images, D width of the features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

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
    unit,
)
from vlbench.adapters.common.minibatch import Problem, Training, random_head, train_heads
from vlbench.adapters.common.search import Point, coarse_to_fine
from vlbench.adapters.common.selection import Checked, qualities
from vlbench.core.config import Config as BaseConfig
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows


class Config(BaseConfig):
    """Settings of the probe; the defaults are CLIP_benchmark's."""

    lr: float = Field(default=0.1, gt=0, description="learning rate at the start of the cosine")
    epochs: int = Field(default=10, ge=1, description="passes over the training images")
    batch_size: int = Field(default=64, ge=1, description="images in a step")
    wd_log_low: float = Field(default=-6, description="log10 of the weakest weight decay")
    wd_log_high: float = Field(default=2, description="log10 of the strongest")
    wd_count: int = Field(default=97, ge=1, description="weight decays, evenly on a log scale")
    wd_stride: int = Field(default=16, ge=1, description="steps between the first decays tried; halved until it is one")
    seed: int = Field(default=0, ge=0, description="of the order of batches and of the first weights")


class ClipBenchmarkProbe:
    """The adapter. Reads train, val where there is one, and test."""

    name: ClassVar[str] = "clip_benchmark_probe"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "acc1"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "label"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    peer: ClassVar[str] = "CLIP_benchmark"

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """Rows ``id, image, label, pred, rank, correct``."""
        sources, test = [data.split(name) for name in ("train", "val") if data.has(name)], data.split("test")
        same_classes([*sources, test])
        labels, test_labels_N = [labels_of(source) for source in sources], labels_of(test)
        features = [encoder.images(source) for source in sources]
        parts = [_normalised(part) for part in features]
        classes, found = list(test.classes), encoder.images(test)
        training = Training("adamw", "cosine", False, False, config.batch_size, config.seed)
        start = random_head(classes, parts[0].shape[1], seed=config.seed)
        wd, meta = 0.0, {"chosen": {"weight_decay": 0.0}, "notes": []}
        if len(sources) == 2:
            checked = Checked.of(parts[1], labels[1], "acc1", device=encoder.device)
            # Not kept in a variable: it is gone from the device before the final fit brings all images there.
            wd, meta = _choose_decay(
                Problem.of(parts[0], labels[0], features[0].digests, device=encoder.device),
                start,
                checked,
                training,
                config,
            )
        digests = [image for part in features for image in part.digests]
        everything = Problem.of(np.concatenate(parts), np.concatenate(labels), digests, device=encoder.device)
        heads = train_heads(everything, start, [(config.lr, wd)], epochs=config.epochs, training=training)
        logits_NC = Checked.of(_normalised(found), test_labels_N, "acc1", device=encoder.device).logits(heads, 0)
        if not np.isfinite(logits_NC).all():
            raise UserError(f"the fit diverged at learning rate {config.lr:g}: lower the protocol's lr")
        majority = majority_guess(np.concatenate(labels), test_labels_N)
        meta |= {
            "classes": classes,
            "train_images": len(digests),
            "feature": "pooled" if found.embed_NE is None else "embed",
            "chance": chance_of(len(classes), majority, top5=True),
            "notes": [*meta["notes"], *overlap_note(digests, found.digests)],
        }
        return prediction_rows(found, test_labels_N, [logits_NC], meta=meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``acc1``, ``acc5`` where there are more than five classes, ``mean_per_class_recall``; ``roc_auc`` of two."""
        return classification_outcomes(rows, top5=True)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def _normalised(features: Any) -> np.ndarray:
    return unit(features.pooled_ND if features.embed_NE is None else features.embed_NE).astype(np.float32)


def _choose_decay(
    problem: Problem, start: tuple[np.ndarray, np.ndarray], val: Checked, training: Training, config: Config
) -> tuple[float, dict[str, Any]]:
    """The weight decay of the best accuracy on val after the last epoch, and what to record of the search."""
    decays = np.logspace(config.wd_log_low, config.wd_log_high, config.wd_count)

    def evaluate(points: Sequence[Point]) -> list[float]:
        settings = [(config.lr, float(decays[index])) for _, index in points]
        return qualities(problem, start, settings, val, epochs=config.epochs, training=training, best_epoch=False)

    search = coarse_to_fine(len(decays), evaluate, stride=config.wd_stride)
    wd = float(decays[search.best[1]])
    notes = [f"the best weight decay, {wd:g}, is at the edge of the grid"] if search.at_edge else []
    chosen = {"weight_decay": wd, "val_accuracy": search.quality, "at_grid_edge": search.at_edge}
    return wd, {"chosen": chosen, "fit": {"searched": search.tried}, "notes": notes}


ADAPTER = ClipBenchmarkProbe()
