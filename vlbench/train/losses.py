"""Contrastive losses on unit-norm embeddings, exact over ranks.

Each rank compares its own B images and B texts with all N = W * B of the other side, so that memory is O(B * N) rather
than O(N * N). The returned value is that of the whole batch on every rank; the mean over ranks of the gradients,
which DistributedDataParallel takes, is the gradient of the whole batch (logit scale included). All ranks must hold
the same B. Tensor names: B this rank's batch, N the whole batch, D width of the joint space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlbench.train.distributed import gather, gather_constant, mean_over_ranks, ranks


def clip_loss(image_BD: torch.Tensor, text_BD: torch.Tensor, logit_scale: torch.Tensor | float) -> torch.Tensor:
    """CLIP's symmetric cross-entropy (Radford et al., 2103.00020).

    With s the logit scale, u and v the unit embeddings of images and texts:
    ``L = 1/2 (mean_i -log softmax_j(s u_i.v_j)[i] + mean_j -log softmax_i(s u_i.v_j)[j])``.

    Args:
        image_BD: unit-norm image embeddings.
        text_BD: unit-norm text embeddings; row i belongs to image i.
        logit_scale: s itself, not its logarithm.

    Returns:
        The mean over the whole batch, in nats. It is exactly 0 for a batch of one.
    """
    rows_N = torch.arange(ranks().world * image_BD.shape[0], device=image_BD.device)
    positives_BN = rows_N[_my_rows(image_BD)][:, None] == rows_N[None, :]
    return _symmetric(image_BD, text_BD, positives_BN, logit_scale)


def unicl_loss(
    image_BD: torch.Tensor, text_BD: torch.Tensor, labels_B: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    """UniCL's bidirectional contrastive loss (Yang et al., 2204.03610, algorithm 1).

    Image i and text j are a positive pair where their labels are equal, ``T_ij = 1[y_i = y_j]``; each caption is a
    class of its own. ``L = 1/2 (SoftCE(S, T) + SoftCE(S', T'))`` with
    ``SoftCE(S, T) = mean_i -sum_j T_ij log softmax_j(S_ij) / sum_j T_ij``. The paper's equation is the
    plain sum; the half is taken so that a batch in which every label occurs once gives exactly ``clip_loss`` (that the
    paper's pseudo-code halves too is unverified).

    Labels are gathered over ranks before captions get classes: else caption i of one rank and caption i of another
    would be positives. ``labels_B`` stays as it is.

    Args:
        image_BD: unit-norm image embeddings.
        text_BD: unit-norm text embeddings; row i belongs to image i.
        labels_B: class ids from 0; -1 is a caption. A batch of captions alone is as good as any.
        logit_scale: s itself, not its logarithm.

    Returns:
        The mean over the whole batch, in nats. It cannot fall below ``mean_i ln |P(i)|``, the mean logarithm of the
        number of positives, which is not 0 where labels repeat.
    """
    classes_N = own_classes(gather_constant(labels_B))
    positives_BN = classes_N[_my_rows(image_BD)][:, None] == classes_N[None, :]
    return _symmetric(image_BD, text_BD, positives_BN, logit_scale)


def own_classes(labels_N: torch.Tensor) -> torch.Tensor:
    """``labels_N`` with a class of its own for each caption (-1), beyond the largest label. The argument is kept."""
    assert labels_N.ndim == 1, "one label an example"
    assert not labels_N.is_floating_point(), "labels are whole numbers"
    beyond = labels_N.max() + 1  # 0 where there are captions only
    return torch.where(labels_N < 0, beyond + torch.arange(len(labels_N), device=labels_N.device), labels_N)


def cross_entropy(logits_BC: torch.Tensor, labels_B: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """Softmax cross-entropy, mean over the whole batch of all ranks, in nats; float32 at least."""
    return mean_over_ranks(F.cross_entropy(_precise(logits_BC), labels_B, label_smoothing=smoothing))


def _symmetric(
    image_BD: torch.Tensor, text_BD: torch.Tensor, positives_BN: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    assert image_BD.shape == text_BD.shape, f"images {tuple(image_BD.shape)}, texts {tuple(text_BD.shape)}"
    # Autocast would make the logits bfloat16, whose steps at 100 are 0.5: too coarse for a softmax over a batch.
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD = _precise(image_BD), _precise(text_BD)
        image_to_text_BN = logit_scale * image_BD @ gather(text_BD).T
        text_to_image_BN = logit_scale * text_BD @ gather(image_BD).T
        loss = (
            _soft_cross_entropy(image_to_text_BN, positives_BN) + _soft_cross_entropy(text_to_image_BN, positives_BN)
        ) / 2
    return mean_over_ranks(loss)


def _soft_cross_entropy(logits_BN: torch.Tensor, positives_BN: torch.Tensor) -> torch.Tensor:
    """Cross-entropy to the uniform distribution over each row's positives, of which there is at least one."""
    positive_B = (logits_BN * positives_BN).sum(1) / positives_BN.sum(1)
    return (logits_BN.logsumexp(1) - positive_B).mean()


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _my_rows(local_BD: torch.Tensor) -> slice:
    start = ranks().rank * local_BD.shape[0]
    return slice(start, start + local_BD.shape[0])
