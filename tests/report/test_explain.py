from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.report.toy import N, Toy
from vlbench.core.types import Result
from vlbench.report.explain import Evidence, Explanation, explain, explanation_blocks, facts, why_not_comparable
from vlbench.report.page import markdown
from vlbench.stats.paired import compare_outcomes

META = {"classes": ["cat", "dog"], "templates": 5, "chance": {"acc1": 0.5}, "fit": {"iterations": 9}, "notes": []}


def side(toy: Toy, result: Result, meta: dict[str, Any] | None = None) -> Evidence:
    return Evidence(result, META if meta is None else meta, toy.outcomes_of(result))


def pair(task: str = "linear/x", *, a: dict[str, Any] | None = None, b: dict[str, Any] | None = None):
    toy = Toy()
    left = toy.add("a", task, right=300, **(a or {}))
    right = toy.add("b", task, **({"right": 240} | (b or {})))
    return side(toy, left), side(toy, right)


def differing(found: Explanation) -> dict[str, tuple[str, str]]:
    return {d.fact: (d.a, d.b) for d in found.everywhere}


def test_only_what_differs_is_listed_as_a_difference() -> None:
    found = explain([pair(a={"config": {"c": 1.0, "k": 20}}, b={"config": {"c": 2.0, "k": 20}})])
    assert differing(found) == {
        "model: weights": ("wa", "wb"),
        "model: backbone (weights, feature, preprocessing)": ("ba", "bb"),
        "model: asked for as": ("a", "b"),
        "setting: c": ("1", "2"),
    }
    assert found.same["setting"] == {"k": "20"}
    assert found.same["data"]["templates"] == "5"
    assert found.obstacles == ()


@pytest.mark.parametrize(
    ("changes", "fact", "value"),
    [
        ({"model": {"recipe": "unicl"}}, "model: recipe", "unicl"),
        ({"model": {"pretrain_data": None}}, "model: pretraining data", "not disclosed"),
        ({"model": {"pretrain_data": ()}}, "model: pretraining data", "none"),
        ({"model": {"random": True}}, "model: random weights", "yes"),
        ({"model": {"seed": 0}}, "model: seed", "0"),
        ({"task_fingerprint": "u"}, "task: card", "u"),
        ({"settings": {"precision": "bf16", "device": "cpu"}}, "run: precision", "bf16"),
        ({"settings": {"precision": "fp32", "device": "cpu", "batch_size": 8}}, "run: batch_size", "8"),
        ({"chosen": {"C": 0.5}}, "chosen: C", "0.5"),
        ({"versions": {"torch": "2.11"}}, "version: torch", "2.11"),
        ({"commit": "abc"}, "version: commit", "abc"),
        ({"config": {"c": 1.0, "a": {"b": None}}}, "setting: a.b", "–"),
    ],
)
def test_every_kind_of_setting_is_set_beside_the_other(changes: dict[str, Any], fact: str, value: str) -> None:
    found = differing(explain([pair(b=changes)]))
    if value == "–":
        assert fact not in found  # None and absent say the same
    else:
        assert found[fact][1] == value


def test_findings_are_no_settings() -> None:
    """How good a fit was on held-out data, or what bf16 changed, explains no number."""
    found = explain(
        [
            pair(
                a={"settings": {"precision": "fp32", "device": "cpu", "processes": 2}, "chosen": {"val_accuracy": 0.5}},
                b={
                    "settings": {"precision": "fp32", "device": "cpu", "bf16_difference": {"difference": 0.1}},
                    "chosen": {"val_accuracy": 0.6, "at_grid_edge": True, "lr": 0.1, "weight_decay": 1.0},
                },
            )
        ]
    )
    beyond = differing(found).keys() - {f"model: {name}" for name in ("weights", "asked for as")}
    assert beyond - {"model: backbone (weights, feature, preprocessing)"} == {"chosen: lr", "chosen: weight_decay"}
    a, b = pair()
    epoch = {**META, "best_epoch_on_test": 3}
    found = explain([(a, Evidence(b.result, epoch, b.outcomes))])
    assert not any("epoch" in fact for fact in differing(found))


def test_of_the_draws_of_shots_only_their_c_is_a_setting() -> None:
    draws = [[{"seed": s, "C": c * 10.0**s, "images": 20, "acc1": c / 4} for s in (0, 1)] for c in (1, 2)]
    found = differing(explain([pair(a={"chosen": {"@5": draws[0]}}, b={"chosen": {"@5": draws[1]}})]))
    assert {fact: values for fact, values in found.items() if fact.startswith("chosen")} == {
        "chosen: C@5": ("1, 10", "2, 20")
    }


def test_a_features_version_that_was_not_recorded_is_the_first() -> None:
    old, new = ({"precision": "fp32", "device": "cpu"} | more for more in ({}, {"features_version": 1}))
    assert "run: features_version" not in differing(explain([pair(a={"settings": old}, b={"settings": new})]))
    found = differing(explain([pair(a={"settings": old}, b={"settings": new | {"features_version": 2}})]))
    assert found["run: features_version"] == ("1", "2")


