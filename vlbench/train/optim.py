"""The optimizer, and which parameters decay."""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.optim.lamb import Lamb
from torch import nn
from torch.distributed.tensor import DTensor

from vlbench.train.lookahead import look_ahead
from vlbench.train.run_config import OptimConfig

_FACTOR, _FREE = "lr_factor", "never_decays"


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of equal weight decay and learning rate; frozen parameters are left out.

    Gains, biases and scales have fewer than two dimensions and do not decay (the rule of open_clip's legacy_main.py
    and of UniCL's optimizer.py) unless ``decay_vectors``; nor does what ``no_decay`` names, whatever its shape.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim < 2 or name.endswith("bias")
            free = (vector and not config.decay_vectors) or any(re.search(rule, name) for rule in config.no_decay)
            factor = next((factor for rule, factor in config.lr_factors.items() if re.search(rule, name)), 1.0)
            groups.setdefault((free, factor), []).append(parameter)
    return [
        {"params": group, "weight_decay": 0.0 if free else config.weight_decay, _FREE: free, _FACTOR: factor}
        for (free, factor), group in groups.items()
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its factor of ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_FACTOR]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over ``model``, with LookAhead where it is asked for.

    AdamW and SGD are torch's, fused: one pass over memory, several times faster for large embeddings. Over sharded
    weights SGD is not, for which torch has no fused one; LAMB's norms are those of whole tensors there too.
    """
    groups = parameter_groups(model, config)
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=not sharded)
    elif config.name == "lamb":
        optimizer = _lamb(groups, config)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if config.lookahead_steps:
        look_ahead(optimizer, steps=config.lookahead_steps, alpha=config.lookahead_alpha)
    return optimizer


def _lamb(groups: list[dict[str, Any]], config: OptimConfig) -> Lamb:
    """LAMB (You et al., 1904.00962, algorithm 2) as timm has it, without the clipping that timm adds.

    ``u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w``, ``w -= lr * |w| / |u| * u`` by parameter tensor, the ratio
    being 1 where either norm is 0. What is excluded from decay has no trust ratio either (TensorFlow Addons' rule,
    which COYO-ALIGN trains with); that is the exclusion and not the rate, so that weight_decay=0 is LAMB still. The
    loop clips gradients itself, by ``clip_norm``.
    """
    for group in groups:
        group["always_adapt"] = not group[_FREE]
    return Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=None)
