from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from tests.stats.coco_scenes import SIDE, nothing_found, nothing_there, perfect, pycocotools_metrics, scene
from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes
from vlbench.stats.coco_ap import METRICS, coco_metrics
from vlbench.stats.coco_library import library_metrics
from vlbench.stats.coco_match import AREAS, Found, Scene, Truth, match
from vlbench.stats.intervals import estimate
from vlbench.stats.paired import compare_outcomes
from vlbench.stats.ranked import pseudo_values

KINDS = {"box": False, "mask": True}


def mixed(seed: int, n: int = 24, **settings) -> list[Scene]:
    """Images with much in them, and one each of: nothing found, nothing there, neither."""
    rng = np.random.default_rng(seed)
    scenes = [scene(rng, objects=int(rng.integers(1, 8)), **settings) for _ in range(n)]
    scenes[1], scenes[2] = nothing_found(scenes[1]), nothing_there(scenes[2])
    scenes[3] = nothing_there(nothing_found(scenes[3]))
    return scenes


def boxed(*objects: tuple, found: tuple = (), crowd: tuple = (), classes: tuple = (), areas: tuple = ()) -> Scene:
    """One image from boxes; ``found`` are boxes with a score. All are of class 0 unless told."""
    boxes = np.array(objects, dtype=np.float64).reshape(-1, 4)
    guesses = np.array(found, dtype=np.float64).reshape(-1, 5)
    return Scene(
        SIDE,
        SIDE,
        Truth(
            boxes,
            np.array(classes or [0] * len(boxes), dtype=np.int64),
            np.array(areas or np.prod(boxes[:, 2:], axis=1), dtype=np.float64),
            np.array(crowd or [False] * len(boxes), dtype=bool),
            None,
        ),
        Found(guesses[:, :4], guesses[:, 4], np.zeros(len(guesses), dtype=np.int64), None),
    )


def outcomes_of(scenes: list[Scene], metric: str = "ap", *, masks: bool = False) -> Outcomes:
    ids = [f"img{i:05d}" for i in range(len(scenes))]
    values = pseudo_values(coco_metrics(scenes, masks=masks)[metric])
    return Outcomes(ids, values, ids, binary=False, pseudo=True)


# --------------------------------------------------------------------------------------- against COCO's own code

