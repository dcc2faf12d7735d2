"""VQA end to end on a little world: it learns, it says where a number comes from, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.adapters.fusion_worlds import BRIEF, Relabelled, Roles, learnt_by_heart, opened, predict, scores
from vlbench.adapters.vqa import ADAPTER, Config
from vlbench.core.errors import UserError
from vlbench.core.types import Rows
from vlbench.models.weights import read_weights
from vlbench.stats.vqa import MIN_COUNT, accuracy, answer_vocabulary, normalise


@pytest.fixture(scope="module")
def by_heart(root: Path) -> Rows:
    return predict("vqa", learnt_by_heart(root, "vqa"), min_count=1, steps=320, judge_every=160)


def test_a_little_training_set_is_learnt_by_heart(by_heart: Rows) -> None:
    assert scores("vqa", by_heart)["accuracy"].value >= 0.95


def test_rows_say_everything_that_the_numbers_are_made_of(by_heart: Rows) -> None:
    for place in range(len(by_heart)):
        expected = accuracy(by_heart["prediction"][place], list(by_heart["answers"][place]))
        assert by_heart["accuracy"][place] == expected
    assert len(set(by_heart["id"])) == len(by_heart) == 120
    assert all(question.endswith("?") for question in by_heart["question"])
    assert {"image", "image_id", "p", "question_type", "answer_type"} <= set(by_heart.columns)
    assert set(scores("vqa", by_heart)) == set(by_heart.meta["chance"]), "chance of every metric is known"
    assert json.loads(json.dumps(dict(by_heart.meta))) == dict(by_heart.meta)


def test_numbers_are_given_by_answer_type_and_by_question_type(by_heart: Rows) -> None:
    found = scores("vqa", by_heart)
    for column, prefix in (("answer_type", "accuracy/"), ("question_type", "accuracy/question/")):
        kinds = np.array(by_heart[column])
        for kind in set(by_heart[column]):
            own = np.asarray(by_heart["accuracy"])[kinds == kind]
            assert found[prefix + kind].value == pytest.approx(own.mean()), kind
            assert found[prefix + kind].n == len(own)
    assert {"accuracy/yes/no", "accuracy/number", "accuracy/other"} <= set(found)
    assert found["accuracy"].n_clusters == len(set(by_heart["image"])) == 40, "questions about one image hang together"


def test_the_vocabulary_is_counted_from_training_answers_and_kept_with_the_model(
    root: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path))
    data = learnt_by_heart(root, "vqa")
    leading = [normalise(data.split("train")[index].extra["multiple_choice_answer"]) for index in range(120)]
    frequent = {answer for answer in leading if leading.count(answer) >= MIN_COUNT}
    rows = predict("vqa", data, **BRIEF)
    assert set(rows.meta["vocabulary"]) == frequent
    assert tuple(rows.meta["vocabulary"]) == answer_vocabulary(leading)
    assert set(rows["prediction"]) <= frequent
    (file,) = tmp_path.glob("finetune/*/assets.safetensors")
    kept = [bytes(tensor.tolist()).decode() for name, tensor in read_weights(str(file)).items() if "answers" in name]
    assert kept == ["\n".join(rows.meta["vocabulary"])]


def test_shuffled_answers_teach_nothing_of_other_images(root: Path) -> None:
    data = Roles({"train": Relabelled(opened(root, "vqa", "train")), "test": opened(root, "vqa", "test")})
    rows = predict("vqa", data, min_count=2)
    found, chance = scores("vqa", rows)["accuracy"], rows.meta["chance"]["accuracy"]
    assert found.lo <= chance, f"{found.value} [{found.lo}, {found.hi}] is above {chance}"
    assert any("chosen on" in note for note in rows.meta["notes"]), "without val, training images choose"


def test_chance_is_the_leading_answer_of_the_training_data(root: Path) -> None:
    data = Roles({name: opened(root, "vqa", name) for name in ("train", "val", "test")})
    rows = predict("vqa", data, min_count=2, **BRIEF)
    test = data.split("test")
    answers = [list(test[index].extra["answers"]) for index in range(len(test))]
    train = data.split("train")
    points: dict[str, float] = dict.fromkeys(rows.meta["vocabulary"], 0.0)
    for index in range(len(train)):
        given = [normalise(answer) for answer in train[index].extra["answers"]]
        for answer in set(given) & points.keys():
            points[answer] += min(1.0, 0.3 * given.count(answer))
    constant = max(points, key=points.__getitem__)
    assert rows.meta["chance"]["accuracy"] == pytest.approx(np.mean([accuracy(constant, given) for given in answers]))


def test_outcomes_are_made_of_rows_alone() -> None:
    rows = Rows(
        {
            "id": ["1", "2", "3"],
            "image": ["i", "i", "j"],
            "question_type": ["is the", "how many", "how many"],
            "answer_type": ["yes/no", "number", "number"],
            "accuracy": np.array([1.0, 0.3, 0.9]),
        }
    )
    found = ADAPTER.score(rows, Config())
    assert {name: round(estimate.value, 6) for name, estimate in found.items()} == {
        "accuracy": round(2.2 / 3, 6),
        "accuracy/yes/no": 1.0,
        "accuracy/number": 0.6,
        "accuracy/question/is the": 1.0,
        "accuracy/question/how many": 0.6,
    }


def test_questions_without_answers_are_refused_with_their_id(root: Path) -> None:
    class Bare:
        def __init__(self, source):
            self.source, self.spec, self.split, self.provides = source, source.spec, "test", source.provides
            self.classes = None

        def __len__(self):
            return 3

        def __getitem__(self, index):
            from dataclasses import replace

            example = self.source[index]
            return replace(example, extra={k: v for k, v in example.extra.items() if k != "answers"})

        def ids(self):
            return self.source.ids()[:3]

        def labels(self):
            return None

    data = learnt_by_heart(root, "vqa")
    data.splits["test"] = Bare(data.split("train"))
    with pytest.raises(UserError, match=r"\(test\): question \d+ has no answers; put its annotations beside"):
        predict("vqa", data, min_count=1)


def test_a_vocabulary_without_an_answer_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="no answer leads 5000 questions or more of these 120; lower min_count"):
        predict("vqa", learnt_by_heart(root, "vqa"), min_count=5000)


def test_paper_settings_are_those_of_the_sheet() -> None:
    paper = Config(preset="paper")
    assert (paper.steps, paper.schedule.warmup, paper.batch_size) == (28_000, 2_800, 480)
    assert (paper.optim.lr, paper.max_words, paper.pooler, paper.min_count) == (5e-5, 30, "last_word", 9)
