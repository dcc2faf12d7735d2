"""The detection adapter: who is learnt from, who chooses, what is reported, and what does not find anything."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.finetune.detection.scenes import Scenes, backbone, small
from vlbench.adapters import detection
from vlbench.adapters.detection import ADAPTER
from vlbench.adapters.encoder import Encoder
from vlbench.core.cards import task_cards
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.finetune.detection.config import DetectionConfig
from vlbench.models.load import load_backbone


class Data:
    """A ``TaskData`` of pictures in memory."""

    spec = "scenes"

    def __init__(self, **splits: Scenes) -> None:
        self.splits = splits

    def has(self, role: str) -> bool:
        return role in self.splits

    def split(self, role: str) -> Scenes:
        return self.splits[role]

    def fingerprint(self, roles: tuple[str, ...]) -> str:
        return fingerprint({role: [str(e.image) for e in self.splits[role].examples] for role in roles})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path))


def encoder() -> Encoder:
    return Encoder(backbone(), None)


def watched(monkeypatch) -> list[tuple[str, tuple[str, ...]]]:
    """What is trained on and looked at, in order."""
    from vlbench.finetune.detection import feed, recipe

    calls = []
    fed, detect_all = feed.DetectionFeed.__init__, recipe.detect_all

    def init(self, source, config):
        calls.append(("learn", tuple(source.ids())))
        fed(self, source, config)

    def look(model, source, config, **where):
        calls.append(("look", tuple(source.ids())))
        return detect_all(model, source, config, **where)

    monkeypatch.setattr(feed.DetectionFeed, "__init__", init)
    monkeypatch.setattr(recipe, "detect_all", look)
    return calls


def test_the_step_is_chosen_on_training_images_that_are_not_learnt_from(monkeypatch) -> None:
    train, test = Scenes(10), Scenes(4, seed=5, split="test")
    calls = watched(monkeypatch)
    rows = ADAPTER.predict(encoder(), Data(train=train, test=test), small(steps=4, held_out=0.2))
    (_, learnt), *looks = calls
    held = looks[0][1]
    assert len(held) == 2
    assert sorted(learnt + held) == sorted(train.ids())
    assert [images for _, images in looks] == [held, held, tuple(test.ids())]
    assert [line["step"] for line in rows.meta["chosen"]["history"]] == [2, 4]
    assert rows.meta["notes"][0] == "chosen on 2 of 10 training images"
    assert len(rows) == 4
    assert list(rows["id"]) == list(test.ids())
    scores = ADAPTER.score(rows, small())
    assert {"mask_ap", "box_ap", "mask_ap50", "box_ap75", "mask_ap_small"} <= scores.keys()
    assert scores["mask_ap"].n_clusters == 4
    again = ADAPTER.predict(encoder(), Data(train=train, test=test), small(steps=4, held_out=0.2))
    assert [kind for kind, _ in calls].count("learn") == 2  # the finished folder is read: nothing is judged again
    assert calls[-1][0] == "look"
    assert calls[-2][0] == "learn"
    assert all(np.array_equal(a, b) for a, b in zip(rows["scores"], again["scores"]))


def test_val_chooses_where_it_is_not_reported(monkeypatch) -> None:
    data = Data(train=Scenes(6), val=Scenes(3, seed=3, split="val"), test=Scenes(3, seed=5, split="test"))
    calls = watched(monkeypatch)
    ADAPTER.predict(encoder(), data, small(steps=2))
    assert [(kind, images[0][:4]) for kind, images in calls] == [("learn", "trai"), ("look", "val0"), ("look", "test")]
    assert len(calls[0][1]) == 6


def test_published_schedules_learn_from_all_and_take_their_last_weights(monkeypatch) -> None:
    calls = watched(monkeypatch)
    rows = ADAPTER.predict(
        encoder(), Data(train=Scenes(6), test=Scenes(3, seed=5, split="test")), small(steps=2, select="last")
    )
    assert [kind for kind, _ in calls] == ["learn", "look"]
    assert len(calls[0][1]) == 6
    assert rows.meta["chosen"] == {"learning_rate": 2e-3, "step": 2}


def test_what_is_reported_is_looked_at_in_the_precision_of_the_call(monkeypatch) -> None:
    from vlbench.finetune.detection import recipe

    looked, detect_all = [], recipe.detect_all

    def look(model, source, config, **where):
        looked.append((source.split, config.precision))
        return detect_all(model, source, config, **where)

    monkeypatch.setattr(recipe, "detect_all", look)
    data = Data(train=Scenes(6), val=Scenes(3, seed=3, split="val"), test=Scenes(3, seed=5, split="test"))
    settings = small(steps=2, score_threshold=0.0)
    fine = ADAPTER.predict(encoder(), data, settings)
    assert looked == [("val", "fp32"), ("test", "fp32")]
    coarse = ADAPTER.predict(Encoder(backbone(), None, precision="bf16"), data, settings)
    assert looked[2:] == [("test", "bf16")], "the model is the same, and is not trained or judged again"
    assert any(not np.array_equal(a, b) for a, b in zip(fine["scores"], coarse["scores"]))
    own = ADAPTER.predict(encoder(), data, small(steps=2, precision="bf16"))
    assert looked[3:] == [("val", "bf16"), ("test", "bf16")]
    note = "asked in bf16, as its protocol trains it: --precision changes nothing here"
    assert [note in rows.meta["notes"] for rows in (fine, coarse, own)] == [False, False, True]


def test_nothing_found_is_no_precision_and_the_constant_model_finds_nothing() -> None:
    card = SimpleNamespace(loader="baseline", arch="constant", id="baseline:constant")
    blind = SimpleNamespace(backbone=SimpleNamespace(card=card))
    rows = ADAPTER.predict(blind, Data(train=Scenes(6), test=Scenes(5, seed=5, split="test")), small())
    scores = ADAPTER.score(rows, small())
    assert scores["mask_ap"].value == scores["box_ap"].value == 0


def test_a_backbone_without_maps_says_so() -> None:
    from torch import nn

    from vlbench.models import wrap

    flat = wrap(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)), preprocess=16, name="flat")
    data = Data(train=Scenes(6), test=Scenes(3, seed=5, split="test"))
    with pytest.raises(UserError, match="has no feature maps; take a convolutional network"):
        ADAPTER.predict(Encoder(flat, None), data, small())


def test_cards_are_read_and_the_adapter_loads_without_torch() -> None:
    cards = {name: card for name, card in task_cards().items() if card.kind == "detection"}
    assert {"detection/coco2017", "detection/coco2017_1x", "detection/coco2017_2x", "detection/shapes"} <= cards.keys()
    for card in cards.values():
        DetectionConfig(**card.protocol)
        assert card.metric == "mask_ap"
    code = "import sys, vlbench.adapters.detection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert detection.Detection.trains


@pytest.mark.parametrize("where", ["test", "val"])
@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (("disc", "square"), "'scenes': class 0 is 'square' in train and 'disc' in {}; give both files one list of"),
        (("square",), "'scenes': class 1 is 'disc' in train and absent in {}; give"),
        (("square", "disc", "cross"), "'scenes': class 2 is absent in train and 'cross' in {}; give"),
    ],
)
def test_splits_that_number_their_classes_differently_are_refused_before_training(
    monkeypatch, where, classes, line
) -> None:
    splits = {"train": Scenes(3), "val": Scenes(2, split="val"), "test": Scenes(2, split="test")}
    splits[where].classes = classes
    calls = watched(monkeypatch)
    with pytest.raises(UserError, match=line.format(where)):
        ADAPTER.predict(encoder(), Data(**splits), small(steps=2))
    assert not calls


@pytest.mark.parametrize("where", ["test", "val"])
def test_judged_images_of_another_size_are_refused_before_training(monkeypatch, where) -> None:
    splits = {"train": Scenes(3), "val": Scenes(2, split="val"), "test": Scenes(2, split="test")}
    splits[where].examples[1].extra["height"] = 80
    calls = watched(monkeypatch)
    with pytest.raises(UserError, match=rf"{where}1: the image has 96 x 96 pixels .* annotations say 80 x 96"):
        ADAPTER.predict(encoder(), Data(**splits), small(steps=2))
    assert not calls


def test_a_blind_model_that_is_tuned_finds_next_to_nothing() -> None:
    data = Data(train=Scenes(6), test=Scenes(6, seed=5, split="test"))
    blind = Encoder(load_backbone("baseline:shuffled"), None)
    rows = ADAPTER.predict(blind, data, small(steps=12, select="last"))
    assert ADAPTER.score(rows, small())["mask_ap"].value < 0.05
