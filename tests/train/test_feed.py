from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.finetune.toys import Points, Toy, ToyConfig
from tests.train.test_loop import same, weights
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.recipes.supervised import RECIPE
from vlbench.train.distributed import Ranks
from vlbench.train.feed import Feed, MixtureFeed
from vlbench.train.loop import fit
from vlbench.train.run_config import RunConfig


def test_the_mixture_is_a_feed_and_the_default(settings: Callable[..., Any], tmp_path: Path) -> None:
    config = settings("steps=3")
    feed: Feed = MixtureFeed(RECIPE, config)
    assert len(feed) == 48
    assert feed.identity()[0]["examples"] == 48
    given = fit(RECIPE, config, out=tmp_path / "given", feed=feed)
    assert same(weights(given), weights(fit(RECIPE, config, out=tmp_path / "default")))
    assert feed.tally.drawn == 24


def test_a_feeds_batches_do_not_depend_on_where_one_starts(settings: Callable[..., Any]) -> None:
    config = settings("steps=4", "accumulate=2")
    feed = MixtureFeed(RECIPE, config)

    def drawn(start: int) -> list[dict[str, torch.Tensor]]:
        return list(feed.batches(RECIPE, config, start=start, here=Ranks(), pin=False))

    whole, rest = drawn(0), drawn(2)
    assert len(whole) == 8
    for one, other in zip(whole[4:], rest, strict=True):
        assert torch.equal(one["images_BCHW"], other["images_BCHW"])
        assert torch.equal(one["labels_B"], other["labels_B"])


def test_after_save_sees_every_checkpoint_and_moves_nothing(settings: Callable[..., Any], tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def look(step: int, module: nn.Module) -> None:
        seen.append((step, (tmp_path / "looked" / "ckpt.pt").is_file()))
        module.eval()
        torch.manual_seed(step)

    plain = fit(RECIPE, settings(), out=tmp_path / "plain")
    looked = fit(RECIPE, settings(), out=tmp_path / "looked", after_save=look)
    assert seen == [(4, True), (8, True), (12, True)]
    assert same(weights(plain), weights(looked)), "dropout is on again after the look"


def test_a_feed_that_changed_is_not_resumed(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, module: nn.Module) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit(Toy(), ToyConfig(), out=tmp_path, feed=Points(), after_save=stop)
    with pytest.raises(UserError, match="the data have changed since \\(points: examples 60, now 61\\)"):
        fit(Toy(), ToyConfig(), out=tmp_path, resume=True, feed=Points(61))


def test_run_settings_name_no_data_of_their_own() -> None:
    config = RunConfig()
    assert "data" not in RunConfig.model_fields
    assert [step for step in range(1, 501) if config.saves_at(step)] == [500]
    assert override(config, ["accumulate=2", "batch_size=4"]).loads == 2
