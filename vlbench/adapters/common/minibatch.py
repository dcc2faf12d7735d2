"""Linear heads trained by minibatch gradient descent on cached features: what ELEVATER and CLIP_benchmark do.

Many heads are trained side by side, one for each learning rate and weight decay of a grid. All see the same batches,
start at the same weights, and never touch one another: each ends where it would have ended alone. The features of a
batch are read and normalised once for all of them, and one product of matrices gives all their logits; the gradient of
a linear head is written out, so that no graph is kept.

Nothing depends on the order in which images or classes come, or on what was computed before: images are put into the
order of their content, every epoch's order is drawn from the seed alone, and a class's first weights from its name.

Shape suffixes: N images, B batch, D width of the features, C classes, K heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlbench.core.fingerprint import digest

if TYPE_CHECKING:
    import torch

BN_EPS, BN_MOMENTUM = 1e-5, 0.1
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
"""torch's defaults of BatchNorm1d and AdamW."""

HEADS_BYTES = 1 << 30
"""Weights, gradients and moments held at once: more heads are trained in turns."""


@dataclass(frozen=True)
class Training:
    """How heads are trained; what differs between two of them is the learning rate and the weight decay."""

    optimizer: Literal["sgd", "adamw"]
    """SGD with momentum, whose weight decay is part of the gradient, or AdamW, whose is not. Both decay the bias."""
    schedule: Literal["constant", "cosine"]
    """Cosine: from the learning rate to 0, step by step."""
    batch_norm: bool
    """A BatchNorm1d without weights before the head: batch statistics while training, running ones afterwards."""
    multilabel: bool
    """Binary cross-entropy of every class, its mean over the known labels, rather than softmax cross-entropy."""
    batch_size: int
    seed: int
    momentum: float = 0.9


@dataclass
class Heads:
    """Trained heads."""

    weight_KCD: torch.Tensor
    bias_KC: torch.Tensor
    mean_D: torch.Tensor
    """Running statistics of the BatchNorm; 0 and 1 without one."""
    scale_D: torch.Tensor

    def __len__(self) -> int:
        return len(self.bias_KC)

    def logits(self, features_ND: torch.Tensor, head: int) -> torch.Tensor:
        """``logits_NC`` of one head, of features as they came."""
        weight_DC = self.weight_KCD[head].T * self.scale_D[:, None]
        return (features_ND - self.mean_D) @ weight_DC + self.bias_KC[head]


@dataclass(frozen=True)
class Problem:
    """Training images in the order of their content, on the device."""

    features_ND: torch.Tensor
    target: torch.Tensor
    """With one label an image the label, int64 ``(N,)``: as a row of zeros and a one a million images of a thousand
    classes would be gigabytes. With several ``(N, C)``, 1 where present, else 0."""
    known_NC: torch.Tensor | None
    """0 where a label is to be ignored; None: all are known."""

    @staticmethod
    def of(features_ND: np.ndarray, labels: np.ndarray, digests: Sequence[str], *, device: str) -> Problem:
        """From labels ``(N,)`` or, of several an image, ``(N, C)`` of 1, 0 and -1."""
        import torch

        order = content_order(digests, labels)

        def placed(part: np.ndarray, kind: type) -> torch.Tensor:
            return torch.from_numpy(part[order].astype(kind, copy=False)).to(device)

        features = placed(features_ND, np.float32)
        if labels.ndim == 1:
            return Problem(features, placed(labels, np.int64), None)
        known = None if (labels >= 0).all() else placed(labels >= 0, np.float32)
        return Problem(features, placed(labels == 1, np.float32), known)


