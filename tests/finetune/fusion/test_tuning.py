"""From questions to answers: heads fit a small set, learn what holds for other images, and no more than there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.finetune.fusion.quadrants import NAMES as COLOUR_NAMES
from tests.finetune.fusion.quadrants import (
    SIDE,
    backbone,
    colours_of,
    left_or_right,
    settings,
    soft_colour,
    source,
    which_colour,
    which_place,
)
from vlbench.adapters.common.fusion import FusionAnswers, ViewsOf, tune_and_answer
from vlbench.adapters.encoder import Encoder
from vlbench.core.errors import UserError
from vlbench.finetune.conduct import Conduct, conducted
from vlbench.finetune.fusion.heads import AnswerHead, ClassHead, RegionHead
from vlbench.finetune.fusion.questions import Questions
from vlbench.finetune.fusion.recipe import answers
from vlbench.store.features import FeatureStore

Maker = Callable[..., Questions]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))


def right(questions: Questions) -> Callable[[list[np.ndarray]], float]:
    def judge(logits: list[np.ndarray]) -> float:
        best = [max(t, key=t.__getitem__) if isinstance(t, dict) else t for t in questions.targets]
        return float(np.mean([int(row.argmax()) == target for row, target in zip(logits, best, strict=True)]))

    return judge


def tune(
    head: Any, train: Questions, held: Questions, *, store: FeatureStore | None = None, **values: Any
) -> FusionAnswers:
    return tune_and_answer(
        Encoder(backbone(), store, batch_size=16),
        head,
        train=train,
        held_out=held,
        asked={"train": train, "held": held},
        judge=right(held),
        config=settings(**values),
        data_key="test",
    )


CASES = [
    (ClassHead(4), which_colour, 1 / 4),
    (AnswerHead(4), soft_colour, 1 / 4),
    (RegionHead(), which_place, 1 / 4),
    (ClassHead(2), left_or_right, 1 / 2),
]
NAMES = ["class", "answer", "region", "pair"]


@pytest.mark.parametrize(("head", "make", "chance"), CASES, ids=NAMES)
def test_a_small_training_set_is_fitted(head: Any, make: Maker, chance: float) -> None:
    train = make(64)
    found = tune(head, train, make(32, seed=7), select="last", steps=300, judge_every=150, batch_size=16)
    assert right(train)(found.logits["train"]) >= 0.95
    assert found.chosen["step"] == 300
    assert [line["step"] for line in found.chosen["history"]] == [150, 300]


def test_what_is_learnt_holds_for_other_images_and_shuffled_targets_teach_nothing() -> None:
    train, held = which_place(256), which_place(200, seed=7)
    found = tune(RegionHead(), train, held)
    assert right(held)(found.logits["held"]) > 0.8
    assert right(held)(found.logits["held"]) == pytest.approx(found.chosen["held_out"])
    # Each quarter of the targets is moved on by another number of places, so that just a quarter is right: a plain
    # shuffle is right a little more or less often, and a model makes much of a little.
    targets = [(place + number) % 4 for number, place in enumerate(train.targets)]
    shuffled = Questions(train.views, train.texts, targets, regions=True)
    nothing = tune(RegionHead(), shuffled, held, select="last")
    # Four standard deviations of 1/4 of 200.
    assert right(held)(nothing.logits["held"]) == pytest.approx(0.25, abs=0.12)


def test_a_trained_backbone_learns_with_the_head_and_the_encoders_stays_as_it_is() -> None:
    eyes = backbone()
    before = {name: tensor.clone() for name, tensor in eyes.module.state_dict().items()}
    train, held = which_colour(64), which_colour(32, seed=7)
    found = tune_and_answer(
        Encoder(eyes, None, batch_size=16),
        ClassHead(4),
        train=train,
        held_out=held,
        asked={"held": held},
        judge=right(held),
        config=settings(backbone="trained", steps=40, judge_every=40),
        data_key="test",
    )
    assert len(found.logits["held"]) == 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in eyes.module.state_dict().items())


def asked_of(encoder: Encoder, **values: Any) -> tuple[FusionAnswers, Path]:
    """A short fine-tuning over this encoder, and its folder."""
    train, held = which_colour(32), which_colour(64, seed=7)
    with conducted(Conduct()) as conduct:
        found = tune_and_answer(
            encoder,
            ClassHead(4),
            train=train,
            held_out=held,
            asked={"held": held},
            judge=right(held),
            config=settings(steps=6, judge_every=3, **values),
            data_key="test",
        )
    return found, conduct.folders[0]


def test_a_trained_backbone_is_asked_in_the_precision_of_the_call_and_trained_in_its_own() -> None:
    found, folder = asked_of(Encoder(backbone(), None), backbone="trained")
    made = (folder / "tuned.json").stat().st_mtime_ns
    coarse, same = asked_of(Encoder(backbone(), None, precision="bf16"), backbone="trained")
    assert same == folder
    assert (same / "tuned.json").stat().st_mtime_ns == made, "nothing was trained again"
    assert coarse.chosen == found.chosen
    fine_NC, coarse_NC = (np.stack(each.logits["held"]) for each in (found, coarse))
    assert 0 < np.abs(fine_NC - coarse_NC).max() < 0.1
    assert (found.notes, coarse.notes) == ([], [])


def test_a_protocol_in_bf16_is_asked_in_it_and_says_so() -> None:
    note = "asked in bf16, as its protocol trains it: --precision changes nothing here"
    by_call = [
        asked_of(Encoder(backbone(), None, precision=precision), backbone="trained", precision="bf16")[0]
        for precision in ("fp32", "bf16")
    ]
    assert [found.notes for found in by_call] == [[note], [note]]
    assert np.array_equal(*(np.stack(found.logits["held"]) for found in by_call))


def test_frozen_features_are_of_the_precision_of_the_call_and_so_is_what_learns_from_them() -> None:
    found, folder = asked_of(Encoder(backbone(), None))
    coarse, other = asked_of(Encoder(backbone(), None, precision="bf16"))
    assert folder != other
    assert not np.array_equal(np.stack(found.logits["held"]), np.stack(coarse.logits["held"]))


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_models_of_equal_weights_share_a_folder_whatever_they_are_called(kind: str) -> None:
    found, folder = asked_of(Encoder(backbone(name="one"), None), backbone=kind)
    made = (folder / "tuned.json").stat().st_mtime_ns
    again, same = asked_of(Encoder(backbone(name="the other"), None), backbone=kind)
    assert same == folder
    assert (same / "tuned.json").stat().st_mtime_ns == made
    assert np.array_equal(np.stack(again.logits["held"]), np.stack(found.logits["held"]))
    assert folder.name.startswith("quadrants-fusion-")
    assert asked_of(Encoder(backbone(1, name="one"), None), backbone=kind)[1] != folder


@pytest.mark.parametrize("start", ["init", "bert"])
def test_a_wrong_start_is_said_before_an_image_is_encoded(start: str, tmp_path: Path) -> None:
    encoder = Encoder(backbone(), None)
    with pytest.raises(UserError, match="nowhere"):
        asked_of(encoder, **{start: str(tmp_path / "nowhere")})
    assert encoder.stats.images_encoded == 0


def test_answers_do_not_depend_on_the_size_of_the_batch() -> None:
    held = which_place(30, seed=7)
    found = {}
    for kind in ("frozen", "trained"):
        config = settings(backbone=kind, steps=2, judge_every=2)
        encoder = Encoder(backbone(), None)
        from vlbench.adapters.common.fusion import visual_reader
        from vlbench.finetune.fusion.recipe import FusionTuner

        visual = visual_reader(encoder.backbone, levels=2, cells=2) if kind == "trained" else None
        views = ViewsOf(encoder, config, visual)(held)
        recipe: Any = FusionTuner(RegionHead(), views.sight, visual=visual, card=encoder.backbone.card)
        recipe = recipe.with_assets(recipe.learn_assets(config, held))
        torch.manual_seed(0)
        net = recipe.build(config, ())
        by_size = [
            answers(net, held, views, config.model_copy(update={"batch_size": size}), device="cpu")
            for size in (1, 7, 64)
        ]
        for other in by_size[1:]:
            for one, two in zip(by_size[0], other, strict=True):
                assert one == pytest.approx(two, abs=1e-5)
        found[kind] = by_size[0]
    # The same weights but for the tower's place: frozen features and a trained tower's are the same at the start.
    for one, two in zip(found["frozen"], found["trained"], strict=True):
        assert one == pytest.approx(two, abs=1e-5)


def test_regions_that_are_not_read_cannot_be_chosen() -> None:
    held = which_place(6, seed=7)
    train = which_place(16)
    first = Questions(train.views, train.texts, [min(place, 2) for place in train.targets], regions=True)
    found = tune(RegionHead(), first, held, steps=2, judge_every=2, max_regions=3)
    assert all(len(row) == 4 for row in found.logits["held"])
    assert all(row[3] == -1e4 for row in found.logits["held"])
    with pytest.raises(UserError, match="means region 3, the first being 0; raise max_regions"):
        tune(RegionHead(), train, held, max_regions=3)


def test_fixed_region_features_are_read_by_the_images_key(tmp_path: Path) -> None:
    folder = tmp_path / "regions"
    folder.mkdir()
    train, held = which_colour(48), which_colour(24, seed=7)
    fit: dict[str, Any] = {"features": str(folder), "steps": 300, "judge_every": 300, "batch_size": 16}
    for questions in (train, held):
        view: Any = questions.views[0]
        view._ids = [f"{name.replace('/', '-')}-{id(questions)}" for name in view.ids()]
        for number, name in enumerate(view.ids()):
            regions = view[number].regions
            colours = [COLOUR_NAMES.index(region.category) for region in regions]
            np.savez(
                folder / f"{name}.npz",
                x=np.eye(4, 6, dtype=np.float32)[colours],
                bbox=np.array([region.box_xyxy for region in regions], dtype=np.float32),
                image_w=SIDE,
                image_h=SIDE,
            )
    found = tune(ClassHead(4), train, held, **fit, feature_width=5)
    assert right(train)(found.logits["train"]) >= 0.95
    with pytest.raises(UserError, match="set feature_width"):
        tune(ClassHead(4), train, held, **fit, feature_width=7)
    key = held.views[0].ids()[0]
    entry = folder / f"{key}.npz"
    whole = dict(np.load(entry))
    np.savez(entry, **(whole | {"image_w": 2 * SIDE}))
    with (
        pytest.raises(UserError, match=f"{key}: bad region features: of an image of 64 x 32 .* the image has 32 x 32"),
        conducted(Conduct(watch=lambda steps, batch: pytest.fail("trained before it was said"))),
    ):
        tune(ClassHead(4), train, held, **fit | {"steps": 299}, feature_width=5)
    entry.unlink()
    with pytest.raises(UserError, match="1 images have no features"):
        tune(ClassHead(4), train, held, **fit, feature_width=5)


def test_texts_that_are_too_long_are_counted() -> None:
    train, held = which_colour(16), which_colour(8, seed=7)
    long = Questions(held.views, tuple(text + " the red one" * 9 for text in held.texts), held.targets)
    found = tune_and_answer(
        Encoder(backbone(), None),
        ClassHead(4),
        train=train,
        held_out=held,
        asked={"test": long},
        judge=right(held),
        config=settings(steps=2, judge_every=2),
        data_key="test",
    )
    assert found.notes == ["8 of 8 test texts are longer than max_words=16: cut"]


def test_a_region_is_one_of_those_that_the_questions_come_with() -> None:
    bare = which_place(8)
    with pytest.raises(UserError, match="come without any"):
        tune(RegionHead(), Questions(bare.views, bare.texts, bare.targets), which_place(8, seed=1))


def test_without_questions_there_is_nothing_to_learn() -> None:
    with pytest.raises(UserError, match="no questions"):
        tune(ClassHead(4), Questions((source(colours_of(0, 0), 0),), (), ()), which_colour(4))
