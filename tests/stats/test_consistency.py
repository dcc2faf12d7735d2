from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from vlbench.core.errors import UserError
from vlbench.stats.consistency import image_set, nlvr2_outcomes, sentence_group
from vlbench.stats.entailment import entailment_outcomes
from vlbench.stats.grounding import box_iou, grounding_outcomes
from vlbench.stats.grouped import by_group
from vlbench.stats.intervals import estimate


def values(outcomes) -> dict[str, float]:
    return {name: estimate(found).value for name, found in outcomes.items()}


# ------------------------------------------------------------------------------------------------------------- NLVR2


def oracle_consistency(lines: list[dict], predictions: dict[str, str]) -> tuple[Fraction, Fraction]:
    """Accuracy and consistency from the sentences themselves: a set of images has each of its sentences once."""
    sentences: dict[tuple[str, str], list[bool]] = {}
    for line in lines:
        split, number, _, _ = line["identifier"].split("-")
        right = predictions[line["identifier"]].lower() == line["label"].lower()
        sentences.setdefault((f"{split} {number}", line["sentence"]), []).append(right)
    judged = [right for rights in sentences.values() for right in rights]
    return Fraction(sum(judged), len(judged)), Fraction(sum(map(all, sentences.values())), len(sentences))


@pytest.fixture(scope="module")
def real_lines(real_data) -> list[dict]:
    file = real_data / "nlvr2" / "dev_head400.jsonl"
    if not file.is_file():
        pytest.skip(f"no real NLVR2 annotations at {file}")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("skill", [0.0, 0.5, 0.9, 1.0])
def test_consistency_of_real_annotations_equals_an_independent_computation(real_lines, skill):
    rng = np.random.default_rng(int(10 * skill))
    other = {"True": "False", "False": "True"}
    predictions = {
        line["identifier"]: line["label"] if rng.random() < skill else other[line["label"]] for line in real_lines
    }
    ids = [line["identifier"] for line in real_lines]
    right = [predictions[line["identifier"]] == line["label"] for line in real_lines]
    found = nlvr2_outcomes(ids, right)
    accuracy, consistency = oracle_consistency(real_lines, predictions)
    assert values(found) == {
        "accuracy": pytest.approx(float(accuracy)),
        "consistency": pytest.approx(float(consistency)),
    }
    order = rng.permutation(len(ids)).tolist()
    assert values(nlvr2_outcomes([ids[i] for i in order], [right[i] for i in order])) == values(found)


def test_both_sentences_of_a_real_set_are_judged_on_the_same_images(real_lines):
    """Why the set is the sampling unit: the two sentences share their pairs, and their pairs only."""
    images: dict[str, set[str]] = {}
    for line in real_lines:
        place = line["identifier"].rpartition("-")[0]
        assert images.setdefault(place, {line["left_url"], line["right_url"]}) == {line["left_url"], line["right_url"]}
    found = nlvr2_outcomes([line["identifier"] for line in real_lines], [True] * len(real_lines))
    groups, sets = set(found["consistency"].ids), set(found["consistency"].clusters)
    assert len(sets) < len(groups) < len(real_lines)
    assert {image_set(line["identifier"]) for line in real_lines} == sets


def test_consistency_worked_example():
    ids = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0", "dev-2-3-0", "test1-1-0-0"]
    found = nlvr2_outcomes(ids, [True, False, True, True, True, False])
    assert values(found) == {"accuracy": pytest.approx(4 / 6), "consistency": pytest.approx(2 / 4)}
    consistency = found["consistency"]
    assert dict(zip(consistency.ids, consistency.values.tolist())) == {
        "dev-1-0": 0.0,
        "dev-1-1": 1.0,
        "dev-2-0": 1.0,
        "test1-1-0": 0.0,
    }
    assert list(consistency.clusters) == ["dev-1", "dev-1", "dev-2", "test1-1"]
    assert list(found["accuracy"].clusters) == ["dev-1", "dev-1", "dev-1", "dev-2", "dev-2", "test1-1"]
    assert (estimate(consistency).n, estimate(consistency).n_clusters) == (4, 3)


