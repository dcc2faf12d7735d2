"""A batch in parts with its gradients cached is the batch in one: gradients, dropout, statistics, ranks, resume."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.train.conftest import on_ranks, stopped_and_resumed
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.models.weights import read_checkpoint
from vlbench.recipes.base import TwoTowerRecipe
from vlbench.train.config import PretrainConfig
from vlbench.train.distributed import ranks, session
from vlbench.train.gradcache import cached_gradients
from vlbench.train.loop import fit
from vlbench.train.losses import align_loss, clip_loss, unicl_loss


class Towers(nn.Module):
    """Two small towers in float64 with, as asked for, dropout and batch statistics."""

    def __init__(self, *, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(8, dtype=torch.float64) if norm else nn.Identity()
        self.image = nn.Sequential(
            nn.Linear(6, 8, dtype=torch.float64), middle, nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 5).double()
        )
        self.text = nn.Linear(6, 5, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.calls = 0

    def forward(self, images_BX: torch.Tensor, tokens_BX: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        image, text = self.image(images_BX), self.text(tokens_BX)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1), self.logit_scale.exp()


class Pairs(TwoTowerRecipe):
    """A recipe whose images are vectors."""

    name = "pairs"

    def __init__(self, kind: str = "clip") -> None:
        self.kind = kind

    def images(self, batch: Mapping[str, torch.Tensor], config: Any) -> torch.Tensor:
        return batch["images_BX"]

    def embed(self, model: nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> Any:
        return model(batch["images_BX"], batch["tokens_BX"])

    def contrast(self, image_BE: Any, text_BE: Any, logit_scale: Any, batch: Any, config: Any) -> torch.Tensor:
        if self.kind == "align":
            return align_loss(image_BE, text_BE, 1 / logit_scale, block=config.loss_block)
        if self.kind == "unicl":
            return unicl_loss(image_BE, text_BE, batch["labels_B"], logit_scale, block=config.loss_block)
        return clip_loss(image_BE, text_BE, logit_scale, block=config.loss_block)


def whole_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, tokens = torch.randn(2, 24, 6, generator=generator, dtype=torch.float64)
    labels = torch.tensor([-1, 0, 1, 1, 2, 4, -1, -1, -1, 0, 0, 1] * 2)
    return {"images_BX": images, "tokens_BX": tokens, "labels_B": labels, "epoch": torch.tensor(0.5)}


def seed(part: int) -> None:
    torch.manual_seed(100 + part)


def exchange_of(model: nn.Module) -> Callable[..., Any]:
    alone = not isinstance(model, DistributedDataParallel)
    return lambda *, last: contextlib.nullcontext() if alone or last else model.no_sync()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


def plain(recipe: TwoTowerRecipe, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = recipe.loss(model, batch, PretrainConfig())["loss"]
    loss.backward()
    return loss.detach()


def cached(recipe: Any, model: nn.Module, batch: Any, parts: int, *more: str) -> torch.Tensor:
    config = override(PretrainConfig(batch_size=24), [f"accumulate={parts}", "grad_cache=true", *more])
    return cached_gradients(recipe, model, batch, config, seed=seed, exchange=exchange_of(model))["loss"]


def fresh(**how: Any) -> Towers:
    torch.manual_seed(0)
    return Towers(**how)


@pytest.mark.parametrize("kind", ["clip", "unicl", "align"])
@pytest.mark.parametrize("parts", [2, 3, 24])
@pytest.mark.parametrize("block", ["none", "5"])
def test_gradients_are_those_of_the_whole_batch(kind: str, parts: int, block: str) -> None:
    one, many = fresh(), fresh()
    loss = plain(Pairs(kind), one, whole_batch())
    again = cached(Pairs(kind), many, whole_batch(), parts, *([] if block == "none" else [f"loss_block={block}"]))
    assert again.item() == pytest.approx(loss.item(), abs=1e-6)
    assert many.calls == 2 * parts, "each part is embedded twice"
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradients(many)[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_a_recipes_own_loss_is_what_is_cached() -> None:
    """What it adds to ``contrast``, and what it logs: ALIGN's temperature, say."""

    class Regularised(Pairs):
        def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
            losses = super().loss(model, batch, config)
            spread = losses["logit_scale"].square()
            return {"loss": losses["loss"] + spread, "temperature": 1 / losses["logit_scale"]}

    one, many = fresh(), fresh()
    recipe, config = Regularised(), PretrainConfig(batch_size=24, accumulate=3, grad_cache=True)
    plain(recipe, one, whole_batch())
    logged = cached_gradients(recipe, many, whole_batch(), config, seed=seed, exchange=exchange_of(many))
    assert logged["temperature"].item() == pytest.approx(math.exp(-2))
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradients(many)[name], gradient, rtol=1e-12, atol=1e-12, msg=name)
    assert all(not value.requires_grad for value in logged.values())


