"""How good heads are on images that they did not learn from: what hyper-parameters, and epochs, are chosen by.

Shape suffixes: N images, D width of the features, C classes, K heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from vlbench.adapters.common.minibatch import Heads, Problem, Training, train_heads
from vlbench.adapters.common.multilabel import METRICS
from vlbench.stats.ranked import macro, roc_auc

if TYPE_CHECKING:
    import torch

MetricName: TypeAlias = Literal["acc1", "mean_per_class_recall", "roc_auc", "map11", "map"]


@dataclass(frozen=True)
class Checked:
    """Images with known labels, and the metric that heads are judged by on them."""

    features_ND: torch.Tensor
    labels: np.ndarray
    """``(N,)``, or ``(N, C)`` of 1, 0 and -1."""
    metric: MetricName

    @staticmethod
    def of(features_ND: np.ndarray, labels: np.ndarray, metric: MetricName, *, device: str) -> Checked:
        """The features as float32 on the device."""
        import torch

        return Checked(torch.from_numpy(features_ND.astype(np.float32)).to(device), labels, metric)

    def logits(self, heads: Heads, head: int) -> np.ndarray:
        """``logits_NC`` of one head."""
        return heads.logits(self.features_ND, head).cpu().numpy()

    def quality(self, logits_NC: np.ndarray) -> float:
        """The metric; minus infinity for a head that diverged."""
        if not np.isfinite(logits_NC).all():
            return -np.inf
        if self.labels.ndim == 2:
            return macro(METRICS[self.metric], self.labels, logits_NC).value
        if self.metric == "roc_auc":
            return roc_auc(self.labels, logits_NC[:, 1] - logits_NC[:, 0]).value
        correct_N = logits_NC.argmax(axis=1) == self.labels
        if self.metric == "acc1":
            return float(correct_N.mean())
        sizes_C = np.bincount(self.labels)
        recalls_C = np.bincount(self.labels, weights=correct_N)[sizes_C > 0] / sizes_C[sizes_C > 0]
        return float(recalls_C.mean())


def qualities(
    problem: Problem,
    start: tuple[np.ndarray, np.ndarray],
    settings: Sequence[tuple[float, float]],
    checked: Checked,
    *,
    epochs: int,
    training: Training,
    best_epoch: bool,
) -> list[float]:
    """Train a head for each (learning rate, weight decay) and judge it: after its last epoch, or by its best one.

    A head that diverges is the worst there is, whatever it was before.
    """
    found_K, diverged_K = np.full(len(settings), -np.inf), np.zeros(len(settings), dtype=bool)

    def judge(heads: Heads, part: slice) -> None:
        now_K = [checked.quality(checked.logits(heads, head)) for head in range(len(heads))]
        found_K[part] = np.maximum(found_K[part], now_K)
        diverged_K[part] |= np.isneginf(now_K)

    heads = train_heads(
        problem, start, settings, epochs=epochs, training=training, after_epoch=judge if best_epoch else None
    )
    if not best_epoch:
        judge(heads, slice(0, len(settings)))
    return np.where(diverged_K, -np.inf, found_K).tolist()
