from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes
from vlbench.stats.intervals import estimate, mean_of
from vlbench.stats.paired import compare_outcomes
from vlbench.stats.ranked import average_precision, average_precision_11, macro, pseudo_values, roc_auc


def eleven_points(labels: np.ndarray, scores: np.ndarray) -> float:
    """VOC 2007's definition written out: over every threshold, in whole numbers."""
    positives = int(labels.sum())
    points = [(int(labels[scores >= t].sum()), int((scores >= t).sum())) for t in np.unique(scores)]
    return sum(max(p / n for p, n in points if 10 * p >= level * positives) for level in range(11)) / 11


METRICS = [
    (average_precision, average_precision_score),
    (average_precision_11, eleven_points),
    (roc_auc, roc_auc_score),
]


def problem(rng: np.random.Generator, *, n: int | None = None, ties: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Labels with two of each kind at least, and scores that know something of them."""
    n = n or int(rng.integers(5, 26))
    labels = np.concatenate([[0, 1, 0, 1], (rng.random(n - 4) < 0.4).astype(int)])
    return labels, rng.integers(0, ties, n) / 7 + 0.6 * labels


def outcomes_of(labels_NC: np.ndarray, scores_NC: np.ndarray, metric=average_precision) -> Outcomes:
    ids = [f"img{i:05d}" for i in range(len(labels_NC))]
    return Outcomes(ids, pseudo_values(macro(metric, labels_NC, scores_NC)), ids, binary=False, pseudo=True)


# ------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("metric, oracle", METRICS, ids=["ap", "ap11", "auc"])
def test_value_and_every_leave_one_out_equal_the_oracle(metric, oracle) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        labels, scores = problem(rng, ties=int(rng.integers(2, 60)))
        found = metric(labels, scores)
        assert found.value == pytest.approx(oracle(labels, scores), abs=1e-12)
        brute = [oracle(np.delete(labels, i), np.delete(scores, i)) for i in range(len(labels))]
        assert found.without_N == pytest.approx(brute, abs=1e-12)
        assert pseudo_values(found).mean() == pytest.approx(found.value, abs=1e-10)


def test_eleven_points_worked_example() -> None:
    # Ranked: + - + + -. Recall 1/3 at precision 1, 2/3 at 2/3, 1 at 3/4: levels 0..0.3 see 1, the other seven 3/4.
    labels, scores = np.array([1, 0, 1, 1, 0]), np.array([5.0, 4, 3, 2, 1])
    assert average_precision_11(labels, scores).value == pytest.approx((4 * 1 + 7 * 0.75) / 11)
    assert average_precision(labels, scores).value == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert roc_auc(labels, scores).value == pytest.approx(4 / 6)


def test_three_of_ten_positives_reach_recall_three_tenths() -> None:
    # In floating point 3 / 10 is less than 3 * 0.1, and the level would be read one positive late.
    labels = np.array([1, 1, 1] + [0] * 50 + [1] * 7)
    found = average_precision_11(labels, -np.arange(60.0))
    assert found.value == pytest.approx((4 * 1 + 7 * 10 / 60) / 11)


def test_recall_zero_is_the_best_precision_that_occurs() -> None:
    assert average_precision_11([0, 1], [2.0, 1.0]).value == pytest.approx(0.5)


def test_equal_scores_give_prevalence_and_exactly_one_half() -> None:
    labels = np.array([1, 0, 0, 0, 1, 0])
    for metric in (average_precision, average_precision_11):
        assert metric(labels, np.full(6, 0.3)).value == pytest.approx(1 / 3, abs=1e-15)
    found = roc_auc(labels, np.full(6, 0.3))
    assert found.value == 0.5
    assert (pseudo_values(found) == 0.5).all()


@pytest.mark.parametrize("metric", [average_precision, average_precision_11, roc_auc])
def test_order_of_images_does_not_matter(metric) -> None:
    rng = np.random.default_rng(3)
    labels, scores = problem(rng, n=60, ties=15)
    order = rng.permutation(60)
    before, after = metric(labels, scores), metric(labels[order], scores[order])
    assert after.value == before.value
    assert after.without_N == pytest.approx(before.without_N[order], abs=1e-14)


def test_macro_ignores_unjudged_images_and_classes_without_positives() -> None:
    rng = np.random.default_rng(4)
    labels = rng.choice([-1, 0, 1], p=[0.2, 0.5, 0.3], size=(40, 4))
    labels[:, 2] = np.minimum(labels[:, 2], 0)
    scores = rng.standard_normal((40, 4))

    def oracle(rows: np.ndarray) -> float:
        judged = [(labels[rows, c] >= 0) for c in (0, 1, 3)]
        pairs = [(labels[rows, c][keep], scores[rows, c][keep]) for c, keep in zip((0, 1, 3), judged)]
        return float(np.mean([average_precision_score(y, s) for y, s in pairs]))

    found, everyone = macro(average_precision, labels, scores), np.arange(40)
    assert found.value == pytest.approx(oracle(everyone))
    assert found.without_N == pytest.approx([oracle(np.delete(everyone, i)) for i in everyone], abs=1e-12)
    order = [3, 1, 0, 2]
    assert macro(average_precision, labels[:, order], scores[:, order]).value == pytest.approx(found.value)


def test_bad_input_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="no positive image"):
        average_precision([0, 0], [1.0, 2.0])
    with pytest.raises(UserError, match="two images of each class or more; there are 1 of one and 2 of the other"):
        roc_auc([0, 1, 0], [1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="1 of 2 scores are not finite"):
        average_precision_11([0, 1], [1.0, np.nan])
    with pytest.raises(UserError, match="no class has a positive"):
        macro(average_precision, np.zeros((3, 2)), np.zeros((3, 2)))


def test_the_only_positive_of_a_class_keeps_its_value() -> None:
    found = average_precision([0, 1, 0], [3.0, 2.0, 1.0])
    assert found.without_N.tolist() == [1.0, 0.5, 0.5]


def test_five_thousand_images_of_twenty_classes_take_no_time() -> None:
    rng = np.random.default_rng(5)
    labels = (rng.random((5000, 20)) < 0.08).astype(int)
    scores = rng.random((5000, 20)) + 0.3 * labels
    began = time.perf_counter()
    for metric in (average_precision, average_precision_11):
        macro(metric, labels, scores)
    assert time.perf_counter() - began < 2


# ---------------------------------------------------------------------------------------------------- intervals


def _delong_variance(labels: np.ndarray, scores: np.ndarray) -> float:
    """DeLong et al. 1988, equation 2: from the placement values of positives among negatives and the reverse."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    return wins.mean(axis=1).var(ddof=1) / len(positives) + wins.mean(axis=0).var(ddof=1) / len(negatives)


def test_auc_standard_error_is_delongs() -> None:
    labels, scores = problem(np.random.default_rng(6), n=400, ties=40)
    values = pseudo_values(roc_auc(labels, scores))
    assert values.var(ddof=1) / 400 == pytest.approx(_delong_variance(labels, scores), rel=3 / 400)


def _sample(rng: np.random.Generator, n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = (rng.random((n, classes)) < 0.25).astype(int)
    labels[:4] = [[0], [1], [0], [1]]
    return labels, rng.standard_normal((n, classes)) + 1.2 * labels


@pytest.mark.parametrize("metric", [average_precision, average_precision_11, roc_auc])
def test_standard_error_equals_a_brute_force_bootstrap(metric) -> None:
    rng = np.random.default_rng(7)
    labels, scores = _sample(rng, 300, 3)
    found = estimate(outcomes_of(labels, scores, metric))
    draws = [rng.integers(0, 300, 300) for _ in range(400)]
    brute = [macro(metric, labels[rows], scores[rows]).value for rows in draws]
    assert found.value == pytest.approx(macro(metric, labels, scores).value, abs=1e-12)
    assert found.se == pytest.approx(np.std(brute), rel=0.15)
    assert found.method == "jackknife pseudo-values, cluster bootstrap B=2000"


@pytest.mark.parametrize("metric", [average_precision, roc_auc])
def test_interval_covers_as_a_brute_force_bootstrap_does_or_better(metric) -> None:
    """Average precision reads higher in a small sample than in a large one, so neither quite reaches 95%."""
    rng, runs, n = np.random.default_rng(8), 100, 300
    truth = macro(metric, *_sample(rng, 200_000, 1)).value
    hits = brute_hits = 0
    for _ in range(runs):
        labels, scores = _sample(rng, n, 1)
        found = estimate(outcomes_of(labels, scores, metric))
        hits += found.lo <= truth <= found.hi
        draws = rng.integers(0, n, (40, n))
        lo, hi = np.quantile([metric(labels[rows, 0], scores[rows, 0]).value for rows in draws], [0.025, 0.975])
        brute_hits += lo <= truth <= hi
    print(f"coverage {hits / runs:.3f}, of a brute-force bootstrap {brute_hits / runs:.3f}")
    assert 0.9 <= hits / runs <= 0.985
    assert hits >= brute_hits - 6


def test_interval_stays_within_zero_and_one() -> None:
    labels = np.array([[1], [0]] * 20)
    found = estimate(outcomes_of(labels, labels + np.linspace(0, 0.99, 40)[:, None]))
    assert (found.value, found.hi) == (1.0, 1.0)
    assert 0.85 < found.lo < 1, "a perfect ranking of 40 images is not certain"
    one_swap = estimate(outcomes_of(labels, labels + np.linspace(0, 1.06, 40)[:, None]))
    assert one_swap.hi <= 1


def test_one_image_alone_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="one independent image alone"):
        estimate(Outcomes(["a", "b"], np.array([1.0, 0.5]), ["x", "x"], binary=False, pseudo=True))


def test_two_models_are_compared_by_their_pseudo_values() -> None:
    rng = np.random.default_rng(9)
    labels, scores = _sample(rng, 400, 3)
    better = scores + 0.4 * labels + 0.2 * rng.standard_normal(scores.shape)
    a, b = outcomes_of(labels, better), outcomes_of(labels, scores)
    test = compare_outcomes(a, b)
    assert test.diff == pytest.approx(mean_of(a) - mean_of(b))
    assert test.p < 0.001
    assert test.method == "jackknife pseudo-values, paired cluster bootstrap B=10000"
    draws = [rng.integers(0, 400, 400) for _ in range(300)]
    brute = [
        macro(average_precision, labels[rows], better[rows]).value
        - macro(average_precision, labels[rows], scores[rows]).value
        for rows in draws
    ]
    assert (test.lo, test.hi) == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=0.012)
    same = compare_outcomes(b, outcomes_of(labels, 3 * scores - 1))
    assert (same.diff, same.p) == (0.0, 1.0)