@pytest.mark.parametrize("parts", [2, 4])
def test_the_logit_scales_gradient_is_not_multiplied_by_the_number_of_parts(parts: int) -> None:
    """Where each part's backward pass takes the loss of the whole batch anew, its gradient comes out n times too large
    (and the towers' do not, so that no learning rate can mend it)."""
    one, many = fresh(), fresh()
    plain(Pairs(), one, whole_batch())
    cached(Pairs(), many, whole_batch(), parts)
    assert abs(one.logit_scale.grad.item()) > 1e-3
    assert many.logit_scale.grad.item() == pytest.approx(one.logit_scale.grad.item(), rel=1e-12)


def test_accumulation_without_a_cache_sees_fewer_negatives() -> None:
    """The tests above can fail: parts by themselves give another loss and another gradient."""
    one, many = fresh(), fresh()
    loss = plain(Pairs(), one, whole_batch())
    first = {name: tensor[:12] if tensor.ndim else tensor for name, tensor in whole_batch().items()}
    second = {name: tensor[12:] if tensor.ndim else tensor for name, tensor in whole_batch().items()}
    parts = (plain(Pairs(), many, first) + plain(Pairs(), many, second)) / 2
    assert parts < loss - 0.1
    ours, theirs = many.text.weight.grad.flatten() / 2, one.text.weight.grad.flatten()
    assert torch.cosine_similarity(ours, theirs, dim=0) < 0.99


def test_both_passes_of_a_part_draw_the_same_dropout() -> None:
    """The gradient of the whole batch with the masks that the parts drew, written out."""
    one, many = fresh(dropout=0.4), fresh(dropout=0.4)
    cached(Pairs(), many, whole_batch(), 3)
    batch = whole_batch()
    embedded = []
    for part in range(3):
        seed(part)
        rows = slice(8 * part, 8 * part + 8)
        embedded.append(one(batch["images_BX"][rows], batch["tokens_BX"][rows]))
    images, texts, scales = zip(*embedded, strict=True)
    clip_loss(torch.cat(images), torch.cat(texts), scales[0]).backward()
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradients(many)[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_batch_statistics_are_a_parts_own_and_counted_once() -> None:
    many, once = fresh(norm=True), fresh(norm=True)
    cached(Pairs(), many, whole_batch(), 3)
    for part in whole_batch()["images_BX"].chunk(3):
        once.image(part)
    assert many.image[1].num_batches_tracked == 3
    for name, buffer in once.named_buffers():
        assert torch.equal(dict(many.named_buffers())[name], buffer), name


def test_gradients_under_autocast_are_those_of_the_whole_batch() -> None:
    one, many = fresh().float(), fresh().float()
    batch = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in whole_batch().items()}
    cached(Pairs(), many, batch, 2, "precision=bf16")
    with torch.autocast("cpu", torch.bfloat16):
        loss = Pairs().loss(one, batch, PretrainConfig())["loss"]
    loss.backward()
    for name, gradient in gradients(one).items():
        apart = (gradients(many)[name] - gradient).norm() / gradient.norm()
        assert apart < 0.03, name  # each part rounds its share to 8 bits


def test_a_frozen_tower_and_a_frozen_scale_get_no_gradient() -> None:
    one, many = fresh(), fresh()
    for model in (one, many):
        model.image.requires_grad_(False)
        model.logit_scale.requires_grad_(False)
    plain(Pairs(), one, whole_batch())
    cached(Pairs(), many, whole_batch(), 2)
    assert many.logit_scale.grad is None
    torch.testing.assert_close(many.text.weight.grad, one.text.weight.grad, rtol=0, atol=1e-12)


