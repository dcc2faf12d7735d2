"""Models that know nothing of an image, in every task on an image and a sentence; and what these tasks share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.adapters.fakes import FakeData, labelled
from tests.adapters.fusion_worlds import BRIEF, PART, Roles, baseline, eye, opened, predict, scores, world_roles
from vlbench.adapters.common.held_out import held_out_by_image
from vlbench.adapters.common.questions import Chosen
from vlbench.adapters.encoder import Encoder
from vlbench.adapters.linear import ADAPTER as LINEAR
from vlbench.core.catalog import ADAPTERS
from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.data.digests import content_digests
from vlbench.data.sources import Subset
from vlbench.models import wrap
from vlbench.models.backbone import backbone_fingerprint
from vlbench.models.load import load_backbone

TASKS = tuple(PART)


# ------------------------------------------------------------------------------------------------ the two models


def images(count: int = 5, side: int = 64) -> torch.Tensor:
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    return (pixels.float() / 255 - 0.5) / 0.5


def test_shuffled_features_are_an_image_s_own_whatever_stands_beside_it() -> None:
    model, batch = baseline("shuffled"), images()
    whole = model.encode_image(batch, dense=True)
    for place in range(len(batch)):
        alone = model.encode_image(batch[place : place + 1], dense=True)
        assert torch.equal(alone.pooled_BD[0], whole.pooled_BD[place])
        assert all(torch.equal(alone.maps[stride][0], whole.maps[stride][place]) for stride in whole.maps)
        assert torch.equal(model.encode_image(batch[place : place + 1]).pooled_BD[0], whole.pooled_BD[place])
    assert {stride: tuple(map_.shape[2:]) for stride, map_ in whole.maps.items()} == {
        stride: (64 // stride, 64 // stride) for stride in (4, 8, 16, 32)
    }


def test_shuffled_features_say_nothing_of_what_an_image_looks_like() -> None:
    model, batch = baseline("shuffled"), images(200)
    batch[100:] = batch[:100]
    batch[100:, 0, 0, 0] = -batch[100:, 0, 0, 0]  # one pixel of each is another
    pooled = model.encode_image(batch).pooled_BD.numpy()
    likeness = [np.corrcoef(pooled[place], pooled[place + 100])[0, 1] for place in range(100)]
    assert abs(np.mean(likeness)) < 5 / np.sqrt(64 * 100)
    assert abs(pooled.mean()) < 0.05
    assert abs(pooled.std() - 1) < 0.05


def test_shuffled_features_do_not_move_with_rounding() -> None:
    model, batch = baseline("shuffled"), images()
    there = model.encode_image(batch).pooled_BD
    assert torch.equal(model.encode_image(batch + 1e-4).pooled_BD, there), "another device's arithmetic"


def test_other_seeds_are_other_models() -> None:
    one, other = baseline("shuffled"), load_backbone("baseline:shuffled", weights="random:3")
    assert one.weights_hash != other.weights_hash
    assert other.card.id == "baseline:shuffled-random-s3"
    assert not torch.allclose(one.encode_image(images()).pooled_BD, other.encode_image(images()).pooled_BD)
    prints = {backbone_fingerprint(model) for model in (one, other, baseline("constant"))}
    assert len(prints) == 3


def test_constant_features_are_the_same_for_every_image_and_have_a_gradient() -> None:
    model = baseline("constant")
    found = model.encode_image(images(), dense=True)
    assert (found.pooled_BD == 1).all()
    assert all((map_ == 1).all() for map_ in found.maps.values())
    tower = model.module
    tower(images()).sum().backward()
    assert tower.scale.grad is not None


def test_baselines_are_named_and_refuse_weights(tmp_path: Path) -> None:
    assert (baseline("shuffled").card.id, baseline("constant").card.id) == ("baseline:shuffled", "baseline:constant")
    with pytest.raises(UserError, match=r"unknown baseline 'constnt'; did you mean 'constant'\?"):
        load_backbone("baseline:constnt")
    (tmp_path / "w.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="it has no weights to load; leave --weights out"):
        load_backbone("baseline:shuffled", weights=str(tmp_path / "w.pt"))


def test_constant_features_are_chance_for_a_linear_probe() -> None:
    class Constant:
        device = "cpu"

        def images(self, source):
            from vlbench.adapters.encoder import ImageFeatures
            from vlbench.core.fingerprint import digest

            digests = tuple(digest(image) for image in source.images)
            pooled = baseline("constant").encode_image(images(1)).pooled_BD.numpy().repeat(len(digests), axis=0)
            return ImageFeatures(tuple(source.ids()), digests, pooled, None)

    classes = ("ant", "bee", "cat", "dog")
    data = FakeData({name: labelled(name, np.arange(80) % 4, classes) for name in ("train", "val", "test")})
    found = LINEAR.score(LINEAR.predict(Constant(), data, LINEAR.Config()), LINEAR.Config())
    assert found["acc1"].lo <= 0.25 <= found["acc1"].hi, "ties are broken by a hash"


# --------------------------------------------------------------------------------------- in tasks that ask something


@pytest.mark.parametrize("task", TASKS)
def test_a_constant_answer_is_one_answer_and_scores_what_it_is_worth(task: str, root: Path) -> None:
    settings = {"min_count": 2} if task == "vqa" else {}
    rows = predict(task, world_roles(root, task), backbone=baseline("constant"), **settings)
    if task == "grounding":
        assert set(rows["chosen"].tolist()) == {0}
    else:
        assert len(set(rows["prediction"])) == 1
    found = scores(task, rows)
    assert set(found) == set(rows.meta["chance"])
    if task == "nlvr2":
        assert found["accuracy"].value == rows.meta["chance"]["accuracy"]
        assert found["consistency"].value == rows.meta["chance"]["consistency"]
    if task in ("vqa", "entailment"):
        assert found["accuracy"].value == pytest.approx(rows.meta["chance"]["accuracy"])
    assert rows.meta["chosen"] == {}, "nothing was tuned"
    assert ((rows["p"] > 0) & (rows["p"] <= 1)).all()


def yes_or_no(root: Path, split: str) -> Subset:
    """The questions of VQA that are answered by yes or no, of which the world has as many of either."""
    source = opened(root, "vqa", split)
    places = [index for index in range(len(source)) if source[index].extra["answer_type"] == "yes/no"]
    return Subset(source, places, split=split)


@pytest.mark.parametrize("task", TASKS)
def test_the_question_alone_does_not_beat_chance(task: str, root: Path) -> None:
    data = world_roles(root, task)
    settings = {}
    if task == "vqa":  # of all questions the kind alone says much: a colour, a number
        data, settings = Roles({name: yes_or_no(root, name) for name in ("train", "val", "test")}), {"min_count": 2}
    rows = predict(task, data, backbone=baseline("shuffled"), steps=100, judge_every=50, **settings)
    found, chance = scores(task, rows)["accuracy"], rows.meta["chance"]["accuracy"]
    slack = 0.05 if task == "grounding" else 0.0  # the sizes of the boxes are seen, and some phrases name one
    assert found.lo <= chance + slack, f"{found.value} [{found.lo}, {found.hi}] is above {chance}"


@pytest.mark.parametrize("task", TASKS)
def test_answers_do_not_depend_on_the_encoder_s_batches(task: str, root: Path) -> None:
    settings = {"min_count": 2} if task == "vqa" else {}
    one = predict(task, world_roles(root, task), encode_at=64, **BRIEF, **settings)
    other = predict(task, world_roles(root, task), encode_at=5, **BRIEF, **settings)
    assert one["id"] == other["id"]
    np.testing.assert_allclose(one["p"], other["p"], atol=1e-4)
    answer = "chosen" if task == "grounding" else "prediction"
    same = np.array([a == b for a, b in zip(one[answer], other[answer], strict=True)])
    assert same[one["p"] > one["p"].min() + 1e-3].mean() > 0.99


@pytest.mark.parametrize("task", TASKS)
def test_a_model_without_maps_is_refused_in_one_line(task: str, root: Path) -> None:
    flat = wrap(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8)), preprocess=32, name="flat")
    settings = {"min_count": 2} if task == "vqa" else {}
    with pytest.raises(UserError, match="no feature maps") as refused:
        predict(task, world_roles(root, task), backbone=flat, **BRIEF, **settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("task", ["entailment", "grounding"])
def test_a_trained_backbone_learns_too_and_leaves_the_one_that_was_given_as_it_was(task: str, root: Path) -> None:
    model = eye()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    encoder = Encoder(model, None, batch_size=32)
    adapter = ADAPTERS.get(task)
    config = adapter.Config(**{"preset": "tiny", **BRIEF, "backbone": "trained", "batch_size": 16})
    rows = adapter.predict(encoder, world_roles(root, task), config)
    assert len(rows) > 50
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_a_search_takes_the_rate_that_is_best_on_held_out_data(root: Path) -> None:
    rows = predict("entailment", world_roles(root, "entailment"), **BRIEF, search=(1e-6, 1.0))
    assert rows.meta["chosen"]["learning_rate"] == pytest.approx(4e-3)
    tried = sorted({point["learning_rate"] for point in rows.meta["chosen"]["history"]})
    assert tried == pytest.approx([4e-9, 4e-3])


# ------------------------------------------------------------------------------------------------ what they share


def test_rows_survive_the_store_and_are_scored_without_torch(root: Path, tmp_path: Path) -> None:
    from vlbench.store.examples import rows_from_parquet, rows_to_parquet

    expected = {}
    for task in TASKS:
        settings = {"min_count": 2} if task == "vqa" else {}
        rows = predict(task, world_roles(root, task), backbone=baseline("constant"), **settings)
        expected[task] = scores(task, rows)["accuracy"].value
        (tmp_path / task).write_bytes(rows_to_parquet(rows))
        kept = rows_from_parquet((tmp_path / task).read_bytes())
        assert isinstance(kept, Rows)
        assert scores(task, kept) == scores(task, rows)
    words = """