def test_consistency_of_a_coin_is_below_its_accuracy():
    rng = np.random.default_rng(0)
    ids = [f"dev-{number}-{pair}-{sentence}" for number in range(400) for pair in range(4) for sentence in range(2)]
    found = values(nlvr2_outcomes(ids, (rng.random(len(ids)) < 0.5).tolist()))
    assert found["accuracy"] == pytest.approx(0.5, abs=0.03)
    assert found["consistency"] == pytest.approx(1 / 16, abs=0.03)


@pytest.mark.parametrize("identifier", ["", "dev", "dev-1-2", "dev-1-2-3-4", "dev--2-3", "dev-1-2-"])
def test_consistency_refuses_other_identifiers(identifier):
    for function in (sentence_group, image_set):
        with pytest.raises(UserError, match="expected SPLIT-SET-PAIR-SENTENCE"):
            function(identifier)


def test_consistency_refuses_what_it_cannot_count():
    with pytest.raises(UserError, match="'dev-1-0-0' occurs twice"):
        nlvr2_outcomes(["dev-1-0-0", "dev-1-0-0"], [True, False])
    with pytest.raises(UserError, match="without a single example"):
        nlvr2_outcomes([], [])


# ---------------------------------------------------------------------------------------- entailment, groups, grounding


def test_entailment_accuracy_is_by_true_class():
    found = entailment_outcomes(
        ["a", "b", "c", "d", "e"],
        predicted=[0, 0, 1, 0, 2],
        labels=[0, 1, 1, 0, 1],
        classes=("contradiction", "neutral", "entailment"),
        images=["i", "i", "j", "k", "k"],
    )
    assert values(found) == {
        "accuracy": pytest.approx(3 / 5),
        "accuracy/contradiction": 1.0,
        "accuracy/neutral": pytest.approx(1 / 3),
    }
    assert estimate(found["accuracy"]).n_clusters == 3
    assert list(found["accuracy/neutral"].ids) == ["b", "c", "e"]


def test_groups_divide_the_whole_and_keep_weights():
    from dataclasses import replace

    whole = entailment_outcomes(
        list("abcd"), predicted=[0, 1, 0, 1], labels=[0, 0, 0, 0], classes=("x",), images=list("iijk")
    )["accuracy"]
    found = by_group("m", replace(whole, weights=np.array([1.0, 2.0, 3.0, 4.0])), ["p", "q", "", "p"])
    assert sorted(found) == ["m", "m/p", "m/q"]
    assert found["m/p"].weights.tolist() == [1.0, 4.0]
    assert estimate(found["m/p"]).value == pytest.approx(0.2)


def oracle_iou(one, other) -> Fraction:
    """Counted in unit squares, since the boxes have whole corners."""
    squares = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in (one, other)]
    union = len(squares[0] | squares[1])
    return Fraction(len(squares[0] & squares[1]), union) if union else Fraction(0)


def test_box_iou_counts_unit_squares():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 9, (400, 2, 2, 2))
    boxes = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)
    expected = [float(oracle_iou(one, other)) for one, other in boxes.tolist()]
    assert np.allclose(box_iou(boxes[:, 0], boxes[:, 1]), expected, rtol=0, atol=1e-15)
    assert len({value for value in expected if 0 < value < 1}) > 20


def test_a_box_of_just_half_is_no_hit():
    target = [[0, 0, 10, 10]] * 4
    chosen = [[0, 0, 10, 5], [0, 0, 10, 5.001], [0, 0, 10, 10], [20, 20, 30, 30]]
    found = grounding_outcomes(
        list("abcd"), chosen, target, images=list("iijj"), splits=["val", "val", "testA", "testB"]
    )
    assert found["accuracy"].values.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert values(found) == {
        "accuracy": 0.5,
        "accuracy/val": 0.5,
        "accuracy/testA": 1.0,
        "accuracy/testB": 0.0,
    }


def test_empty_boxes_overlap_nothing():
    assert box_iou([[1, 1, 1, 1], [0, 0, 0, 9]], [[1, 1, 1, 1], [0, 0, 9, 9]]).tolist() == [0.0, 0.0]
