"""Sharded runs of every recipe with texts over two ranks: captions are of any length, and losses gather too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import on_ranks
from tests.train.stopping import Stop, StopAt
from tests.train.test_sharding import assert_near
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.data.shapes.world import TINY
from vlbench.data.shapes.write import write_world
from vlbench.models.bert import BertConfig, BertTower
from vlbench.models.text import TextConfig, TextTower, build_text
from vlbench.models.weights import read_checkpoint
from vlbench.train.distributed import ranks, session
from vlbench.train.loop import fit
from vlbench.train.sharding import clip_gradients, shard_weights

NARROW = {"virtex": ["head=L1_H32"], "muvla": ["stream.width=32", "stream.heads=2", "roi.strides=[16]"]}
"""What makes a recipe small that has no text tower of CLIP's kind."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "shapes"
    return write_world(root, sizes=TINY, parts=("pairs", "labels"), workers=1)


def settings(recipe: str, world: Path, *words: str) -> Any:
    """The tiny preset for two steps over a small world.

    In one of the steps, one rank's captions are short and long ones, and the other's are all short or all long.
    """
    run = ["visual.arch=timm:test_vit", "batch_size=8", "steps=2", "workers=0", "log_every=1", "optim.lr=1e-3"]
    run += NARROW.get(recipe, ["text.width=32"])
    tiny = RECIPES.get(recipe).presets["tiny"]
    data = [re.sub(r"^shapes:\w+", rf"\g<0>?root={world}", spec) for spec in tiny.data]
    return override(tiny.model_copy(update={"data": tuple(data)}), [*run, *words])


def train(recipe: str, config: Any, out: Path, **more: Any) -> None:
    with session("cpu") as device:
        fit(RECIPES.get(recipe), config, out=out, device=device, **more)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("clip", []),
        ("clip", ["grad_cache=true", "accumulate=2"]),
        ("unicl", []),
        ("unicl", ["variant=multi_task"]),
        ("align", ["visual.arch=timm:test_resnet"]),  # BatchNorm's batch is a rank's, with shards and without
        ("virtex", []),
        ("virtex", ["variant=masked_lm", "visual.arch=timm:test_resnet"]),
        ("virtex", ["variant=multilabel"]),
        ("virtex", ["optim.name=sgd", "optim.lr=0.02", "optim.lookahead_steps=2"]),  # shards pulled to slow weights
        ("muvla", []),
    ],
)
def test_sharded_run_is_the_unsharded_one(recipe: str, words: list[str], world: Path, tmp_path: Path) -> None:
    config = settings(recipe, world, *words)
    on_ranks(train, recipe, override(config, ["shard=true"]), tmp_path / "sharded")
    on_ranks(train, recipe, config, tmp_path / "copies")
    assert_near(tmp_path / "sharded", tmp_path / "copies")


def test_resumed_run_is_the_same_to_the_bit_and_keeps_what_it_learnt(world: Path, tmp_path: Path) -> None:
    config = settings("align", world, "shard=true", "checkpoint_every=1")

    def stopped() -> None:
        with pytest.raises(Stop):
            train("align", config, tmp_path / "stopped", watcher=StopAt(2))

    def resumed() -> None:
        train("align", config, tmp_path / "stopped", resume=True)

    on_ranks(train, "align", config, tmp_path / "whole")
    on_ranks(stopped)
    assert read_checkpoint(tmp_path / "stopped" / "ckpt.pt")["step"] == 1
    on_ranks(resumed)
    mine, whole = (read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("stopped", "whole"))
    assert mine["step"] == whole["step"] == 2
    for part in ("model", "assets"):
        assert list(mine[part]) == list(whole[part]) != []
        assert all(torch.equal(value, whole[part][name]) for name, value in mine[part].items())


@pytest.mark.parametrize("kind", ["causal", "bert"])
def test_texts_do_not_decide_how_many_collectives_a_rank_issues(kind: str) -> None:
    tokens_BL = torch.zeros(4, 32, dtype=torch.long)
    for row_L, length in zip(tokens_BL, (5, 30, 6, 7), strict=True):  # the first rank has a long one
        row_L[:length] = torch.arange(1, length + 1)
    whole = tower(kind)
    expected_BE = whole(tokens_BL)
    expected_BE.square().mean().backward()

    def rank() -> None:
        with session("cpu") as device:
            mine, here = tower(kind), ranks().rank
            shard_weights(mine, device, bf16=False)
            found_BE = mine(tokens_BL[:2] if here == 0 else tokens_BL[2:, :16])
            torch.testing.assert_close(found_BE, expected_BE[2 * here : 2 * here + 2], rtol=0, atol=1e-6)
            found_BE.square().mean().backward()
            clip_gradients(mine.parameters(), 1e9)
            for (name, p), q in zip(mine.named_parameters(), whole.parameters(), strict=True):
                gradient = p.grad.full_tensor()  # type: ignore[union-attr]
                torch.testing.assert_close(gradient, q.grad, rtol=1e-4, atol=1e-6, msg=name)

    on_ranks(rank)


def tower(kind: str) -> TextTower | BertTower:
    torch.manual_seed(0)
    if kind == "causal":
        return build_text(TextConfig(width=32, layers=2, heads=2, context_length=32), 16)
    return BertTower(BertConfig(width=32, layers=2, heads=2, context_length=32, dropout=0.0), 16, vocabulary_size=64)
