"""Recomputing the blocks gives the same numbers to the bit, out of less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.stopping import Stop, StopAt
from vlbench.core.errors import UserError
from vlbench.models.text import TextConfig
from vlbench.models.two_tower import TwoTower
from vlbench.models.vision import VisualConfig, build_visual
from vlbench.models.weights import read_checkpoint
from vlbench.recipes.supervised import RECIPE
from vlbench.train.blocks import blocks
from vlbench.train.loop import fit
from vlbench.train.recompute import recompute_blocks

TINY_VIT = {"layers": 3, "width": 32, "heads": 2, "patch_size": 8}
TOWERS = {
    "timm:test_vit": {"proj_drop_rate": 0.2, "drop_path_rate": 0.2, "attn_drop_rate": 0.1},
    "timm:test_resnet": {"drop_path_rate": 0.2},
    "timm:test_efficientnet": {},
    "torchvision:resnet18": {},
    "open_clip:ViT-B-32": TINY_VIT,
    "open_clip:RN50": {"layers": [1, 1, 1, 1], "width": 8},
}


def tower(arch: str, size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return build_visual(VisualConfig(arch=arch, image_size=size, kwargs=TOWERS[arch]), embed_dim=16).train()


def backward(net: nn.Module, *, bf16: bool = False) -> int:
    """Two steps' worth of gradients; returns the bytes that the forward pass of the second kept for the backward."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    for step in range(2):
        torch.manual_seed(step)  # of the dropout
        images = torch.randn(4, 3, 32, 32)
        kept = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = net(images).float().square().mean()
            held = kept
        loss.backward()
    return held


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", TOWERS)
def test_gradients_and_running_statistics_are_the_same_to_the_bit(arch: str, bf16: bool) -> None:
    plain = tower(arch)
    lean = copy.deepcopy(plain)
    assert recompute_blocks(lean) == len(blocks(plain)) > 0
    assert backward(lean, bf16=bf16) < 0.7 * backward(plain, bf16=bf16)
    gradients = dict(lean.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:  # ClipViT's projection stands outside of forward
            assert torch.equal(parameter.grad, gradients[name].grad), name
    buffers = dict(lean.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(plain.eval()(images), lean.eval()(images))


def test_names_of_weights_stay_and_copies_are_their_own() -> None:
    net = tower("timm:test_resnet")
    names = list(net.state_dict())
    recompute_blocks(net)
    assert list(net.state_dict()) == names
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert net(torch.ones(2, 3, 32, 32)).abs().sum() > 0
    assert other(torch.ones(2, 3, 32, 32)).abs().sum() == 0


def test_text_towers_are_found_too() -> None:
    model = TwoTower(
        VisualConfig(arch="open_clip:ViT-B-32", image_size=32, kwargs=TINY_VIT),
        TextConfig(width=32, layers=2, heads=2, context_length=16),
        embed_dim=16,
    )
    assert len(blocks(model)) == 3 + 2


def test_blocks_lie_in_nothing_but_lists_and_stages() -> None:
    swin = build_visual(VisualConfig(arch="timm:swin_tiny_patch4_window7_224", image_size=224))
    assert [type(block).__name__ for block in blocks(swin)] == ["SwinTransformerBlock"] * 12
    resnet = build_visual(VisualConfig(arch="torchvision:resnet50", image_size=32))
    assert [type(block).__name__ for block in blocks(resnet)] == ["Bottleneck"] * 16


def test_architecture_without_blocks_is_refused_by_name() -> None:
    net = build_visual(VisualConfig(arch="torchvision:vgg11", image_size=32))
    with pytest.raises(UserError, match="torchvision:vgg11: no blocks are known of this architecture") as error:
        recompute_blocks(net)
    assert "\n" not in str(error.value)


def test_runs_with_and_without_are_one_run(settings: Callable[..., Any], tmp_path: Path) -> None:
    lean = "checkpoint_activations=true"
    plain = read_checkpoint(fit(RECIPE, settings(), out=tmp_path / "plain"))["model"]
    whole = read_checkpoint(fit(RECIPE, settings(lean), out=tmp_path / "lean"))["model"]
    assert all(torch.equal(plain[name], whole[name]) for name in plain)


def test_resumed_run_may_begin_to_recompute(settings: Callable[..., Any], tmp_path: Path) -> None:
    plain = read_checkpoint(fit(RECIPE, settings(), out=tmp_path / "plain"))["model"]
    with pytest.raises(Stop):
        fit(RECIPE, settings(), out=tmp_path / "run", watcher=StopAt(9))
    path = fit(RECIPE, settings("checkpoint_activations=true"), out=tmp_path / "run", resume=True)
    assert all(torch.equal(plain[name], value) for name, value in read_checkpoint(path)["model"].items())
