"""Losses of models that predict tokens, exact over ranks.

Captions differ in length, so that the mean over a batch is no mean of the ranks' means: what is summed on each rank is
divided by what all ranks counted. As in ``train/losses.py``, the returned value is that of the whole batch on every
rank, and the mean over ranks of the gradients is its gradient. VirTex's released code averages the ranks' own means
instead, in which a caption on a rank of short captions weighs more. The parts of an accumulated batch are averaged in
that way here too.

Shapes: B this rank's batch, L tokens, K classes of an image, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlbench.train.distributed import gather_constant, mean_over_ranks, ranks


def token_cross_entropy(logits_BLV: torch.Tensor, targets_BL: torch.Tensor, *, pad: int = 0) -> torch.Tensor:
    """``mean -log p(target)`` over all targets that are not ``pad``, of all captions of all ranks together, in nats.

    Long captions weigh more than short ones, as in VirTex (2006.06666, section 3). 0 where there is no target.
    """
    total = F.cross_entropy(precise(logits_BLV).flatten(0, 1), targets_BL.flatten(), ignore_index=pad, reduction="sum")
    return _mean_over_all(total, (targets_BL != pad).sum())


def set_cross_entropy(logits_BV: torch.Tensor, targets_BK: torch.Tensor, *, pad: int = 0) -> torch.Tensor:
    """Softmax cross-entropy to sets of classes: ``-(1/K) sum_k log p(class_k)`` of an image, then the mean over images.

    VirTex's token and multilabel classification (2006.06666, section 4.2): up to a constant, the divergence from the
    uniform distribution over the image's classes. Its smallest value is ``mean ln K``.

    Args:
        logits_BV: one row an image.
        targets_BK: each image's different classes, filled up with ``pad``. An image without any has no loss and is
            not counted; in the released code its mean of nothing is NaN.
        pad: the class that is none.

    Returns:
        The mean over the images of all ranks that have a class, in nats; 0 where none has.
    """
    is_class_BK = targets_BK != pad
    log_p_BK = F.log_softmax(precise(logits_BV), dim=1).gather(1, targets_BK)
    count_B = is_class_BK.sum(1)
    loss_B = -(log_p_BK * is_class_BK).sum(1) / count_B.clamp(min=1)
    return _mean_over_all(loss_B.sum(), count_B.count_nonzero())


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """float32 at least: bfloat16 is too coarse for a softmax over a vocabulary."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _mean_over_all(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    counted = gather_constant(count.reshape(1)).sum().clamp(min=1)
    return mean_over_ranks(total * ranks().world / counted)