import json, pathlib, sys
from vlbench.core.catalog import ADAPTERS
from vlbench.store.examples import rows_from_parquet
found = {}
for path in pathlib.Path(sys.argv[1]).iterdir():
    adapter = ADAPTERS.get(path.name)
    found[path.name] = adapter.score(rows_from_parquet(path.read_bytes()), adapter.Config())["accuracy"].value
assert not {"torch", "torchvision", "timm"} & set(sys.modules)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", words, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(expected)


def test_held_out_images_are_a_share_by_content_and_never_on_both_sides() -> None:
    images_N1 = [(f"image {number // 3}",) for number in range(300)]
    held_N = held_out_by_image(images_N1, 0.2, where="x")
    assert held_N.sum() == 60
    held = {own for own, out in zip(images_N1, held_N) if out}
    assert not held & {own for own, out in zip(images_N1, held_N) if not out}
    order = np.random.default_rng(0).permutation(300).tolist()
    again = held_out_by_image([images_N1[place] for place in order], 0.2, where="x")
    assert {images_N1[place] for place, out in zip(order, again) if out} == held


def test_held_out_pairs_hang_together_by_images_and_by_group() -> None:
    pairs = [(f"i{number}", f"i{number + 1}") for number in range(0, 40, 2)] + [("i0", "i2"), ("i4", "i6")]
    held_N = held_out_by_image(pairs, 0.3, where="x")
    assert held_N[0] == held_N[1] == held_N[20]
    assert held_N[2] == held_N[3] == held_N[21]
    groups = ["a", "b"] * 11
    together = held_out_by_image(pairs[:20], 0.3, where="x", groups=groups[:20])
    assert len(set(together[::2].tolist())) == len(set(together[1::2].tolist())) == 1
    assert together.sum() == 10
    with pytest.raises(UserError, match="x: all training examples share images"):
        held_out_by_image([("a", "b"), ("b", "c")], 0.1, where="x")