def content_order(digests: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Rows in the order of their images' digests; copies of an image by their labels."""
    rows = sorted(range(len(digests)), key=lambda row: (digests[row], labels[row].tobytes()))
    return np.array(rows, dtype=np.int64)


def random_head(classes: Sequence[str], width: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(C, D)`` and biases ``(C,)`` as torch.nn.Linear draws them: uniform within ``1 / sqrt(D)``."""
    bound = 1 / np.sqrt(width)
    rows = [np.random.default_rng(int(digest(f"{seed} {name}".encode())[:16], 16)) for name in classes]
    drawn = np.stack([row.uniform(-bound, bound, width + 1) for row in rows])
    return drawn[:, :-1], drawn[:, -1]


def train_heads(
    problem: Problem,
    start: tuple[np.ndarray, np.ndarray],
    settings: Sequence[tuple[float, float]],
    *,
    epochs: int,
    training: Training,
    after_epoch: Callable[[Heads, slice], None] | None = None,
) -> Heads:
    """Train one head for each (learning rate, weight decay) of ``settings``, all from the weights ``start``.

    Args:
        problem: the training images.
        start: weights ``(C, D)`` and biases ``(C,)``.
        settings: K pairs.
        epochs: passes over the images.
        training: what all heads share.
        after_epoch: called with the heads, in evaluation mode, and which of the K they are.

    Returns:
        All K heads after the last epoch. One that diverged holds numbers that are not finite.
    """
    import torch

    device, (n_classes, width) = problem.features_ND.device, start[0].shape
    at_once = max(1, HEADS_BYTES // (4 * 4 * n_classes * (width + 1)))
    parts = []
    for begin in range(0, len(settings), at_once):
        part = slice(begin, min(begin + at_once, len(settings)))
        run = _Run(problem, start, torch.tensor(settings[part], dtype=torch.float32, device=device), training)
        for _ in run.epochs(epochs):
            if after_epoch is not None:
                after_epoch(run.heads(), part)
        parts.append(run.heads())
    weight_KCD, bias_KC = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight_KCD", "bias_KC"))
    return Heads(weight_KCD, bias_KC, parts[0].mean_D, parts[0].scale_D)


class _Run:
    """Heads in training: weights and bias in one tensor, the bias last."""

    def __init__(
        self, problem: Problem, start: tuple[np.ndarray, np.ndarray], settings_K2: torch.Tensor, training: Training
    ) -> None:
        import torch

        self.problem, self.training = problem, training
        device, width = settings_K2.device, start[0].shape[1]
        first_CD = torch.from_numpy(np.column_stack([start[0], start[1]]).astype(np.float32)).to(device)
        self.weight_KCD = first_CD.expand(len(settings_K2), -1, -1).clone()
        self.lr_K11, self.decay_K11 = (column[:, None, None] for column in settings_K2.T)
        self.first_KCD = torch.zeros_like(self.weight_KCD)
        self.second_KCD = torch.zeros_like(self.weight_KCD) if training.optimizer == "adamw" else None
        self.mean_D = torch.zeros(width, device=device)
        self.variance_D = torch.ones(width, device=device)
        self.step = 0

    def epochs(self, count: int) -> Iterator[int]:
        """Train; yields after every epoch."""
        import torch

        n, size = len(self.problem.features_ND), self.training.batch_size
        generator = torch.Generator().manual_seed(self.training.seed)
        total = count * -(-n // size)
        for epoch in range(count):
            order = torch.randperm(n, generator=generator).to(self.mean_D.device)
            for batch in order.split(size):
                if len(batch) > 1 or not self.training.batch_norm:  # one image has no variance
                    self._update(self._gradient(batch), total)
                self.step += 1
            yield epoch

    def heads(self) -> Heads:
        """The heads as they are now, for evaluation."""
        scale_D = (self.variance_D + BN_EPS).rsqrt() if self.training.batch_norm else self.variance_D
        return Heads(self.weight_KCD[..., :-1].clone(), self.weight_KCD[..., -1].clone(), self.mean_D.clone(), scale_D)

    def _gradient(self, batch: torch.Tensor) -> torch.Tensor:
        import torch

        features_BD, target = self.problem.features_ND[batch], self.problem.target[batch]
        if self.training.batch_norm:
            variance_D, mean_D = torch.var_mean(features_BD, dim=0, correction=0)
            features_BD = (features_BD - mean_D) * (variance_D + BN_EPS).rsqrt()
            self.mean_D.lerp_(mean_D, BN_MOMENTUM)
            self.variance_D.lerp_(variance_D * (len(batch) / (len(batch) - 1)), BN_MOMENTUM)
        ones_B1 = features_BD.new_ones(len(batch), 1)
        features_BD = torch.cat([features_BD, ones_B1], dim=1)
        n_heads, n_classes, width = self.weight_KCD.shape
        logits_BKC = (features_BD @ self.weight_KCD.view(-1, width).T).view(-1, n_heads, n_classes)
        if not self.training.multilabel:
            residual_BKC = logits_BKC.softmax(dim=2)
            residual_BKC[torch.arange(len(batch), device=target.device), :, target] -= 1.0
            residual_BKC /= len(batch)
        else:
            residual_BKC = torch.sigmoid(logits_BKC) - target[:, None]
            known_BC = None if self.problem.known_NC is None else self.problem.known_NC[batch]
            if known_BC is None:
                residual_BKC /= target.numel()
            else:
                residual_BKC *= known_BC[:, None] / known_BC.sum().clamp(min=1)
        return (residual_BKC.view(len(batch), -1).T @ features_BD).view_as(self.weight_KCD)

    def _update(self, gradient_KCD: torch.Tensor, total: int) -> None:
        lr_K11 = self.lr_K11
        if self.training.schedule == "cosine":
            lr_K11 = lr_K11 * (0.5 * (1 + np.cos(np.pi * self.step / total)))
        if self.second_KCD is None:
            gradient_KCD += self.decay_K11 * self.weight_KCD
            self.first_KCD.mul_(self.training.momentum).add_(gradient_KCD)
            self.weight_KCD -= lr_K11 * self.first_KCD
            return
        self.weight_KCD *= 1 - lr_K11 * self.decay_K11
        self.first_KCD.lerp_(gradient_KCD, 1 - BETA1)
        self.second_KCD.mul_(BETA2).addcmul_(gradient_KCD, gradient_KCD, value=1 - BETA2)
        size_KCD = (self.second_KCD / (1 - BETA2 ** (self.step + 1))).sqrt_().add_(ADAM_EPS)
        self.weight_KCD -= lr_K11 / (1 - BETA1 ** (self.step + 1)) * self.first_KCD / size_KCD
