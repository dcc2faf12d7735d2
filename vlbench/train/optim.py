"""The optimizer, and which parameters decay."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from vlbench.train.config import OptimConfig

_FACTOR = "lr_factor"


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of equal weight decay and learning rate; frozen parameters are left out.

    Gains, biases and scales have fewer than two dimensions and do not decay (the rule of open_clip's legacy_main.py
    and of UniCL's optimizer.py) unless ``decay_vectors``; nor does what ``no_decay`` names, whatever its shape.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim < 2 or name.endswith("bias")
            free = (vector and not config.decay_vectors) or any(re.search(rule, name) for rule in config.no_decay)
            factor = next((factor for rule, factor in config.lr_factors.items() if re.search(rule, name)), 1.0)
            groups.setdefault((0.0 if free else config.weight_decay, factor), []).append(parameter)
    return [{"params": group, "weight_decay": decay, _FACTOR: factor} for (decay, factor), group in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its factor of ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_FACTOR]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over ``model``. Fused: one pass over memory, several times faster for large embeddings."""
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
