"""Batches are a pure function of seed and step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.finetune.fusion.quadrants import backbone, settings, soft_colour, which_colour, which_place
from vlbench.adapters.common import fusion
from vlbench.adapters.encoder import Encoder
from vlbench.core.errors import UserError
from vlbench.finetune.fusion.feed import QuestionFeed
from vlbench.finetune.fusion.heads import AnswerHead, ClassHead, RegionHead
from vlbench.finetune.fusion.questions import Questions
from vlbench.finetune.fusion.recipe import FusionTuner
from vlbench.train.distributed import Ranks

N = 20


def feed_of(questions: Questions, head: Any, **values: Any) -> tuple[QuestionFeed, FusionTuner, Any]:
    config = settings(batch_size=8, steps=6, **values)
    encoder = Encoder(backbone(), None)
    visual = fusion.visual_reader(encoder.backbone, levels=2, cells=2) if config.backbone == "trained" else None
    views = fusion.ViewsOf(encoder, config, visual)(questions)
    recipe = FusionTuner(head, views.sight, visual=visual, card=encoder.backbone.card)
    return QuestionFeed(questions, views, head), recipe.with_assets(recipe.learn_assets(config, questions)), config


def batches(feed: QuestionFeed, recipe: Any, config: Any, start: int = 0, here: Ranks = Ranks()) -> list[Any]:  # noqa: B008
    return list(feed.batches(recipe, config, start=start, here=here, pin=False))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_a_batch_does_not_depend_on_where_the_run_began(kind: str) -> None:
    feed, recipe, config = feed_of(which_colour(N), ClassHead(4), backbone=kind)
    whole = batches(feed, recipe, config)
    assert len(whole) == 6
    later = batches(*feed_of(which_colour(N), ClassHead(4), backbone=kind)[:2], config, start=4)
    assert len(later) == 2
    assert all(same(one, other) for one, other in zip(whole[4:], later))
    assert not same(whole[0], whole[1])


def test_every_epoch_is_all_questions_once_and_in_a_new_order() -> None:
    feed, recipe, config = feed_of(which_colour(N), ClassHead(4))
    seen = [feed._question(0, position) for position in range(3 * N)]
    epochs = [seen[i * N : (i + 1) * N] for i in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    drawn = torch.cat([batch["target"] for batch in batches(feed, recipe, config)])
    assert drawn.tolist() == [feed.data.targets[question] for question in seen[: 6 * 8]]


def test_ranks_share_a_batch_in_order() -> None:
    feed, recipe, config = feed_of(which_place(N), RegionHead())
    whole = batches(feed, recipe, config)
    parts = [batches(feed, recipe, config, here=Ranks(rank, 2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step]["target"] for part in parts]), batch["target"])
        assert torch.equal(torch.cat([part[step]["features_BVRF"] for part in parts]), batch["features_BVRF"])


def test_loader_processes_change_nothing() -> None:
    feed, recipe, config = feed_of(which_colour(N), ClassHead(4), backbone="trained")
    here = batches(feed, recipe, config)
    there = batches(feed, recipe, config.model_copy(update={"workers": 2}))
    assert len(here) == len(there)
    assert all(same(one, other) for one, other in zip(here, there))


def test_an_undecodable_image_is_one_line_also_from_a_loader_process() -> None:
    questions = which_colour(N)
    questions.views[0].images[3] = b"not an image"
    feed, recipe, config = feed_of(questions, ClassHead(4), backbone="trained", workers=1)
    with pytest.raises(UserError, match="train/3"):
        batches(feed, recipe, config)


def test_identity_changes_with_texts_targets_and_ids() -> None:
    head = AnswerHead(4)
    said = [feed_of(questions, head)[0].identity()[0] for questions in (soft_colour(N), soft_colour(N))]
    assert said[0] == said[1]
    assert said[0]["examples"] == N
    whole = soft_colour(N)
    other = Questions(whole.views, whole.texts, [{0: 1.0}] * N)
    assert feed_of(other, head)[0].identity()[0]["targets"] != said[0]["targets"]
    retold = Questions(whole.views, ("what?",) * N, whole.targets)
    assert feed_of(retold, head)[0].identity()[0]["texts"] != said[0]["texts"]


def test_targets_follow_their_questions() -> None:
    feed, recipe, config = feed_of(soft_colour(N), AnswerHead(4))
    order = [feed._question(0, position) for position in range(8)]
    first = batches(feed, recipe, config)[0]
    dense = np.zeros((8, 4))
    for row, question in enumerate(order):
        for answer, score in feed.data.targets[question].items():
            dense[row, answer] = score
    assert first["target"].numpy() == pytest.approx(dense)
