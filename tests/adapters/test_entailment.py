"""Visual entailment end to end on a little world: it learns, by class, and never reads the premise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapters.fusion_worlds import BRIEF, Relabelled, Roles, learnt_by_heart, opened, predict, scores
from vlbench.adapters.entailment import ADAPTER, Config
from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.data.sources import Subset


@pytest.fixture(scope="module")
def by_heart(root: Path) -> Rows:
    return predict("entailment", learnt_by_heart(root, "entailment"))


def test_a_little_training_set_is_learnt_by_heart(by_heart: Rows) -> None:
    found = scores("entailment", by_heart)
    assert found["accuracy"].value >= 0.95
    assert set(found) == set(by_heart.meta["chance"])
    assert set(found) == {"accuracy", "accuracy/contradiction", "accuracy/neutral", "accuracy/entailment"}


def test_rows_say_everything_that_the_numbers_are_made_of(by_heart: Rows) -> None:
    assert by_heart["right"].tolist() == (by_heart["pred"] == by_heart["label"]).tolist()
    assert [by_heart.meta["classes"][label] for label in by_heart["label"]] == by_heart["truth"]
    assert all(by_heart["hypothesis"])
    assert scores("entailment", by_heart)["accuracy"].n_clusters == len(set(by_heart["image_id"]))


def test_shuffled_labels_teach_nothing_of_other_images(root: Path) -> None:
    train, test = opened(root, "entailment", "train"), opened(root, "entailment", "test")
    rows = predict("entailment", Roles({"train": Relabelled(train), "test": test}))
    found = scores("entailment", rows)["accuracy"]
    counts = np.bincount(rows["label"]) / len(rows)
    assert found.lo <= counts.max()
    assert found.hi >= counts.min()


def test_accuracy_by_class_worked_out_by_hand() -> None:
    columns = {
        "id": list("abcdef"),
        "image": ["i", "i", "j", "j", "k", "k"],
        "label": np.array([0, 0, 0, 1, 1, 2]),
        "pred": np.array([0, 1, 0, 1, 0, 0]),
    }
    rows = Rows(columns, {"classes": ["contradiction", "neutral", "entailment"]})
    found = {name: estimate.value for name, estimate in ADAPTER.score(rows, Config()).items()}
    assert found == {
        "accuracy": pytest.approx(0.5),
        "accuracy/contradiction": pytest.approx(2 / 3),
        "accuracy/neutral": pytest.approx(0.5),
        "accuracy/entailment": 0.0,
    }


class _Secret(dict[str, Any]):
    """An example's extra whose premise nobody may ask for."""

    def __getitem__(self, key: str) -> Any:
        assert key != "premise", "the premise was read"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        assert key != "premise", "the premise was read"
        return super().get(key, default)


def test_the_premise_is_never_read(root: Path) -> None:
    class Guarded(Subset):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            extra: Mapping[str, Any] = example.extra
            assert "premise" in extra
            return replace(example, extra=_Secret(extra))

    data = learnt_by_heart(root, "entailment")
    train = data.split("train")
    guarded = Guarded(train, range(len(train)), split="train")
    rows = predict("entailment", Roles(dict.fromkeys(("train", "val", "test"), guarded)), **BRIEF)
    assert len(rows) == len(train)


def test_splits_with_other_classes_are_refused(root: Path) -> None:
    data = learnt_by_heart(root, "entailment")
    other = opened(root, "entailment", "test")
    other.classes = ("no", "maybe", "yes")
    data.splits["test"] = other
    with pytest.raises(UserError, match="different classes"):
        predict("entailment", data)


def test_paper_settings_are_those_of_the_sheet() -> None:
    paper = Config(preset="paper")
    assert (paper.steps, paper.schedule.warmup, paper.batch_size) == (5_000, 500, 480)
    assert (paper.optim.lr, paper.max_words, paper.judge_every) == (8e-5, 60, 500)
