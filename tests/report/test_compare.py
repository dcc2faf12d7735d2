from __future__ import annotations

import pytest

from tests.report.toy import N, Toy, overlapping
from vlbench.core.errors import UserError
from vlbench.report.compare import compare_models, render_comparison
from vlbench.report.tables import interval
from vlbench.stats.paired import compare_outcomes, newcombe


def both(toy: Toy, **more: object):
    sides = [[result for result in toy.results if result.model.name == name] for name in ("a", "b")]
    return compare_models(*sides, toy.outcomes_of, **more)  # type: ignore[arg-type]


@pytest.fixture
def toy() -> Toy:
    toy = Toy()
    for task, a, b in (("linear/x", 300, 240), ("linear/y", 200, 280), ("knn/x", 250, 249)):
        toy.add("a", task, right=a)
        toy.add("b", task, right=b)
    return toy


def test_comparison_judges_every_shared_task(toy: Toy) -> None:
    found = both(toy)
    assert [(row.task, row.verdict) for row in found.tasks] == [
        ("knn/x", "not separated"),
        ("linear/x", "A better"),
        ("linear/y", "B better"),
    ]
    assert found.tasks[1].test == compare_outcomes(*(toy.outcomes_of(toy.results[i])["acc1"] for i in (0, 1)))
    assert found.tasks[0].p_adjusted == 1.0


def test_comparison_swaps_with_its_models(toy: Toy) -> None:
    forward = both(toy)
    backward = compare_models(
        [r for r in toy.results if r.model.name == "b"],
        [r for r in toy.results if r.model.name == "a"],
        toy.outcomes_of,
    )
    swap = {"A better": "B better", "B better": "A better", "not separated": "not separated"}
    assert [row.verdict for row in backward.tasks] == [swap[row.verdict] for row in forward.tasks]
    assert [row.p_adjusted for row in backward.tasks] == [row.p_adjusted for row in forward.tasks]


def test_verdict_is_on_the_adjusted_p() -> None:
    toy = Toy()
    for k in range(4):
        a = overlapping(300, 400, 0)
        b = a.copy()
        b[(a == 1).nonzero()[0][:11]] = 0
        b[(a == 0).nonzero()[0][:2]] = 1  # 11 against 2: p = 0.022, four times is 0.09
        toy.add("a", f"linear/{k}", right=a)
        toy.add("b", f"linear/{k}", right=b)
    rows = both(toy).tasks
    assert all(row.test.p < 0.05 < row.p_adjusted for row in rows)
    assert {row.verdict for row in rows} == {"not separated"}


def test_rendering_shows_everything_asked_for(toy: Toy) -> None:
    text = render_comparison(both(toy))
    assert text.startswith("A = a, B = b\n")
    (line,) = [line for line in text.splitlines() if line.startswith("| linear/x")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        *("linear/x", "acc1", "75.0", "60.0", "+15.0", interval(*newcombe(240, 60, 0, 100), signed=True)),
        *("<0.001", "<0.001", "5.4", "A better"),
    ]
    assert "exact McNemar (n=400, 400 units)" in text
    assert "Holm's correction over 3 tasks" in text
    assert render_comparison(both(toy)) == text


def test_different_data_are_named_and_not_compared(toy: Toy) -> None:
    toy.add("a", "linear/z")
    toy.add("b", "linear/z", data={"spec": "hf:x", "split": "test", "n": N, "fingerprint": "other"})
    toy.add("a", "linear/w")
    toy.add("b", "linear/w", config={"c": 2.0}, task_fingerprint="other")
    toy.add("b", "linear/only")
    found = both(toy)
    assert len(found.tasks) == 3
    different = "the two were measured with different"
    assert list(found.notes) == [
        "linear/only: only B has been measured",
        f"linear/w: not compared: {different} task card and adapter settings; evaluate both again",
        f"linear/z: not compared: {different} data; evaluate both again",
    ]


def test_settings_that_differ_are_named(toy: Toy) -> None:
    toy.add("a", "linear/z", settings={"precision": "bf16"})
    toy.add("b", "linear/z", settings={"precision": "fp32"})
    assert "settings differ: precision: A bf16, B fp32 (linear/z)" in both(toy).notes


def test_weights_that_changed_under_one_name_are_named(toy: Toy) -> None:
    toy.add("a", "linear/z", model={"backbone_fingerprint": "new"})
    assert "a: its results come from 2 different weights or preprocessings" in both(toy).notes


def test_an_unknown_metric_proposes_the_nearest(toy: Toy) -> None:
    with pytest.raises(UserError, match="unknown metric 'acc'; did you mean 'acc1'"):
        both(toy, metric="acc")
    assert len(both(toy, metric="acc1").tasks) == 3


def test_models_without_a_shared_task_are_an_error() -> None:
    toy = Toy()
    toy.add("a", "linear/x")
    toy.add("b", "linear/y")
    with pytest.raises(UserError, match=r"share no task.*linear/x: only A.*linear/y: only B"):
        both(toy)
