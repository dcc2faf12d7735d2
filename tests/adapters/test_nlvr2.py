"""NLVR2 end to end on a little world, and its numbers against the official definition on real annotations."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.adapters.fusion_worlds import Relabelled, Roles, learnt_by_heart, opened, predict, scores
from vlbench.adapters.nlvr2 import ADAPTER, Config, Side
from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.data.digests import image_digests
from vlbench.data.sources import open_source
from vlbench.stats.consistency import image_set


@pytest.fixture(scope="module")
def by_heart(root: Path) -> Rows:
    return predict("nlvr2", learnt_by_heart(root, "nlvr2"), steps=260, judge_every=130)


def test_a_little_training_set_is_learnt_by_heart(by_heart: Rows) -> None:
    found = scores("nlvr2", by_heart)
    assert found["accuracy"].value >= 0.95
    assert found["consistency"].value >= 0.95
    assert set(found) == set(by_heart.meta["chance"])


def test_rows_say_everything_that_the_numbers_are_made_of(by_heart: Rows) -> None:
    assert by_heart["right"].tolist() == (by_heart["pred"] == by_heart["label"]).tolist()
    assert set(by_heart["prediction"]) == {"True", "False"}
    assert all(left != right for left, right in zip(by_heart["image"], by_heart["right_image"]))
    assert ((by_heart["p"] >= 0.5) & (by_heart["p"] <= 1)).all(), "p is that of what is said"
    assert {"sentence", "image_id", "truth"} <= set(by_heart.columns)


def test_shuffled_labels_and_either_view_alone_teach_nothing_of_other_pairs(root: Path) -> None:
    data = Roles({"train": Relabelled(opened(root, "nlvr2", "train")), "test": opened(root, "nlvr2", "test")})
    rows = predict("nlvr2", data)
    found = scores("nlvr2", rows)["accuracy"]
    assert found.lo <= 0.5 <= found.hi, f"{found.value} [{found.lo}, {found.hi}]"
    assert rows.meta["chance"]["accuracy"] == pytest.approx(0.5, abs=0.02)


def test_held_out_pairs_share_no_set_with_those_that_are_learnt(root: Path) -> None:
    from vlbench.adapters.common.held_out import held_out_by_image

    source = opened(root, "nlvr2", "train")
    sides = [image_digests(Side(source, place)) for place in (0, 1)]
    sets = [image_set(name) for name in source.ids()]
    held_N = held_out_by_image(list(zip(*sides, strict=True)), 0.25, where="x", groups=sets)
    held, learnt = ({name for name, out in zip(sets, held_N) if out == wanted} for wanted in (True, False))
    assert held
    assert learnt
    assert not held & learnt


def test_sides_are_the_files_of_their_pair(root: Path) -> None:
    source = opened(root, "nlvr2", "train")
    left, right = (Side(source, place)[5] for place in (0, 1))
    assert left.image == source[5].image
    assert right.image == source[5].extra["right"]
    pair = source[5].extra["image_key"]
    assert (left.extra["image_key"], right.extra["image_key"]) == (f"{pair}-img0", f"{pair}-img1")
    assert image_digests(Side(source, 1))[5] != image_digests(Side(source, 0))[5]


def test_a_pair_without_its_right_image_is_refused(root: Path) -> None:
    class OneEyed:
        spec, split, provides, classes = "x:y", "test", frozenset({"pair"}), ("False", "True")

        def __len__(self):
            return 1

        def __getitem__(self, index):
            from dataclasses import replace

            example = opened(root, "nlvr2", "train")[0]
            return replace(example, extra={"identifier": example.id})

        def ids(self):
            return ["train-0-0-0"]

        def labels(self):
            return [1]

    with pytest.raises(UserError, match=r"x:y \(test\): train-\S+ has no right image"):
        Side(OneEyed(), 1)[0]


def official(lines: list[dict], predictions: dict[str, str]) -> tuple[float, float]:
    """Accuracy and consistency as NLVR2's README defines them: written from its text.

    Consistency is over unique sentences: all pairs of a sentence must be judged right. A sentence is its identifier
    without the number of the pair.
    """
    right, by_sentence = 0, defaultdict(list)
    for line in lines:
        split, number, _, sentence = line["identifier"].split("-")
        is_right = predictions[line["identifier"]].lower() == line["label"].lower()
        right += is_right
        by_sentence[split, number, sentence].append(is_right)
    consistent = [all(judged) for judged in by_sentence.values()]
    return right / len(lines), sum(consistent) / len(consistent)


@pytest.mark.parametrize("skill", [0.0, 0.5, 0.8, 0.97, 1.0])
def test_numbers_are_the_official_ones_on_real_annotations(real_data: Path, skill: float) -> None:
    file = real_data / "nlvr2" / "dev_head400.jsonl"
    if not file.is_file():
        pytest.skip(f"no real annotations at {file}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rng = np.random.default_rng(round(100 * skill))
    said = {}
    for line in lines:
        other = {"True": "False", "False": "True"}[line["label"]]
        said[line["identifier"]] = line["label"] if rng.random() < skill else other
    source = open_source(f"nlvr2:{file}")
    assert len(source) == len(lines) == 400
    labels = source.labels()
    pred = [source.classes.index(said[name]) for name in source.ids()]
    rows = Rows({"id": list(source.ids()), "right": np.array(pred) == np.array(labels)})
    found = ADAPTER.score(rows, Config())
    accuracy, consistency = official(lines, said)
    assert found["accuracy"].value == pytest.approx(accuracy, abs=1e-12)
    assert found["consistency"].value == pytest.approx(consistency, abs=1e-12)
    assert found["accuracy"].n == 400
    assert found["accuracy"].n_clusters == len({name.rsplit("-", 2)[0] for name in said})


def test_paper_settings_are_those_of_the_sheet() -> None:
    paper = Config(preset="paper")
    assert (paper.steps, paper.schedule.warmup, paper.batch_size) == (14_000, 1_400, 60)
    assert (paper.optim.lr, paper.max_words) == (3e-5, 128)
