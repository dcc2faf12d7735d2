"""What is read off the stream: one class, several answers, or a region.

A head is a description: how many classes, what a target is, which loss. ``build`` makes the layers. Losses are means
over the questions of a rank's batch; ranks have equally many, so that the mean of their gradients, which
DistributedDataParallel takes, is that of the whole batch, and the value returned is the whole batch's.

Shapes: B questions, V images of each, D width of the stream, C classes or answers, R regions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from vlbench.models.single_stream import Transform, initialise
from vlbench.train.distributed import mean_over_ranks

NO_REGION = -1e4
"""The logit of what is no region: padding [M:vinvl_defaults]."""


class Head(Protocol):
    """What a fusion model's output is made of."""

    reads_regions: bool
    """Whether it reads the outputs at regions, and not the pooled one."""

    def build(self, width: int, *, views: int, init_std: float) -> nn.Module:
        """Layers that take ``pooled_B(V*D)`` to ``logits_BC``, or ``hidden_BRD`` to ``logits_BR``."""

    def collate(self, targets: Sequence[Any]) -> torch.Tensor:
        """The targets of a batch."""

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """A scalar, in nats."""


@dataclass(frozen=True)
class ClassHead:
    """One of ``classes``: cross-entropy. A target is the class.

    Two images are two streams with one sentence, whose pooled outputs stand side by side (2 x D for a pair)
    [M:visual_bert.py].
    """

    classes: int
    reads_regions = False

    def build(self, width: int, *, views: int, init_std: float) -> nn.Module:
        """BERT's transform, then a linear layer."""
        return _classifier(views * width, self.classes, init_std)

    def collate(self, targets: Sequence[Any]) -> torch.Tensor:
        """``target_B``."""
        return torch.tensor([int(target) for target in targets], dtype=torch.long)

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """``-log softmax(logits)[target]``, its mean."""
        return mean_over_ranks(F.cross_entropy(logits.float(), target))


@dataclass(frozen=True)
class AnswerHead:
    """A score in [0, 1] for each of ``answers``: binary cross-entropy. A target maps answers to soft scores.

    The loss is the sum over the answers, not their mean: at 3,129 answers it is 3,129 times torch's, which is what
    mu-VLA's learning rate goes with (there written as the mean times the number of answers [M:visual_bert.py]).
    """

    answers: int
    names: tuple[str, ...] = ()
    """The answers in words, where the model is to keep them."""
    reads_regions = False

    def build(self, width: int, *, views: int, init_std: float) -> nn.Module:
        """BERT's transform, then a linear layer."""
        return _classifier(views * width, self.answers, init_std)

    def collate(self, targets: Sequence[Any]) -> torch.Tensor:
        """``target_BC``; answers that are not named are 0."""
        target_BC = torch.zeros(len(targets), self.answers)
        for row_C, target in zip(target_BC, targets, strict=True):
            scores: Mapping[int, float] = target
            for answer, score in scores.items():
                row_C[answer] = score
        return target_BC

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """``sum_a -t_a log s(z_a) - (1 - t_a) log(1 - s(z_a))``, s the logistic function; its mean over questions."""
        each_BC = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
        return mean_over_ranks(each_BC.sum(1).mean())


@dataclass(frozen=True)
class RegionHead:
    """Which region is meant: a score of each, cross-entropy over those of the image. A target is a region's place.

    What is no region (padding, the token of the whole image) is never chosen.
    """

    reads_regions = True

    def build(self, width: int, *, views: int, init_std: float) -> nn.Module:
        """Linear (D, D), GELU, LayerNorm, linear (D, 1)."""
        assert views == 1, "a region is one of a single image"
        return nn.Sequential(_classifier(width, 1, init_std), nn.Flatten(1))

    def collate(self, targets: Sequence[Any]) -> torch.Tensor:
        """``target_B``."""
        return torch.tensor([int(target) for target in targets], dtype=torch.long)

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """``-log softmax(logits)[target]``, its mean."""
        return mean_over_ranks(F.cross_entropy(logits.float(), target))


def _classifier(width: int, outputs: int, init_std: float) -> nn.Sequential:
    layers = nn.Sequential(Transform(width), nn.Linear(width, outputs))
    initialise(layers, init_std)
    return layers
