"""A study's table: mean over seeds, spread over seeds, interval over examples."""

from __future__ import annotations

import numpy as np

from tests.report.toy import N, Toy
from vlbench.core.types import Outcomes
from vlbench.report.arms import Arm, Wanted, arms_page, mean_outcomes
from vlbench.report.page import markdown
from vlbench.stats.intervals import estimate


def cells(toy: Toy, *arms: Arm) -> dict[str, list[str]]:
    text = markdown(arms_page("t", arms, toy.results, toy.outcomes_of, notes=["Note."]))
    assert text.endswith("\n\nNote.\n")
    rows = [line.strip("| ").split("|") for line in text.split("\n") if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_cell_is_mean_and_deviation_over_seeds_and_the_interval_of_the_mean_over_examples() -> None:
    toy = Toy()
    rights = [(np.random.default_rng(seed).random(N) < share).astype(float) for seed, share in enumerate((0.6, 0.8))]
    for seed, right in enumerate(rights):
        toy.add(f"clip-s{seed}", right=right)
    mean = np.mean(rights, axis=0)  # 0, 1/2 or 1 an example
    rng = np.random.default_rng(5)
    drawn = np.sort(mean[rng.integers(0, N, (4000, N))].mean(axis=1))
    shares = [100 * right.mean() for right in rights]
    table = cells(toy, Arm("clip", ("clip-s0", "clip-s1")))
    assert table["Arm"] == ["linear/cifar10: acc1"]
    value, _, deviation, lo, hi = table["clip"][0].replace("[", "").replace("]", "").replace(",", "").split()
    assert float(value) == round(np.mean(shares), 1)
    assert float(deviation) == round(float(np.std(shares, ddof=1)), 1)
    # A bootstrap of another seed, whose ends stray by a few tenths.
    assert abs(float(lo) - 100 * drawn[100]) < 0.5
    assert abs(float(hi) - 100 * drawn[3899]) < 0.5
    assert table["*chance*"] == ["10.0"]


def test_the_interval_of_equal_seeds_is_that_of_one() -> None:
    """Three times the same backbone know no more of other examples than one of them."""
    toy = Toy()
    for seed in range(3):
        toy.add(f"clip-s{seed}", right=240)
    one = estimate(toy.outcomes_of(toy.results[0])["acc1"])
    mean = mean_outcomes([toy.outcomes_of(result)["acc1"] for result in toy.results])
    assert mean is not None
    joined = estimate(mean)
    assert joined.value == one.value
    assert abs((joined.hi - joined.lo) - (one.hi - one.lo)) < 0.01


def test_metrics_beside_the_headline_have_columns_and_chances_of_their_own() -> None:
    toy = Toy()
    toy.add("b-s0", "knn/cifar10", right=200)
    for seed, right in enumerate((100, 300)):
        one = toy.add(f"a-s{seed}", right=right)
        toy.outcomes_of(one)["acc5"] = toy.outcomes_of(one)["acc1"]  # a dict of the toy's own
        one.estimates["acc5"] = one.estimates["acc1"].model_copy(update={"value": 0.9 + 0.02 * seed})
    wanted = Wanted({"linear/cifar10": ("acc5", "acc1")}, lambda result, metric: {"acc1": 0.1, "acc5": 0.5}[metric])
    arms = (Arm("a", ("a-s0", "a-s1")), Arm("b", ("b-s0",)))
    text = markdown(arms_page("t", arms, toy.results, toy.outcomes_of, wanted=wanted))
    rows = {line.strip("| ").split("|")[0].strip(): line for line in text.split("\n") if line.startswith("| ")}
    titles = [cell.strip() for cell in rows["Arm"].strip("| ").split("|")]
    assert titles == ["Arm", "knn/cifar10: acc1", "linear/cifar10: acc1", "linear/cifar10: acc5"]
    cells_a = [cell.strip() for cell in rows["a"].strip("| ").split("|")]
    assert cells_a[1] == "–"
    assert cells_a[2].startswith("50.0 ± 35.4 [")
    assert cells_a[3].startswith("91.0 ± 1.4 [")
    assert [cell.strip() for cell in rows["*chance*"].strip("| ").split("|")][1:] == ["10.0", "10.0", "50.0"]


def test_one_seed_missing_seeds_and_missing_tasks_are_said() -> None:
    toy = Toy()
    toy.add("a-s0", right=200)
    toy.add("a-s0", "knn/cifar10", right=100)
    toy.add("b-s0", right=300)
    toy.add("elsewhere", "zeroshot/cifar10", right=300)
    table = cells(toy, Arm("a", ("a-s0", "a-s1")), Arm("b", ("b-s0",)), Arm("c", ("c-s0",)))
    assert table["Arm"] == ["knn/cifar10: acc1", "linear/cifar10: acc1"], "other models' tasks are no columns"
    assert table["a"] == ["25.0 [21.0, 29.5] (1 of 2 seeds)", "50.0 [45.1, 54.9] (1 of 2 seeds)"]
    assert table["b"] == ["–", "75.0 [70.5, 79.0]"]
    assert table["c"] == ["–", "–"]


def test_mean_outcomes_goes_by_id_and_refuses_other_examples_or_weights() -> None:
    def of(ids: str, values: list[float], **more: np.ndarray) -> Outcomes:
        return Outcomes(list(ids), np.array(values), list(ids), binary=True, **more)

    mean = mean_outcomes([of("abc", [1, 0, 0]), of("cab", [1, 1, 0])])
    assert mean is not None
    assert (list(mean.ids), mean.values.tolist(), mean.binary) == (["a", "b", "c"], [1.0, 0.0, 0.5], False)
    assert mean_outcomes([of("abc", [1, 0, 0]), of("abd", [1, 1, 0])]) is None
    assert mean_outcomes([of("ab", [1, 0]), of("ab", [1, 0], weights=np.ones(2))]) is None
    strata = [of("ab", [1, 0], strata=np.array([0, 1])), of("ba", [1, 0], strata=np.array([1, 0]))]
    assert mean_outcomes(strata) is not None
    assert mean_outcomes([strata[0], of("ab", [1, 0], strata=np.array([1, 1]))]) is None


def test_two_protocols_of_a_task_are_two_columns() -> None:
    toy = Toy()
    toy.add("a-s0", config={"c": 1.0})
    toy.add("a-s1", config={"c": 2.0})
    table = cells(toy, Arm("a", ("a-s0", "a-s1")))
    assert [title.partition(": ")[2] for title in table["Arm"]] == [
        "acc1 (1 of 2 protocols)",
        "acc1 (2 of 2 protocols)",
    ]
    assert all("(1 of 2 seeds)" in cell for cell in table["a"])
