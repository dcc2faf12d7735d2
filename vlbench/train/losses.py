"""Contrastive losses on unit-norm embeddings, exact over ranks.

Each rank compares its own B images and B texts with all N = W * B of the other side, so that memory is O(B * N) rather
than O(N * N); with ``block``, ``train/blocked.py`` holds ``block`` rows of it at once. The returned value is that of
the whole batch on every rank; the mean over ranks of the gradients, which DistributedDataParallel takes, is the
gradient of the whole batch (logit scale included). All ranks must hold the same B. Tensor names: B this rank's batch,
N the whole batch, D width of the joint space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlbench.train.blocked import blocked_cross_entropy
from vlbench.train.distributed import gather, gather_constant, mean_over_ranks, ranks


def clip_loss(
    image_BD: torch.Tensor, text_BD: torch.Tensor, logit_scale: torch.Tensor | float, *, block: int | None = None
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy (Radford et al., 2103.00020).

    With s the logit scale, u and v the unit embeddings of images and texts:
    ``L = 1/2 (mean_i -log softmax_j(s u_i.v_j)[i] + mean_j -log softmax_i(s u_i.v_j)[j])``.

    Args:
        image_BD: unit-norm image embeddings.
        text_BD: unit-norm text embeddings; row i belongs to image i.
        logit_scale: s itself, not its logarithm.
        block: rows of logits held at once; None: all.

    Returns:
        The mean over the whole batch, in nats. It is exactly 0 for a batch of one.
    """
    directions = _both_directions(image_BD, text_BD, _own_rows(image_BD), logit_scale, block=block)
    return mean_over_ranks(directions / 2)


