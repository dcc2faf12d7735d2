"""Referring expressions end to end on a little world, and against boxes made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.adapters.fusion_worlds import (
    BRIEF,
    Relabelled,
    Roles,
    learnt_by_heart,
    opened,
    predict,
    scores,
    world_roles,
)
from vlbench.adapters.grounding import ADAPTER, Config
from vlbench.core.cards import task_cards
from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.data.regions.features import RegionFeatures
from vlbench.data.regions.npz import read_npz, write_npz


@pytest.fixture(scope="module")
def whole(root: Path) -> Rows:
    return predict("grounding", world_roles(root, "grounding"))


def test_a_little_training_set_is_learnt_by_heart(root: Path) -> None:
    rows = predict("grounding", learnt_by_heart(root, "grounding"))
    assert scores("grounding", rows)["accuracy"].value >= 0.95


def test_all_three_splits_are_reported_and_none_of_them_chooses(whole: Rows, root: Path) -> None:
    found = scores("grounding", whole)
    assert set(found) == {"accuracy", "accuracy/val", "accuracy/testA", "accuracy/testB"} == set(whole.meta["chance"])
    for name in ("val", "testA", "testB"):
        source = opened(root, "grounding", name)
        phrases = sum(len(source[index].texts["en"]) for index in range(len(source)))
        assert found[f"accuracy/{name}"].n == phrases
    assert found["accuracy"].n == len(whole)
    assert any("chosen on" in note and "of the images" in note for note in whole.meta["notes"])
    assert len(set(whole["id"])) == len(whole), "a row is a phrase, not a reference"


def test_the_size_of_every_split_is_said(whole: Rows, root: Path) -> None:
    said = []
    for name in ("val", "testA", "testB"):
        source = opened(root, "grounding", name)
        phrases = sum(len(source[index].texts["en"]) for index in range(len(source)))
        said.append(f"{len(source):,} references with {phrases:,} phrases of {name}")
    assert whole.meta["notes"][0] == "asked " + ", ".join(said)
    for name in ("grounding/refcoco_plus", "grounding/shapes"):
        assert {"train", "test", "testA", "testB"} == task_cards()[name].expected_sizes.keys()


def test_rows_say_everything_that_the_numbers_are_made_of(whole: Rows, root: Path) -> None:
    source = opened(root, "grounding", "val")
    by_id = {source[index].id: source[index] for index in range(len(source))}
    for place in np.flatnonzero(np.array(whole["split"]) == "val").tolist():
        example = by_id[whole["reference"][place]]
        boxes = [region.box_xyxy for region in example.regions]
        assert tuple(whole["box"][place]) == boxes[whole["chosen"][place]]
        assert tuple(whole["target"][place]) == boxes[example.extra["target"]]
        assert whole["candidates"][place] == len(boxes)
        assert whole["phrase"][place] in example.texts["en"]
        if whole["chosen"][place] == example.extra["target"]:
            assert whole["right"][place]
    assert ((whole["p"] > 0) & (whole["p"] <= 1)).all()


def test_chance_is_a_box_drawn_at_random(whole: Rows) -> None:
    val = np.array(whole["split"]) == "val"
    apart = 1 / whole["candidates"][val]  # the world's objects overlap by less than half
    assert whole.meta["chance"]["accuracy/val"] == pytest.approx(apart.mean())


def test_shuffled_targets_teach_nothing_of_other_images(root: Path) -> None:
    data = world_roles(root, "grounding")
    data.splits["train"] = Relabelled(data.split("train"))
    rows = predict("grounding", data)
    found, chance = scores("grounding", rows)["accuracy"], rows.meta["chance"]["accuracy"]
    assert found.lo <= chance + 0.02, f"{found.value} [{found.lo}, {found.hi}] at chance {chance}"


def test_accuracy_of_boxes_made_by_hand() -> None:
    target = (0.0, 0.0, 10.0, 10.0)
    boxes = {
        "the same": (target, True),
        "just half": ((0.0, 0.0, 10.0, 5.0), False),  # IoU 0.5 is not more than 0.5
        "a hair more": ((0.0, 0.0, 10.0, 5.001), True),
        "twice as big": ((0.0, 0.0, 10.0, 20.0), False),
        "shifted by a third": ((10 / 3, 0.0, 40 / 3, 10.0), False),  # 6.67 of 13.33: a half
        "shifted by a quarter": ((2.5, 0.0, 12.5, 10.0), True),  # 7.5 of 12.5: 0.6
        "beside it": ((10.0, 0.0, 20.0, 10.0), False),
        "empty": ((5.0, 5.0, 5.0, 5.0), False),
    }
    columns = {
        "id": list(boxes),
        "image": ["i", "i", "j", "j", "k", "k", "l", "l"],
        "split": ["val"] * 4 + ["testA"] * 4,
        "box": np.array([box for box, _ in boxes.values()]),
        "target": np.array([target] * len(boxes)),
    }
    outcomes = ADAPTER.outcomes(Rows(columns), Config())
    assert outcomes["accuracy"].values.tolist() == [float(right) for _, right in boxes.values()]
    found = ADAPTER.score(Rows(columns), Config())
    assert (found["accuracy/val"].value, found["accuracy/testA"].value) == (0.5, 0.25)
    assert found["accuracy"].value == 0.375
    assert found["accuracy"].n_clusters == 4


def _detected(folder: Path, sources: list, *, spoil: frozenset[str] = frozenset()) -> None:
    """Region features as a detector's: boxes a bit off, in another order, and one of the whole image.

    A feature says which object it is of. Of images in ``spoil`` there is the whole image alone.
    """
    rng = np.random.default_rng(0)
    for source in sources:
        for index in range(len(source)):
            example = source[index]
            boxes = np.array([region.box_xyxy for region in example.regions])[::-1] + rng.uniform(-0.5, 0.5, (1, 4))
            boxes = np.clip(np.concatenate([boxes, [[0.0, 0.0, 32.0, 32.0]]]), 0, 32)
            names = [region.category for region in example.regions][::-1]
            x = np.zeros((len(boxes), 64), dtype=np.float32)
            for row, name in enumerate(names):
                x[row, sum(map(ord, name)) % 60] = 3.0
            if example.extra["image_key"] in spoil:
                boxes, x = boxes[-1:], x[-1:]
            found = RegionFeatures(x, boxes.astype(np.float32), (), None, 32, 32)
            write_npz(folder / f"{example.extra['image_key']}.npz", found)


def test_with_region_features_the_detector_s_boxes_are_the_candidates(root: Path, tmp_path: Path) -> None:
    data = world_roles(root, "grounding")
    spoilt = frozenset({data.split("train")[0].extra["image_key"], data.split("test")[0].extra["image_key"]})
    _detected(tmp_path, list(data.splits.values()), spoil=spoilt)
    rows = predict("grounding", data, features=str(tmp_path), feature_width=64)
    found = scores("grounding", rows)
    assert found["accuracy/val"].value > rows.meta["chance"]["accuracy/val"] + 0.1
    gone = np.array([name in spoilt for name in rows["image_id"]])
    assert gone.any()
    assert not rows["right"][gone].any(), "no box covers the object: wrong, whatever is said"
    assert rows["right"][~gone].tolist() == (rows["iou"][~gone] > 0.5).tolist()
    assert any("are not learnt from: no box covers their object" in note for note in rows.meta["notes"])


def test_images_without_region_features_are_refused(root: Path, tmp_path: Path) -> None:
    data = world_roles(root, "grounding")
    _detected(tmp_path, [data.split("train")])
    with pytest.raises(UserError, match=r"\(val\): \d+: image '\d+' has no region features"):
        predict("grounding", data, features=str(tmp_path), feature_width=64)


def test_region_features_of_images_of_another_size_are_refused(root: Path, tmp_path: Path) -> None:
    data = world_roles(root, "grounding")
    _detected(tmp_path, list(data.splits.values()))
    key = data.split("testB")[0].extra["image_key"]
    found = read_npz(tmp_path / f"{key}.npz")
    write_npz(tmp_path / f"{key}.npz", replace(found, width=64, height=48))
    with pytest.raises(UserError) as error:
        predict("grounding", data, features=str(tmp_path), feature_width=64)
    assert str(error.value) == (
        f"{tmp_path} {key}: bad region features: of an image of 64 x 48 pixels (width x height), and the image has "
        "32 x 32; take features of these very images"
    )


def test_boxes_beyond_those_that_are_read_are_never_chosen(root: Path) -> None:
    rows = predict("grounding", world_roles(root, "grounding"), max_regions=2, **BRIEF)
    assert set(rows["chosen"].tolist()) <= {0, 1}
    assert (rows["candidates"] > 2).any()
    assert any("are not learnt from" in note for note in rows.meta["notes"])


def test_a_user_s_own_data_with_a_test_split_report_it_and_choose_on_val(root: Path) -> None:
    names = {"train": "train", "val": "testA", "test": "testB"}
    rows = predict("grounding", Roles({role: opened(root, "grounding", name) for role, name in names.items()}), **BRIEF)
    assert set(scores("grounding", rows)) == {"accuracy", "accuracy/testB"}
    assert not any("chosen on" in note for note in rows.meta["notes"])


def test_paper_settings_are_those_of_the_sheet() -> None:
    paper = Config(preset="paper")
    assert (paper.steps, paper.schedule.warmup, paper.batch_size) == (20_000, 2_000, 256)
    assert (paper.optim.lr, paper.optim.clip_norm, paper.max_regions) == (2e-4, 2.0, 100)
