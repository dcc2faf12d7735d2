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

from vlbench.core.errors import UserError
from vlbench.core.types import Recipe
from vlbench.train.run_config import RunConfig, learner


def check_blocks(recipe: Recipe, config: RunConfig) -> None:
    """Raises UserError for a ``loss_block`` under a recipe that would not heed it: one with another kind of loss."""
    if config.loss_block is not None and not getattr(recipe, "takes_blocks", lambda _: False)(config):
        raise UserError(
            f"loss_block={config.loss_block}: {learner(recipe.name, config)} does not compare embeddings across the "
            "batch, so there is no matrix of logits to take in blocks; leave loss_block out"
        )


def blocked_cross_entropy(
    rows_BD: torch.Tensor,
    keys_ND: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    classes_B: torch.Tensor,
    classes_N: torch.Tensor,
    smoothing: float,
    block: int,
    weights_B: torch.Tensor | None = None,
    own_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sum_i w_i (-sum_j q_ij log softmax_j(s x_i.y_j))``, differentiable in rows, keys and scale.

    ``q_ij = (1 - smoothing) 1[j in P(i)] / |P(i)| + smoothing / N``, where P(i) are the keys of row i's class.

    Args:
        rows_BD: the embeddings x that are compared; float32 or float64.
        keys_ND: the embeddings y that they are compared with.
        logit_scale: s.
        classes_B: the rows' classes; each has at least one key, unless the row's weight is 0.
        classes_N: the keys' classes.
        smoothing: the share of q that goes to all keys alike; 0 with ``own_B``.
        block: rows held at once: memory is O(block * N + (B + N) * D).
        weights_B: w; None: the mean over the rows, ``1 / B`` each.
        own_B: for each row the key that is the row itself, which is then neither in its softmax nor in P(i). None: no
            key is.

    Returns:
        The weighted sum over the rows given, in nats; 0 where there is no row.
    """
    assert own_B is None or not smoothing, "a target for all keys alike has no place for one that is left out"
    scale = torch.as_tensor(logit_scale, dtype=rows_BD.dtype, device=rows_BD.device)
    if weights_B is None:
        weights_B = rows_BD.new_full((len(rows_BD),), 1 / max(1, len(rows_BD)))
    loss: torch.Tensor = _Blocked.apply(
        rows_BD, keys_ND, scale, classes_B, classes_N, weights_B.to(rows_BD.dtype), own_B, smoothing, block
    )
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
        weights_B: torch.Tensor,
        own_B: torch.Tensor | None,
        smoothing: float,
        block: int,
    ) -> torch.Tensor:
        total = rows_BD.new_zeros(())
        wanted = any(ctx.needs_input_grad)
        grad_BD, grad_ND = (torch.zeros_like(rows_BD), torch.zeros_like(keys_ND)) if wanted else (None, None)
        for start in range(0, len(rows_BD), block):
            some = slice(start, start + block)
            rows_RD, weights_R = rows_BD[some], weights_B[some]
            own_R1 = None if own_B is None else own_B[some, None]
            target_RN = _target(classes_B[some], classes_N, own_R1, smoothing, rows_BD.dtype)
            logits_RN = (rows_RD @ keys_ND.T).mul_(scale)
            if own_R1 is not None:
                # The lowest number, not -inf, which times a target of 0 is nan.
                logits_RN.scatter_(1, own_R1, torch.finfo(logits_RN.dtype).min)
            log_sum_R = logits_RN.logsumexp(1)
            total += torch.dot(weights_R, log_sum_R - torch.linalg.vecdot(logits_RN, target_RN))
            if grad_BD is not None and grad_ND is not None:
                # d loss / d logits = w (softmax - target), but for w in the memory of the logits.
                excess_RN = logits_RN.sub_(log_sum_R[:, None]).exp_().sub_(target_RN)
                torch.mm(excess_RN, keys_ND, out=grad_BD[some]).mul_(weights_R[:, None])
                grad_ND.addmm_(excess_RN.T, rows_RD * weights_R[:, None])
        if grad_BD is not None and grad_ND is not None:
            # sum_ij w_i excess_ij x_i.y_j, the scale's gradient, without the products x_i.y_j.
            grad_scale = torch.linalg.vecdot(grad_BD, rows_BD).sum()
            ctx.save_for_backward(grad_BD.mul_(scale), grad_ND.mul_(scale), grad_scale)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_BD, grad_ND, grad_scale = ctx.saved_tensors
        return grad * grad_BD, grad * grad_ND, grad * grad_scale, None, None, None, None, None, None


def _target(
    classes_R: torch.Tensor,
    classes_N: torch.Tensor,
    own_R1: torch.Tensor | None,
    smoothing: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    target_RN = (classes_R[:, None] == classes_N[None, :]).to(dtype)
    if own_R1 is not None:
        target_RN.scatter_(1, own_R1, 0.0)
    target_RN.mul_((1 - smoothing) / target_RN.sum(1, keepdim=True).clamp_(min=1))
    return target_RN.add_(smoothing / len(classes_N)) if smoothing else target_RN
