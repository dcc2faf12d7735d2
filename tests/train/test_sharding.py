"""A sharded run over two ranks is the run of one process, and its checkpoint is like any other."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.conftest import on_ranks
from tests.train.stopping import Stop, StopAt
from vlbench.core.config import override
from vlbench.core.errors import RunError, UserError
from vlbench.models.load import load_backbone
from vlbench.models.text import TextConfig
from vlbench.models.vision import VisualConfig
from vlbench.models.weights import read_checkpoint
from vlbench.recipes.clip import RECIPE, ClipConfig
from vlbench.train.config import OptimConfig
from vlbench.train.distributed import session
from vlbench.train.loop import fit
from vlbench.train.optim import build_optimizer
from vlbench.train.sharding import clip_gradients, cut_optimizer_state, shard_weights, whole_state


@pytest.fixture(scope="module")
def config(folder: Path) -> ClipConfig:
    """CLIP on the coloured images, without randomness in the network: clipped in every step."""
    return ClipConfig(
        data=(f"imagefolder:{folder}",),
        steps=4,
        batch_size=8,
        optim=OptimConfig(lr=1e-3, clip_norm=0.05),
        visual=VisualConfig(
            arch="open_clip:ViT-B-32", image_size=32, kwargs={"layers": 2, "width": 32, "heads": 2, "patch_size": 8}
        ),
        text=TextConfig(width=32, layers=2, heads=2, context_length=16),
        embed_dim=32,
        log_every=1,
        workers=0,
    )


def train(config: ClipConfig, out: Path, **more: Any) -> None:
    with session("cpu") as device:
        fit(RECIPE, config, out=out, device=device, **more)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out / "ckpt.pt")["model"]


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_near(mine: Path, theirs: Path) -> None:
    a, b = weights(mine), weights(theirs)
    assert list(a) == list(b)
    for name, value in a.items():
        assert type(value) is torch.Tensor
        torch.testing.assert_close(value, b[name], rtol=0, atol=1e-5, msg=name)
    for x, y in zip(log_of(mine), log_of(theirs), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(config: ClipConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(RECIPE, config, out=tmp_path_factory.mktemp("alone")).parent


@pytest.fixture(scope="module")
def sharded(config: ClipConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded")
    on_ranks(train, override(config, ["shard=true"]), out)
    return out


def test_two_ranks_are_one_process(alone: Path, sharded: Path, config: ClipConfig) -> None:
    assert_near(sharded, alone)
    norms = [record["grad_norm"] for record in log_of(alone)]
    assert min(norms) > config.optim.clip_norm  # so that clipping is tested
    assert weights(sharded)["logit_scale"] != config.logit_scale_init


def test_checkpoint_is_read_as_any_other(sharded: Path) -> None:
    backbone = load_backbone(str(sharded / "ckpt.pt"))
    assert backbone.encode_image(torch.zeros(1, 3, 32, 32)).embed_BE.shape == (1, 32)


@pytest.mark.parametrize(
    "words", [["accumulate=2", "checkpoint_activations=true"], ["accumulate=2", "grad_cache=true", "precision=bf16"]]
)
def test_parts_recomputation_and_bf16_are_the_unsharded_ones(
    words: list[str], config: ClipConfig, tmp_path: Path
) -> None:
    config = override(config, [*words, "steps=2"])
    on_ranks(train, override(config, ["shard=true"]), tmp_path / "sharded")
    on_ranks(train, config, tmp_path / "copies")
    assert_near(tmp_path / "sharded", tmp_path / "copies")


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd"])
def test_optimizers_step_as_unsharded_ones_and_their_state_travels(optimizer: str) -> None:
    config = OptimConfig(name=optimizer, lr=0.05, lookahead_steps=2)

    def stepped(net: nn.Module, images: torch.Tensor, *, from_state: Any = None) -> tuple[list[torch.Tensor], Any]:
        optim = build_optimizer(net, config)
        if from_state is not None:
            cut = copy.deepcopy(cut_optimizer_state(optim, from_state))
            for group, own in zip(cut["param_groups"], optim.param_groups, strict=True):
                group["fused"] = own.get("fused")  # sharded SGD is not
            optim.load_state_dict(cut)
        for _ in range(3):
            optim.zero_grad()
            net(images).square().mean().backward()
            clip_gradients(net.parameters(), math.inf)
            optim.step()
        return [whole_state(p.detach()).clone() for p in net.parameters()], optim.state_dict()

    images = torch.randn(4, 16)
    start = [p.detach().clone() for p in scaled().parameters()]
    once, state = stepped(scaled(), images)
    twice, _ = stepped(scaled(), images, from_state=state)  # the first weights with moments

    def rank() -> None:
        with session("cpu") as device:
            share = images.chunk(2)[torch.distributed.get_rank()]
            for expected, moments in ((once, None), (twice, state)):
                mine = scaled()
                shard_weights(mine, device, bf16=False)
                found, kept = stepped(mine, share, from_state=moments)
                kept = whole_state(kept)
                if torch.distributed.get_rank() == 0:
                    for a, b, before in zip(found, expected, start, strict=True):
                        assert (a - b).abs().max() < 1e-3 * (b - before).abs().max()
                    assert kept["state"].keys() == state["state"].keys()
                    shapes = [[getattr(v, "shape", None) for v in s.values()] for s in kept["state"].values()]
                    assert shapes == [[getattr(v, "shape", None) for v in s.values()] for s in state["state"].values()]

    on_ranks(rank)


def test_resumed_run_is_the_same_to_the_bit_and_keeps_its_ranks(
    config: ClipConfig, sharded: Path, tmp_path: Path
) -> None:
    config = override(config, ["shard=true", "checkpoint_every=2"])

    def stopped() -> None:
        with pytest.raises(Stop):
            train(config, tmp_path, watcher=StopAt(3))

    on_ranks(stopped)
    saved = read_checkpoint(tmp_path / "ckpt.pt")
    assert saved["step"] == 2
    moments = saved["train"]["optimizer"]["state"]
    shapes = sorted(tuple(slot["exp_avg"].shape) for slot in moments.values())
    assert shapes == sorted(tuple(value.shape) for value in saved["model"].values() if value.is_floating_point())

    def other_ranks() -> None:
        with pytest.raises(UserError, match="shard=true: there is one process only"):
            train(config, tmp_path, resume=True)

    other_ranks()
    on_ranks(resumed, config, tmp_path)
    whole = weights(sharded)
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path).items())
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2, 3, 4]


def resumed(config: ClipConfig, out: Path) -> None:
    train(config, out, resume=True)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(config: ClipConfig, tmp_path: Path) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(RECIPE, name)

        def with_assets(self, assets: Any) -> Any:
            return self

        def loss(self, model: nn.Module, batch: Any, config: Any) -> Any:
            found = RECIPE.loss(model, batch, config)
            bad = math.nan if torch.distributed.get_rank() == 1 else 1.0
            return found | {"loss": found["loss"] * bad}

    def rank() -> None:
        with session("cpu") as device, pytest.raises(RunError, match="step 1: not finite"):
            fit(Broken(), override(config, ["shard=true"]), out=tmp_path, device=device)  # type: ignore[arg-type]

    on_ranks(rank)


def test_each_rank_keeps_its_share_and_clips_as_torch_does() -> None:
    whole, images = scaled(), torch.randn(4, 16)
    whole(images).square().mean().backward()
    norms = [nn.utils.clip_grad_norm_(whole.parameters(), limit) for limit in (math.inf, 0.1)]

    def rank() -> None:
        with session("cpu") as device:
            mine = scaled()
            shard_weights(mine, device, bf16=False)
            kept = sum(getattr(p, "_local_tensor", p).numel() for p in mine.parameters())
            assert kept < 0.6 * sum(p.numel() for p in whole.parameters())
            share = images.chunk(2)[torch.distributed.get_rank()]
            mine(share).square().mean().backward()
            for limit, norm in zip((math.inf, 0.1), norms):
                torch.testing.assert_close(clip_gradients(mine.parameters(), limit), norm)
            for p, q in zip(mine.parameters(), whole.parameters()):
                gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(gradient, q.grad)

    on_ranks(rank)


def scaled() -> nn.Module:
    torch.manual_seed(0)
    return Scaled()


class Scaled(nn.Module):
    """Two blocks and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2)))
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x) * self.scale