SETS = {
    "plain": {},
    "crowds": {"crowds": 0.3, "amount": 0.15},
    "ties": {"ties": 4, "crowds": 0.1},
    "two levels of scores": {"ties": 1, "classes": (0, 1), "amount": 0.02},
    "classes missing on both sides": {"classes": (0, 1, 2, 3), "wrong_classes": (2, 3, 7, 9)},
    "much is wrong": {"amount": 0.4, "wrong": 12, "detected": 0.3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETS)
def test_all_numbers_are_pycocotools_own(name: str, kind: str) -> None:
    scenes = mixed(list(SETS).index(name), **SETS[name])
    known = pycocotools_metrics(scenes, masks=KINDS[kind])
    found = coco_metrics(scenes, masks=KINDS[kind])
    library = library_metrics(scenes, classes=10, masks=KINDS[kind])
    assert set(library) == set(METRICS), "the set is to say something of every number"
    for metric, value in zip(METRICS, known):
        assert library[metric] == pytest.approx(value, abs=1e-9)
        if metric in found:
            assert found[metric].value == pytest.approx(value, abs=1e-9)
            assert pseudo_values(found[metric]).mean() == pytest.approx(value, abs=1e-9)
    assert {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ar1", "ar10", "ar100"} <= set(found)


def test_more_than_a_hundred_detections_of_a_class_are_cut_at_a_hundred() -> None:
    rng = np.random.default_rng(5)
    scenes = [scene(rng, objects=6, wrong=160, classes=(0,), ties=ties, masks=False) for ties in (0, 3, 40)]
    scenes += [scene(rng, objects=6, wrong=120, classes=(0, 1), masks=False) for _ in range(3)]
    assert max(len(one.found.scores_D) for one in scenes) > 150
    matches = match(scenes, masks=False)
    assert matches.rank_D.max() == 99
    found = coco_metrics(scenes, masks=False)
    for metric, value in zip(METRICS, pycocotools_metrics(scenes, masks=False)):
        if metric in found:
            assert found[metric].value == pytest.approx(value, abs=1e-9)
    assert found["ar1"].value < found["ar10"].value < found["ar100"].value


@pytest.mark.parametrize("kind", KINDS)
def test_every_leave_one_out_is_pycocotools_without_that_image(kind: str) -> None:
    for seed, settings in enumerate([{"crowds": 0.2}, {"ties": 3, "classes": (0, 1, 2, 3, 4)}]):
        scenes = mixed(20 + seed, n=9, **settings)
        found = coco_metrics(scenes, masks=KINDS[kind])
        for left_out in range(len(scenes)):
            rest = scenes[:left_out] + scenes[left_out + 1 :]
            known = dict(zip(METRICS, pycocotools_metrics(rest, masks=KINDS[kind], classes=5)))
            for metric, value in found.items():
                assert value.without_N[left_out] == pytest.approx(known[metric], abs=1e-9), (metric, left_out)


def test_a_class_whose_last_object_leaves_is_left_out_of_the_mean() -> None:
    # Class 0 is found in both images; class 1 has one object, in the second image, which is missed.
    first = boxed((10, 10, 40, 40), found=((10, 10, 40, 40, 0.9),))
    second = boxed((20, 20, 30, 30), (60, 60, 30, 30), classes=(0, 1), found=((20, 20, 30, 30, 0.8),))
    found = coco_metrics([first, second], masks=False)["ap"]
    assert found.value == pytest.approx(0.5)
    assert found.without_N == pytest.approx([0.5, 1.0])


def test_a_number_whose_objects_are_all_in_one_image_is_absent() -> None:
    # Without that image it has no value; and of those ranges of areas that have no object it has none at all.
    first = boxed((10, 10, 120, 120), (0, 0, 20, 20), found=((10, 10, 120, 120, 0.9),))
    found = coco_metrics([first, boxed((20, 20, 30, 30)), nothing_there(first)], masks=False)
    assert set(found) == {"ap", "ap50", "ap75", "ap_small", "ar1", "ar10", "ar100", "ar_small"}


# ---------------------------------------------------------------------------------------------- worked by hand


def test_average_precision_of_a_worked_example() -> None:
    # Two of three objects found exactly, a wrong detection between them: recall 1/3 at precision 1, 2/3 at 2/3.
    scenes = [
        boxed((10, 10, 40, 40), (80, 80, 40, 40), found=((10, 10, 40, 40, 0.9), (100, 10, 40, 40, 0.8))),
        boxed((10, 10, 50, 50), found=((10, 10, 50, 50, 0.7),)),
        boxed(),
    ]
    found = coco_metrics(scenes, masks=False)
    assert found["ap"].value == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    assert found["ar100"].value == pytest.approx(2 / 3)
    assert found["ap"].without_N[0] == pytest.approx(1.0)
    assert found["ap"].without_N[1] == pytest.approx(51 / 101)
    assert found["ap"].without_N[2] == found["ap"].value


def test_thresholds_count_overlaps_that_reach_them() -> None:
    # Halves and three quarters of a box, of which the box is the union: overlaps of exactly 0.5 and 0.75.
    half = [boxed((0, 0, 40, 40), found=((0, 0, 20, 40, 0.9),)) for _ in range(2)]
    found = coco_metrics(half, masks=False)
    assert (found["ap50"].value, found["ap75"].value, found["ap"].value) == pytest.approx((1.0, 0.0, 0.1))
    most = [boxed((0, 0, 40, 40), found=((0, 0, 30, 40, 0.9),)) for _ in range(2)]
    found = coco_metrics(most, masks=False)
    assert (found["ap75"].value, found["ap"].value) == pytest.approx((1.0, 0.6))


def test_an_object_on_the_bound_of_two_ranges_is_in_both() -> None:
    side = 32.0
    scenes = [boxed((0, 0, side, side), found=((0, 0, side, side, 0.9),)) for _ in range(2)]
    found = coco_metrics(scenes, masks=False)
    assert (found["ap_small"].value, found["ap_medium"].value) == (1.0, 1.0)
    assert "ap_large" not in found
    scenes = [boxed((0, 0, 96.0, 96.0), found=((0, 0, 96.0, 96.0, 0.9),)) for _ in range(2)]
    found = coco_metrics(scenes, masks=False)
    assert (found["ap_medium"].value, found["ap_large"].value) == (1.0, 1.0)
    assert list(AREAS) == ["", "small", "medium", "large"]


def test_a_crowd_takes_any_number_of_detections_and_counts_for_none() -> None:
    inside = tuple((10 + 5 * k, 10, 20, 20, 0.9 - 0.1 * k) for k in range(4))
    scenes = [
        boxed((0, 0, 150, 150), (100, 100, 30, 30), crowd=(True, False), found=(*inside, (100, 100, 30, 30, 0.2))),
        boxed((5, 5, 50, 50), found=((5, 5, 50, 50, 0.5),)),
    ]
    assert coco_metrics(scenes, masks=False)["ap"].value == pytest.approx(1.0)
    plain = [replace(one, truth=replace(one.truth, crowd_G=np.zeros(len(one.truth.crowd_G), bool))) for one in scenes]
    assert coco_metrics(plain, masks=False)["ap"].value < 0.7


def test_the_surer_of_two_detections_takes_the_object() -> None:
    twice = boxed((0, 0, 40, 40), found=((0, 0, 38, 40, 0.9), (0, 0, 40, 40, 0.5)))
    matches = match([twice], masks=False)
    assert matches.right_ATD[0, 0].tolist() == [True, False]
    assert matches.right_ATD[0, 9].tolist() == [True, False], "0.95 is reached by 38 / 40"
    worse = boxed((0, 0, 40, 40), found=((0, 0, 30, 40, 0.9), (0, 0, 40, 40, 0.5)))
    assert match([worse], masks=False).right_ATD[0, 9].tolist() == [False, True]


@pytest.mark.parametrize("turned", [False, True])
def test_of_equal_overlaps_the_last_object_is_taken(turned: bool) -> None:
    left, right = (0, 0, 40, 40), (20, 0, 40, 40)
    objects = (right, left) if turned else (left, right)
    one = boxed(*objects, found=((10, 0, 40, 40, 0.9), (*right, 0.5)))
    assert match([one], masks=False).right_ATD[0, 0].tolist() == ([True, True] if turned else [True, False])
    found = coco_metrics([one, one], masks=False)
    assert found["ap50"].value == pytest.approx(pycocotools_metrics([one, one], masks=False)[1], abs=1e-12)


# ------------------------------------------------------------------------------------- degenerate, permuted, bad


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_detections_give_one_and_none_give_zero(kind: str) -> None:
    scenes = mixed(30, crowds=0.1)
    for made, value in ((perfect, 1.0), (nothing_found, 0.0)):
        found = coco_metrics([made(one) for one in scenes], masks=KINDS[kind])
        for metric in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ar100"):
            assert found[metric].value == pytest.approx(value, abs=1e-12)
            assert found[metric].without_N == pytest.approx(value, abs=1e-12)


def test_detections_that_know_nothing_of_the_image_are_at_zero() -> None:
    scenes = mixed(31, n=40)
    order = np.roll(np.arange(len(scenes)), 1)
    turned = [replace(one, found=scenes[place].found) for one, place in zip(scenes, order)]
    assert coco_metrics(turned, masks=True)["ap"].value < 0.02
    assert coco_metrics(scenes, masks=True)["ap"].value > 0.2


def test_order_of_images_does_not_matter_where_scores_differ() -> None:
    scenes = mixed(32)
    order = np.random.default_rng(0).permutation(len(scenes))
    before, after = coco_metrics(scenes, masks=False), coco_metrics([scenes[i] for i in order], masks=False)
    for metric, found in before.items():
        assert after[metric].value == pytest.approx(found.value, abs=1e-12)
        assert after[metric].without_N == pytest.approx(found.without_N[order], abs=1e-12)


def test_names_of_the_classes_do_not_matter() -> None:
    scenes, names = mixed(33), np.array([7, 2, 5])
    renamed = [
        replace(
            one,
            truth=replace(one.truth, classes_G=names[one.truth.classes_G]),
            found=replace(one.found, classes_D=names[one.found.classes_D]),
        )
        for one in scenes
    ]
    before, after = coco_metrics(scenes, masks=False), coco_metrics(renamed, masks=False)
    assert {k: v.value for k, v in after.items()} == pytest.approx({k: v.value for k, v in before.items()})


def test_bad_input_is_one_clear_line() -> None:
    scenes = mixed(34, n=5, masks=False)
    with pytest.raises(UserError, match="no image of the reported split has an object"):
        coco_metrics([nothing_there(one) for one in scenes], masks=False)
    with pytest.raises(UserError, match="the detections have no masks"):
        coco_metrics(scenes, masks=True)
    odd = replace(scenes[0], found=replace(scenes[0].found, scores_D=np.full(len(scenes[0].found.scores_D), np.nan)))
    with pytest.raises(UserError, match="detections have no finite score"):
        coco_metrics([odd, *scenes[1:]], masks=False)


# ---------------------------------------------------------------------------------------- intervals and speed


def test_intervals_and_paired_tests_take_the_pseudo_values() -> None:
    rng = np.random.default_rng(40)
    good = [scene(rng, objects=4, amount=0.03, masks=False) for _ in range(60)]
    rng = np.random.default_rng(40)
    poor = [scene(rng, objects=4, amount=0.2, masks=False) for _ in range(60)]
    a, b = outcomes_of(good), outcomes_of([replace(g, found=p.found) for g, p in zip(good, poor)])
    found = estimate(a)
    assert found.lo < found.value < found.hi
    assert found.value == pytest.approx(coco_metrics(good, masks=False)["ap"].value, abs=1e-9)
    assert found.method.startswith("jackknife pseudo-values")
    test = compare_outcomes(a, b)
    assert test.diff == pytest.approx(found.value - estimate(b).value)
    assert test.lo > 0
    assert test.p < 0.01


def test_standard_error_is_that_of_a_bootstrap_that_makes_the_metric_again() -> None:
    rng = np.random.default_rng(41)
    scenes = [scene(rng, objects=int(rng.integers(1, 6)), masks=False, classes=(0, 1)) for _ in range(50)]
    again = [
        coco_metrics([scenes[place] for place in rng.integers(0, 50, 50)], masks=False)["ap"].value for _ in range(60)
    ]
    assert estimate(outcomes_of(scenes)).se == pytest.approx(np.std(again, ddof=1), rel=0.35)


@pytest.mark.slow
def test_intervals_cover_what_a_population_has() -> None:
    """95% intervals of 80 images; and beside them a bootstrap that makes the metric again for each resample."""
    rng = np.random.default_rng(0)
    amounts = (0.03, 0.1, 0.25)
    population = [
        scene(
            rng,
            objects=int(rng.integers(0, 6)),
            amount=float(rng.choice(amounts)),
            wrong=int(rng.integers(0, 5)),
            classes=(0, 1),
            masks=False,
        )
        for _ in range(1500)
    ]
    truth = coco_metrics(population, masks=False)
    trials, covered = 240, dict.fromkeys(("ap", "ap50", "ap75", "ar100"), 0)
    for _ in range(trials):
        drawn = [population[place] for place in rng.integers(0, len(population), 80)]
        found = coco_metrics(drawn, masks=False)
        ids = [str(place) for place in range(80)]
        for metric in covered:
            interval = estimate(Outcomes(ids, pseudo_values(found[metric]), ids, binary=False, pseudo=True))
            covered[metric] += interval.lo <= truth[metric].value <= interval.hi
    print({metric: count / trials for metric, count in covered.items()})
    for metric in ("ap", "ap75", "ar100"):
        assert 0.90 <= covered[metric] / trials <= 0.98, metric


def test_three_hundred_images_take_a_moment() -> None:
    rng = np.random.default_rng(42)
    scenes = [scene(rng, objects=5, wrong=12, classes=range(8), masks=False) for _ in range(300)]
    before = time.process_time()
    coco_metrics(scenes, masks=False)
    assert time.process_time() - before < 4


@pytest.mark.slow
def test_a_set_of_cocos_size_takes_minutes_at_most() -> None:
    rng = np.random.default_rng(43)
    often = 1 / np.arange(1, 81)  # as COCO's classes: one of them has a fifth of all objects
    classes = rng.choice(80, 2000, p=often / often.sum()).tolist()
    scenes = [scene(rng, objects=7, wrong=93, classes=classes, masks=False) for _ in range(5000)]
    before = time.process_time()
    coco_metrics(scenes, masks=False)
    assert time.process_time() - before < 180