@pytest.mark.parametrize("share", [1e-9, 0.999999])
def test_both_sides_have_an_image_whatever_the_share(share: float) -> None:
    held_N = held_out_by_image([(f"{number}",) for number in range(10)], share, where="x")
    assert 1 <= held_N.sum() <= 9


def test_chosen_entries_are_digested_without_reading_them_again(root: Path) -> None:
    source = opened(root, "vqa", "train")
    content_digests(source)
    places = [5, 5, 3]
    whole = content_digests(source)
    chosen = Chosen(source, places, split="train")
    source.__class__.__getitem__, before = None, source.__class__.__getitem__  # type: ignore[assignment, method-assign]
    try:
        found = content_digests(chosen)
    finally:
        source.__class__.__getitem__ = before  # type: ignore[method-assign]
    assert found.images == tuple(whole.images[place] for place in places)
    assert found.examples == tuple(whole.examples[place] for place in places)


def test_a_group_larger_than_the_share_is_learnt_from() -> None:
    """Pairs that hang together by their images: one group of ninety beside five of one."""
    chain = [(f"a{number}", f"a{number + 1}") for number in range(90)]
    single = [(f"b{number}", f"c{number}") for number in range(5)]
    for seed in range(6):
        pairs = [chain[place] if place < 90 else single[place - 90] for place in range(95)]
        renamed = [tuple(f"{seed}{name}" for name in pair) for pair in pairs]
        held_N = held_out_by_image(renamed, 0.1, where="x")
        assert 1 <= held_N.sum() <= 5
        assert not held_N[:90].any()
