"""Activation checkpointing: keep the input of each block, and compute what is inside again in the backward pass.

Memory for activations falls from all layers' to one block's and the inputs of the others, for a third more computing
(Chen et al., Training Deep Nets with Sublinear Memory Cost, 1604.06174). Gradients, dropout included, are the same to
the bit. The towers' own switches for it (timm's, open_clip's) are not used: where a block is computed twice, they let
its BatchNorm count the batch twice in the running statistics, so that another network would come out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from vlbench.train.blocks import blocks


def recompute_blocks(module: nn.Module) -> int:
    """Let every block of ``module`` be recomputed in training. Names of parameters stay. Returns the number of blocks.

    Raises:
        UserError: for a visual tower whose blocks are not known.
    """
    found = blocks(module)
    for block in found:
        block.forward = partial(_recomputed, block.forward, _norms(block))
    return len(found)


def _recomputed(forward: Callable[..., Any], norms: list[_BatchNorm], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if not norms:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    contexts = partial(_contexts, norms)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _norms(block: nn.Module) -> list[_BatchNorm]:
    return [part for part in block.modules() if isinstance(part, _BatchNorm)]


def _contexts(
    norms: list[_BatchNorm],
) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """Around the first computation, and around the second."""
    return contextlib.nullcontext(), _counted_already(norms)


@contextlib.contextmanager
def _counted_already(norms: list[_BatchNorm]) -> Iterator[None]:
    """Running statistics stay as they are: with a momentum of 0 a batch has no share in them."""
    before = [
        (norm, norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