def test_prompts_and_class_names_are_compared() -> None:
    toy = Toy()
    a = side(toy, toy.add("a"), META | {"classes": ["cat", "dog"], "templates": 80})
    b = side(toy, toy.add("b"), META | {"classes": [str(k) for k in range(10)], "templates": 1})
    found = differing(explain([(a, b)]))
    assert found["data: templates"] == ("80", "1")
    assert found["data: classes"][0] == "cat, dog"
    assert found["data: classes"][1].startswith("10 of them, 0 … 9 (")
    assert not any("fit" in fact or "chance" in fact for fact in found if fact.startswith("data"))


def test_what_differs_in_every_task_is_said_once_and_the_rest_by_task() -> None:
    found = explain([pair("linear/x", b={"chosen": {"C": 2.0}}), pair("linear/y", b={"commit": "abc"})])
    assert "model: weights" in differing(found)
    assert [d.fact for d in found.by_task["linear/x"]] == ["chosen: C"]
    assert [d.fact for d in found.by_task["linear/y"]] == ["version: commit"]
    text = markdown(explanation_blocks(found, "a", "b"))
    assert text.count("model: weights") == 1
    assert "Settings that differ in each of the 2 tasks" in text


def test_numbers_carry_the_paired_test() -> None:
    a, b = pair()
    (number,) = explain([(a, b)]).numbers
    assert number.test == compare_outcomes(a.outcomes["acc1"], b.outcomes["acc1"])
    assert number.p_adjusted == number.test.p
    text = markdown(explanation_blocks(explain([(a, b)]), "a", "b"))
    assert "| 75.0 [70.5, 79.0] | 60.0 [55.1, 64.7] |   +15.0 |" in text
    assert "exact McNemar (n=400, 400 units)" in text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"task_version": 2}, "task versions 1 and 2"),
        ({"data": {"spec": "x", "split": "val", "n": N, "fingerprint": "d"}}, "splits test and val"),
        (
            {"data": {"spec": "x", "split": "test", "n": 200, "fingerprint": "e"}, "right": np.ones(200)},
            "other data, classes or prompts (400 and 200 examples)",
        ),
    ],
)
def test_what_may_not_be_compared_is_said_first_and_not_tested(changes: dict[str, Any], why: str) -> None:
    a, b = pair(b=changes)
    assert why_not_comparable(a.result, b.result) == why
    found = explain([(a, b)])
    assert found.obstacles == (f"linear/x: not comparable: {why}; no test is given",)
    assert found.numbers[0].test is None
    text = markdown(explanation_blocks(found, "a", "b"))
    assert text.index("not comparable") < text.index("Settings that differ")
    assert "|       – |" in text


def test_other_data_under_the_same_ids_may_be_other_prompts() -> None:
    found = explain([pair(b={"data": {"spec": "x", "split": "test", "n": N, "fingerprint": "e"}})])
    (obstacle,) = found.obstacles
    assert obstacle.startswith(
        "linear/x: not comparable: other data, classes or prompts (the examples have the same ids"
    )
    assert obstacle.endswith("perhaps only classes or prompts differ); no test is given")
    assert found.numbers[0].test is None


def test_rows_that_cannot_be_read_leave_the_results_own_words() -> None:
    a, b = pair()
    found = explain([(a, Evidence(b.result, {}, {}, "no test: gone"))])
    assert found.notes == ("linear/x: no test: gone",)
    assert found.numbers[0].test is None
    assert not any(fact.startswith("data") for fact in differing(found))


def test_other_examples_are_a_note_and_no_test() -> None:
    toy = Toy()
    a = side(toy, toy.add("a"))
    b = side(toy, toy.add("b", captions=2))
    found = explain([(a, b)])
    assert found.numbers[0].test is None
    assert "not tested: the two models were measured on different examples" in found.notes[0]


def test_the_same_weights_in_another_backbone_are_pointed_out() -> None:
    found = explain([pair(a={"model": {"weights_hash": "w"}}, b={"model": {"weights_hash": "w"}})])
    assert "the weights are the same and the backbones are not" in found.notes[0]


def test_headlines_that_share_no_metric_are_said() -> None:
    a, b = pair()
    other = b.result.model_copy(update={"metric": "map", "estimates": {"map": b.result.estimates["acc1"]}})
    found = explain([(a, Evidence(other, META, {}))])
    assert found.numbers == ()
    assert "A's headline is acc1, B's is map" in found.notes[0]
    assert "Numbers" in markdown(explanation_blocks(found, "a", "b"))


def test_facts_keep_their_order_and_hide_nothing() -> None:
    a, _ = pair()
    groups = list(dict.fromkeys(name.partition(":")[0] for name in facts(a)))
    assert groups == ["model", "task", "setting", "data", "run", "version"]
