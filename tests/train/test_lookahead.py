"""LookAhead against the paper's algorithm 1 in a loop of its own, saved and loaded, stopped and resumed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.conftest import stopped_and_resumed
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.models.weights import read_checkpoint
from vlbench.recipes.supervised import RECIPE
from vlbench.train.config import OptimConfig, PretrainConfig
from vlbench.train.loop import fit
from vlbench.train.optim import build_optimizer, set_learning_rate


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3, dtype=torch.float64)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_learning_rate(optimizer, 0.1 / (1 + step))
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def sgd_by_hand(steps: int, k: int, alpha: float) -> np.ndarray:
    """Algorithm 1 around SGD with momentum on the same data; the weight alone, its gradient written out."""
    model = linear()
    theta, bias = model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()
    fast = [theta, bias]
    slow = [theta.copy(), bias.copy()]
    momentum = [np.zeros_like(theta), np.zeros_like(bias)]
    for step in range(steps):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).numpy()
        error = 2 * (x @ fast[0].T + fast[1]) / 18
        for i, gradient in enumerate((error.T @ x, error.sum(0))):
            momentum[i] = 0.9 * momentum[i] + gradient
            fast[i] = fast[i] - 0.1 / (1 + step) * momentum[i]
        if (step + 1) % k == 0:
            for i in range(2):
                slow[i] = slow[i] + alpha * (fast[i] - slow[i])
                fast[i] = slow[i].copy()
    return fast[0]


@pytest.mark.parametrize(("steps", "k", "alpha"), [(5, 5, 0.5), (13, 5, 0.5), (9, 2, 0.8), (4, 1, 0.3)])
def test_lookahead_is_the_papers_algorithm_from_the_first_steps_on(steps: int, k: int, alpha: float) -> None:
    model = linear()
    config = OptimConfig(name="sgd", weight_decay=0.0, lookahead_steps=k, lookahead_alpha=alpha)
    train(model, build_optimizer(model, config), range(steps))
    np.testing.assert_allclose(model.weight.detach().numpy(), sgd_by_hand(steps, k, alpha), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_alpha_of_one_and_fewer_than_k_steps_change_nothing(name: str) -> None:
    weights = []
    for more in ({}, {"lookahead_steps": 3, "lookahead_alpha": 1.0}, {"lookahead_steps": 8}):
        model = linear()
        train(model, build_optimizer(model, OptimConfig(name=name, **more)), range(7))
        weights.append(model.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_slow_weights_and_the_count_are_in_the_state(name: str, stop: int) -> None:
    """Loaded before or after k steps, within a window or at its end, the optimizer goes on to the same bits."""
    config = OptimConfig(name=name, lookahead_steps=5)  # type: ignore[arg-type]
    whole = linear()
    train(whole, build_optimizer(whole, config), range(12))
    model = linear()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = linear()
    again = build_optimizer(resumed, config)
    again.load_state_dict(saved["optimizer"])  # before the model: the slow weights are not taken from it
    resumed.load_state_dict(saved["model"])
    train(resumed, again, range(stop, 12))
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_parameter_without_gradients_stays_and_looks_ahead_from_its_first(name: str) -> None:
    model = torch.nn.ParameterDict({"early": torch.ones(1), "late": torch.full((1,), 2.0)})
    config = OptimConfig(name=name, weight_decay=0.0, lookahead_steps=2)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.1)
    model["early"].grad = torch.ones(1)
    optimizer.step()
    optimizer.step()
    assert model["late"].item() == 2.0
    model["late"].grad = torch.ones(1)
    optimizer.step()
    optimizer.step()
    moved = model["late"].item()
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.step()
    assert moved == model["late"].item(), "slow and fast weights are one after a step back"
    plain = torch.nn.ParameterDict({"late": torch.full((1,), 2.0)})
    beside = build_optimizer(plain, config.model_copy(update={"lookahead_steps": 0}))
    set_learning_rate(beside, 0.1)
    plain["late"].grad = torch.ones(1)
    if name == "lamb":  # its bias correction counts the group's steps
        beside.param_groups[0]["step"] = torch.tensor(2.0)
    beside.step()
    beside.step()
    assert moved == pytest.approx(2.0 + 0.5 * (plain["late"].item() - 2.0), rel=1e-6)


def test_lookahead_resumed_gives_the_same_bits(settings: Callable[..., Any], tmp_path: Path) -> None:
    """Checkpoints at 4 and 8, windows of 3: the count and the slow weights of a window half done must come back."""
    config = settings("optim.name=sgd", "optim.lr=0.05", "optim.lookahead_steps=3")
    looked_ahead = stopped_and_resumed(config, tmp_path, stop=7)
    plain = read_checkpoint(fit(RECIPE, settings("optim.name=sgd", "optim.lr=0.05"), out=tmp_path / "plain"))["model"]
    assert any(not torch.equal(plain[name], looked_ahead[name]) for name in plain)


@pytest.mark.parametrize("setting", ["lookahead_steps=-1", "lookahead_alpha=0", "lookahead_alpha=1.5", "name=lion"])
def test_bad_settings_are_one_clear_line(setting: str) -> None:
    with pytest.raises(UserError, match=setting.split("=")[0]):
        override(PretrainConfig(), [f"optim.{setting}"])