def unicl_loss(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    labels_B: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    block: int | None = None,
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
        block: rows of logits held at once; None: all.

    Returns:
        The mean over the whole batch, in nats. It cannot fall below ``mean_i ln |P(i)|``, the mean logarithm of the
        number of positives, which is not 0 where labels repeat.
    """
    classes_N = own_classes(gather_constant(labels_B))
    return mean_over_ranks(_both_directions(image_BD, text_BD, classes_N, logit_scale, block=block) / 2)


def image_to_text_loss(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    labels_B: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    block: int | None = None,
) -> torch.Tensor:
    """The image-to-text term of UniCL's loss alone: ``SoftCE(S, T)`` of ``unicl_loss``, not halved.

    With a text for each class and no two images of one class in the batch it is the softmax cross-entropy of a linear
    classifier whose weights are the texts. Arguments and units as in ``unicl_loss``.
    """
    classes_N = own_classes(gather_constant(labels_B))
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD = _pair(image_BD, text_BD)
        return mean_over_ranks(_one_direction(image_BD, gather(text_BD), classes_N, logit_scale, 0.0, block))


def align_loss(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    temperature: torch.Tensor | float,
    label_smoothing: float = 0.1,
    *,
    block: int | None = None,
) -> torch.Tensor:
    """ALIGN's normalised softmax (Jia et al., 2102.05918), with label smoothing.

    With sigma the temperature: ``L = L_i2t + L_t2i``, the sum, where CLIP takes the mean;
    ``L_i2t = mean_i -sum_j q_ij log softmax_j(u_i.v_j / sigma)``, ``q_ij = (1 - eps) 1[i = j] + eps / N`` and N the
    whole batch of all ranks.

    Args:
        image_BD: unit-norm image embeddings.
        text_BD: unit-norm text embeddings; row i belongs to image i.
        temperature: sigma itself, positive: logits are divided by it.
        label_smoothing: eps.
        block: rows of logits held at once; None: all.

    Returns:
        The sum of both directions' means over the whole batch, in nats. With eps > 0 it cannot fall below twice the
        entropy of q, which grows with N: 2 x 0.876 for eps = 0.1 and N = 256.
    """
    scale = 1 / temperature
    directions = _both_directions(image_BD, text_BD, _own_rows(image_BD), scale, smoothing=label_smoothing, block=block)
    return mean_over_ranks(directions)


def supcon_loss(
    embed_BD: torch.Tensor,
    labels_B: torch.Tensor,
    temperature: torch.Tensor | float,
    *,
    block: int | None = None,
) -> torch.Tensor:
    """Supervised contrastive loss L_out (Khosla et al., 2004.11362), its mean over anchors.

    With A(i) all samples but i, and P(i) those of A(i) that have i's label:
    ``L_i = -1/|P(i)| sum_{p in P(i)} log (exp(z_i.z_p / tau) / sum_{a in A(i)} exp(z_i.z_a / tau))``. The paper sums
    over anchors; here it is their mean, so that the rate does not depend on the batch size.

    A sample that shares its label with no other has no L_i: it is left out of the mean, and is a negative for the
    others still. The mean is over the anchors of all ranks together. Several views of an image are several rows with
    the same label.

    Args:
        embed_BD: unit-norm embeddings.
        labels_B: class ids from 0; -1 shares its label with nothing.
        temperature: tau itself, positive: logits are divided by it.
        block: rows of logits held at once; None: all.

    Returns:
        The mean over the anchors that have a positive, in nats; 0, with a gradient of 0, where there is none.
    """
    classes_N = own_classes(gather_constant(labels_B))
    mine = _my_rows(embed_BD)
    if block is not None:
        return mean_over_ranks(_blocked_supcon(embed_BD, classes_N, mine, 1 / temperature, block))
    with torch.autocast(embed_BD.device.type, enabled=False):
        embed_BD = _precise(embed_BD)
        logits_BN = embed_BD @ gather(embed_BD).T / temperature
        itself_BN = _own_rows(embed_BD)[mine][:, None] == _own_rows(embed_BD)[None, :]
        positives_BN = (classes_N[mine][:, None] == classes_N[None, :]) & ~itself_BN
        count_B = positives_BN.sum(1)
        # The lowest number, not -inf: alone in a batch of one, a row of -inf would have no gradient but nan.
        log_sum_B = logits_BN.masked_fill(itself_BN, torch.finfo(logits_BN.dtype).min).logsumexp(1)
        loss_B = log_sum_B - (logits_BN * positives_BN).sum(1) / count_B.clamp(min=1)
        anchors = gather_constant(count_B).count_nonzero().clamp(min=1)
        share = torch.where(count_B > 0, loss_B, 0.0).sum() * ranks().world / anchors
    return mean_over_ranks(share)


def _blocked_supcon(
    embed_BD: torch.Tensor, classes_N: torch.Tensor, mine: slice, scale: torch.Tensor | float, block: int
) -> torch.Tensor:
    """What ``supcon_loss`` takes the mean over ranks of, without its matrices."""
    _, place_N, size_C = classes_N.unique(return_inverse=True, return_counts=True)
    is_anchor_N = size_C[place_N] > 1
    anchors = is_anchor_N.count_nonzero().clamp(min=1)
    with torch.autocast(embed_BD.device.type, enabled=False):
        embed_BD = _precise(embed_BD)
        return blocked_cross_entropy(
            embed_BD,
            gather(embed_BD),
            scale,
            classes_B=classes_N[mine],
            classes_N=classes_N,
            smoothing=0.0,
            block=block,
            weights_B=is_anchor_N[mine].to(embed_BD.dtype) * ranks().world / anchors,
            own_B=_own_rows(embed_BD)[mine],
        )


def own_classes(labels_N: torch.Tensor) -> torch.Tensor:
    """``labels_N`` with a class of its own for each caption (-1), beyond the largest label. The argument is kept."""
    assert labels_N.ndim == 1, "one label an example"
    assert not labels_N.is_floating_point(), "labels are whole numbers"
    beyond = labels_N.max() + 1  # 0 where there are captions only
    return torch.where(labels_N < 0, beyond + torch.arange(len(labels_N), device=labels_N.device), labels_N)


def cross_entropy(logits_BC: torch.Tensor, labels_B: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """Softmax cross-entropy, mean over the whole batch of all ranks, in nats; float32 at least."""
    return mean_over_ranks(F.cross_entropy(_precise(logits_BC), labels_B, label_smoothing=smoothing))


def _both_directions(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    classes_N: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    smoothing: float = 0.0,
    block: int | None,
) -> torch.Tensor:
    """The sum of the two directions' means over this rank's rows. Rows of one class are each other's positives."""
    # Autocast would make the logits bfloat16, whose steps at 100 are 0.5: too coarse for a softmax over a batch.
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD = _pair(image_BD, text_BD)
        image_to_text = _one_direction(image_BD, gather(text_BD), classes_N, logit_scale, smoothing, block)
        text_to_image = _one_direction(text_BD, gather(image_BD), classes_N, logit_scale, smoothing, block)
        return image_to_text + text_to_image


def _one_direction(
    rows_BD: torch.Tensor,
    keys_ND: torch.Tensor,
    classes_N: torch.Tensor,
    logit_scale: torch.Tensor | float,
    smoothing: float,
    block: int | None,
) -> torch.Tensor:
    classes_B = classes_N[_my_rows(rows_BD)]
    if block is not None:
        return blocked_cross_entropy(
            rows_BD, keys_ND, logit_scale, classes_B=classes_B, classes_N=classes_N, smoothing=smoothing, block=block
        )
    return _soft_cross_entropy(logit_scale * rows_BD @ keys_ND.T, classes_B[:, None] == classes_N[None, :], smoothing)


def _soft_cross_entropy(logits_BN: torch.Tensor, positives_BN: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy to the uniform distribution over each row's positives, of which there is at least one.

    ``smoothing`` of the distribution's mass goes to all N alike.
    """
    target_B = (logits_BN * positives_BN).sum(1) / positives_BN.sum(1)
    if smoothing:
        target_B = (1 - smoothing) * target_B + smoothing * logits_BN.mean(1)
    return (logits_BN.logsumexp(1) - target_B).mean()


def _pair(image_BD: torch.Tensor, text_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert image_BD.shape == text_BD.shape, f"images {tuple(image_BD.shape)}, texts {tuple(text_BD.shape)}"
    return _precise(image_BD), _precise(text_BD)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _own_rows(local_BD: torch.Tensor) -> torch.Tensor:
    """Row numbers of the whole batch as classes: each row is its own positive and no other."""
    return torch.arange(ranks().world * local_BD.shape[0], device=local_BD.device)


def _my_rows(local_BD: torch.Tensor) -> slice:
    start = ranks().rank * local_BD.shape[0]
    return slice(start, start + local_BD.shape[0])
