from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.conftest import on_ranks
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.train.config import OptimConfig, PretrainConfig
from vlbench.train.distributed import ranks, session
from vlbench.train.optim import build_optimizer, parameter_groups, set_learning_rate


def names_by_decay(model: torch.nn.Module, config: OptimConfig) -> tuple[set[str], set[str]]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed: set[str] = set()
    kept: set[str] = set()
    for group in parameter_groups(model, config):
        (decayed if group["weight_decay"] else kept).update(by_id[id(parameter)] for parameter in group["params"])
    return decayed, kept


def test_gains_biases_and_the_logit_scale_do_not_decay() -> None:
    recipe = RECIPES.get("clip")
    config = recipe.presets["tiny"]
    model = recipe.build(config, ())
    decayed, kept = names_by_decay(model, config.optim)
    assert decayed | kept == {name for name, _ in model.named_parameters()}
    assert "logit_scale" in kept
    assert all(parameter.ndim >= 2 for name, parameter in model.named_parameters() if name in decayed)
    norms = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm)
        for part in ("weight", "bias")
    }
    assert norms
    assert norms <= kept
    assert {"text.net.token_embedding.weight", "image_projection.weight"} <= decayed


def test_no_decay_names_parameters_of_any_shape() -> None:
    model = torch.nn.ModuleDict({"absolute_pos_embed": torch.nn.Embedding(3, 2), "layer": torch.nn.Linear(2, 2)})
    decayed, kept = names_by_decay(model, OptimConfig(no_decay=("absolute_pos_embed",)))
    assert kept == {"absolute_pos_embed.weight", "layer.bias"}
    assert decayed == {"layer.weight"}
    assert names_by_decay(model, OptimConfig(decay_vectors=True))[1] == set()


def test_lr_factors_scale_the_rate_of_what_they_name() -> None:
    model = torch.nn.ModuleDict({"text": torch.nn.Linear(2, 2), "visual": torch.nn.Linear(2, 2)})
    optimizer = build_optimizer(model, OptimConfig(lr_factors={"^text": 0.25, "bias$": 3.0}))
    set_learning_rate(optimizer, 0.8)
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {by_id[id(parameter)]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates == pytest.approx({"text.weight": 0.2, "text.bias": 0.2, "visual.weight": 0.8, "visual.bias": 2.4})


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, OptimConfig())] == [1]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_step_equals_the_plain_optimizer(name: str) -> None:
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    twin.load_state_dict(model.state_dict())
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.2, decay_vectors=True)  # type: ignore[arg-type]
    ours = build_optimizer(model, config)
    theirs: torch.optim.Optimizer
    if name == "sgd":
        theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2, foreach=False)
    else:
        theirs = torch.optim.AdamW(
            twin.parameters(), lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, foreach=False
        )
    for _ in range(3):
        x = torch.randn(6, 5)
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-6, atol=1e-7)


def three_steps(model: torch.nn.Module, name: str) -> None:
    """On the same gradients for whoever asks, LookAhead included."""
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, lookahead_steps=2))  # type: ignore[arg-type]
    set_learning_rate(optimizer, 0.1)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def test_every_optimizer_steps_over_sharded_weights_as_over_whole_ones(tmp_path: Path) -> None:
    """LAMB's trust ratio needs the norm of a whole matrix, of which a rank holds some rows."""

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))

    def on_rank() -> None:
        from torch.distributed.fsdp import fully_shard

        with session("cpu"):
            found = {}
            for name in ("adamw", "lamb", "sgd"):
                model = network()
                fully_shard(model)
                three_steps(model, name)
                found[name] = [parameter.full_tensor() for parameter in model.parameters()]
            torch.save(found, tmp_path / f"{ranks().rank}")

    on_ranks(on_rank)
    for name in ("adamw", "lamb", "sgd"):
        whole = network()
        three_steps(whole, name)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{rank}", weights_only=True)[name]
            for mine, theirs in zip(found, whole.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6, msg=f"{name}, rank {rank}")


def test_malformed_no_decay_pattern_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"no_decay.*regular expression"):
        override(PretrainConfig(), ["optim.no_decay=['(']"])
