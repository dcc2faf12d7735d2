"""LAMB against the paper's algorithm 2 in a loop of its own, and stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.conftest import stopped_and_resumed
from vlbench.train.config import OptimConfig
from vlbench.train.optim import build_optimizer, set_learning_rate


class Net(torch.nn.Module):
    """A matrix that decays, a gain that does not, a matrix that is 0, a matrix without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.gain = torch.nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
        self.zero = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.idle = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))


def gradients(steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    shapes = {"weight": (3, 4), "gain": (5,), "zero": (2, 2)}
    return [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(steps)]


def by_hand(decay: float, rates: list[float], b1: float, b2: float, eps: float) -> dict[str, np.ndarray]:
    """Algorithm 2, parameter by parameter."""
    weights = {name: value.detach().numpy().copy() for name, value in Net().named_parameters()}
    m = {name: np.zeros_like(value) for name, value in weights.items()}
    v = {name: np.zeros_like(value) for name, value in weights.items()}
    for t, (gradient, rate) in enumerate(zip(gradients(len(rates)), rates, strict=True), start=1):
        for name, g in gradient.items():
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            u = (m[name] / (1 - b1**t)) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            ratio = 1.0
            if name != "gain":
                u = u + decay * weights[name]
                norm = np.sqrt((weights[name] ** 2).sum())
                if norm > 0:
                    ratio = norm / np.sqrt((u**2).sum())
            weights[name] = weights[name] - rate * ratio * u
    return weights


@pytest.mark.parametrize("decay", [0.3, 0.0])
def test_lamb_is_the_papers_algorithm(decay: float) -> None:
    """Trust ratio for what may decay, even at a rate of 0; for a gain none; 1 for a matrix of zeros."""
    rates = [0.1, 0.05, 0.2, 0.01]
    model = Net()
    optimizer = build_optimizer(model, OptimConfig(name="lamb", weight_decay=decay, betas=(0.8, 0.9), eps=1e-3))
    for gradient, rate in zip(gradients(len(rates)), rates, strict=True):
        set_learning_rate(optimizer, rate)
        for name, g in gradient.items():
            getattr(model, name).grad = torch.from_numpy(g)
        optimizer.step()
    expected = by_hand(decay, rates, 0.8, 0.9, 1e-3)
    for name, value in model.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), expected[name], rtol=1e-12, atol=1e-12, err_msg=name)
    assert torch.equal(model.idle, Net().idle)


def test_lamb_moves_each_matrix_by_the_rate_times_its_norm_whatever_the_gradients_length() -> None:
    """No clipping of its own: a gradient of norm 1,000 and one of norm 0.001 give one step."""
    moved = []
    for length in (1e3, 1e-3):
        model = Net()
        optimizer = build_optimizer(model, OptimConfig(name="lamb", weight_decay=0.0, eps=1e-12))
        set_learning_rate(optimizer, 0.1)
        direction = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        model.weight.grad = length * direction / direction.norm()
        optimizer.step()
        moved.append((model.weight - Net().weight).detach())
        assert moved[-1].norm().item() == pytest.approx(0.1 * Net().weight.norm().item(), rel=1e-6)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=0)


def test_lamb_resumed_gives_the_same_bits(settings: Callable[..., Any], tmp_path: Path) -> None:
    stopped_and_resumed(settings("optim.name=lamb", "optim.lr=1e-2"), tmp_path, stop=7)