def test_over_two_ranks_the_encoders_gradients_are_not_halved(tmp_path: Path) -> None:
    """Cached in three parts by each of two ranks: every parameter's mean gradient is that of the whole batch."""

    def on_rank() -> None:
        with session("cpu"):
            rank = ranks().rank
            mine = slice(12 * rank, 12 * rank + 12)
            batch = {name: tensor[mine] if tensor.ndim else tensor for name, tensor in whole_batch().items()}
            for kind, block in (("clip", "none"), ("unicl", "none"), ("align", "5")):
                model = DistributedDataParallel(fresh())
                for _ in range(2):  # a second step: nothing of the first is left behind
                    model.zero_grad(set_to_none=True)
                    loss = cached(Pairs(kind), model, batch, 3, *([] if block == "none" else [f"loss_block={block}"]))
                found = {name: gradient.tolist() for name, gradient in gradients(model.module).items()}
                (tmp_path / f"{kind}-{rank}").write_text(json.dumps([loss.item(), found]))

    on_ranks(on_rank)
    for kind in ("clip", "unicl", "align"):
        one = fresh()
        loss = plain(Pairs(kind), one, whole_batch())
        for rank in (0, 1):
            again, found = json.loads((tmp_path / f"{kind}-{rank}").read_text())
            assert again == pytest.approx(loss.item(), abs=1e-6)
            for name, gradient in gradients(one).items():
                where = f"{kind}, rank {rank}: {name}"
                np.testing.assert_allclose(found[name], gradient.numpy(), rtol=0, atol=1e-12, err_msg=where)


def clip_run(folder: Path, *more: str) -> Any:
    """CLIP without batch statistics and dropout, a few steps on the colours."""
    config = RECIPES.get("clip").presets["tiny"]
    return override(
        config,
        [
            f"data=[imagefolder:{folder}]",
            "steps=4",
            "batch_size=8",
            "text.width=16",  # less of a vocabulary to save
            "text.layers=1",
            "visual.arch=timm:test_vit",
            "visual.image_size=32",
            "checkpoint_every=100",
            "log_every=2",
            "optim.lr=1e-3",
            "workers=0",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def one_batch(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose batches are taken in one."""
    return fit(RECIPES.get("clip"), clip_run(folder), out=tmp_path_factory.mktemp("one"))


def log_of(checkpoint: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("world", "more"), [(1, "accumulate=8"), (2, "loss_block=3"), (2, "shard=true")])
def test_a_cached_run_is_the_run_in_one_batch(
    world: int, more: str, folder: Path, one_batch: Path, tmp_path: Path
) -> None:
    config = clip_run(folder, "accumulate=4", "grad_cache=true", more)

    def on_rank() -> None:
        with session("cpu") as device:
            fit(RECIPES.get("clip"), config, out=tmp_path, device=device)

    on_ranks(on_rank, world=world)
    one, many = (read_checkpoint(path)["model"] for path in (one_batch, tmp_path / "ckpt.pt"))
    for name, weights in one.items():
        torch.testing.assert_close(many[name], weights, rtol=0, atol=1e-4, msg=name)
    for mine, theirs in zip(log_of(tmp_path / "ckpt.pt"), log_of(one_batch), strict=True):
        for key in ("loss", "logit_scale", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3), key
        assert mine["samples_seen"] == theirs["samples_seen"]


def test_a_cached_run_resumed_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    config = clip_run(
        folder, "accumulate=2", "grad_cache=true", "visual.kwargs={proj_drop_rate: 0.2}", "checkpoint_every=2"
    )
    stopped_and_resumed(config, tmp_path, stop=3, recipe=RECIPES.get("clip"))


@pytest.mark.parametrize(("name", "setting"), [("supervised", ""), ("unicl", "variant=supcon")])
def test_a_recipe_without_contrast_is_refused_in_one_line(name: str, setting: str, tmp_path: Path) -> None:
    recipe = RECIPES.get(name)
    config = override(recipe.presets["tiny"], ["accumulate=2", "grad_cache=true", *filter(None, [setting])])
    with pytest.raises(UserError, match=f"grad_cache=true: {name}.* leave grad_cache out") as error:
        fit(recipe, config, out=tmp_path)
    assert "\n" not in str(error.value)


def test_a_cache_of_one_part_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"grad_cache.*set accumulate"):
        override(PretrainConfig(), ["grad_cache=true"])
