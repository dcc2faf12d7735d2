"""One direction of a contrastive loss without its matrix of logits: a few rows at once, values and gradients exact.

A batch of 65,536 pairs has 16 GiB of logits in each direction, and autograd keeps several such matrices. Here ``block``
rows of them exist at a time. A row's softmax needs nothing of other rows, so its gradient is taken while the row is
there (the idea of chunked cross-entropies for large vocabularies): no row is computed twice, and what is kept for
the backward pass is as large as the embeddings.

Tensor names: R rows of a block, B this rank's batch, N the whole batch, D width of the joint space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def blocked_cross_entropy(
    rows_BD: torch.Tensor,
    keys_ND: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    classes_B: torch.Tensor,
    classes_N: torch.Tensor,
    smoothing: float,
    block: int,
) -> torch.Tensor:
    """``mean_i -sum_j q_ij log softmax_j(s x_i.y_j)``, differentiable in rows, keys and scale.

    ``q_ij = (1 - smoothing) 1[j in P(i)] / |P(i)| + smoothing / N``, where P(i) are the keys of row i's class.

    Args:
        rows_BD: the embeddings x that are compared; float32 or float64.
        keys_ND: the embeddings y that they are compared with.
        logit_scale: s.
        classes_B: the rows' classes; each has at least one key.
        classes_N: the keys' classes.
        smoothing: the share of q that goes to all keys alike.
        block: rows held at once: memory is O(block * N + (B + N) * D).

    Returns:
        The mean over the rows given, in nats.
    """
    scale = torch.as_tensor(logit_scale, dtype=rows_BD.dtype, device=rows_BD.device)
    loss: torch.Tensor = _Blocked.apply(rows_BD, keys_ND, scale, classes_B, classes_N, smoothing, block)
    return loss


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_BD: torch.Tensor,
        keys_ND: torch.Tensor,
        scale: torch.Tensor,
        classes_B: torch.Tensor,
        classes_N: torch.Tensor,
        smoothing: float,
        block: int,
    ) -> torch.Tensor:
        total = rows_BD.new_zeros(())
        wanted = any(ctx.needs_input_grad)
        grad_BD, grad_ND = (torch.zeros_like(rows_BD), torch.zeros_like(keys_ND)) if wanted else (None, None)
        for start in range(0, len(rows_BD), block):
            rows_RD = rows_BD[start : start + block]
            target_RN = _target(classes_B[start : start + block], classes_N, smoothing, rows_BD.dtype)
            logits_RN = (rows_RD @ keys_ND.T).mul_(scale)
            log_sum_R = logits_RN.logsumexp(1)
            total += (log_sum_R - torch.linalg.vecdot(logits_RN, target_RN)).sum()
            if grad_BD is not None and grad_ND is not None:
                # d loss / d logits = softmax - target, in the memory of the logits.
                excess_RN = logits_RN.sub_(log_sum_R[:, None]).exp_().sub_(target_RN)
                torch.mm(excess_RN, keys_ND, out=grad_BD[start : start + block])
                grad_ND.addmm_(excess_RN.T, rows_RD)
        if grad_BD is not None and grad_ND is not None:
            # sum_ij excess_ij x_i.y_j, the scale's gradient, without the products x_i.y_j.
            grad_scale = torch.linalg.vecdot(grad_BD, rows_BD).sum() / len(rows_BD)
            share = scale / len(rows_BD)
            ctx.save_for_backward(grad_BD.mul_(share), grad_ND.mul_(share), grad_scale)
        return total / len(rows_BD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_BD, grad_ND, grad_scale = ctx.saved_tensors
        return grad * grad_BD, grad * grad_ND, grad * grad_scale, None, None, None, None


def _target(classes_R: torch.Tensor, classes_N: torch.Tensor, smoothing: float, dtype: torch.dtype) -> torch.Tensor:
    target_RN = (classes_R[:, None] == classes_N[None, :]).to(dtype)
    target_RN.mul_((1 - smoothing) / target_RN.sum(1, keepdim=True))
    return target_RN.add_(smoothing / len(classes_N)) if smoothing else target_RN
