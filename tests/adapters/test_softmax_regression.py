from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vlbench.adapters.common import softmax_path
from vlbench.adapters.common.softmax_regression import SoftmaxRegression


def _problem(n: int = 400, width: int = 12, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    centres = rng.standard_normal((classes, width))
    # Axes of very different spread, and a mean far from zero: what pooled features look like.
    features = (centres[labels] + rng.standard_normal((n, width))) * np.logspace(-2, 1, width) + 30
    return features.astype(np.float32), labels


def _scaled(features: np.ndarray) -> np.ndarray:
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    return centred / np.sqrt((centred**2).sum(axis=1).mean())


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
def test_fit_equals_sklearn_at_the_same_c(c: float) -> None:
    features, labels = _problem()
    fit = SoftmaxRegression(features, labels, 5).fit(c, tolerance=1e-9)
    oracle = LogisticRegression(C=c, tol=1e-8, max_iter=100_000).fit(_scaled(features), labels)
    assert fit.converged
    logits, expected = fit.logits(features), oracle.decision_function(_scaled(features))
    assert logits - logits.mean(axis=1, keepdims=True) == pytest.approx(
        expected, abs=1e-4 * max(1, abs(expected).max())
    )
    p = oracle.predict_proba(_scaled(features))[np.arange(len(labels)), labels]
    objective = -np.log(p).mean() + 0.5 * (oracle.coef_**2).sum() / (c * len(labels))
    assert fit.objective == pytest.approx(objective, rel=1e-6)
    assert (logits.argmax(axis=1) == oracle.predict(_scaled(features))).mean() >= 0.9999


def test_scale_shift_and_rotation_of_features_change_nothing() -> None:
    features, labels = _problem()
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))[0]
    before = SoftmaxRegression(features, labels, 5).fit(10.0, tolerance=1e-9).logits(features)
    moved = (features.astype(np.float64) - 30) @ rotation * 1000 - 7
    after = SoftmaxRegression(moved, labels, 5).fit(10.0, tolerance=1e-9).logits(moved)
    assert after == pytest.approx(before, abs=1e-3)


def test_fewer_examples_than_features() -> None:
    features, labels = _problem(n=20, width=64, classes=3)
    fit = SoftmaxRegression(features, labels, 3).fit(1.0, tolerance=1e-9)
    oracle = LogisticRegression(C=1.0, tol=1e-8, max_iter=100_000).fit(_scaled(features), labels)
    expected = oracle.decision_function(_scaled(features))
    logits = fit.logits(features)
    assert logits - logits.mean(axis=1, keepdims=True) == pytest.approx(expected, abs=1e-4)


def test_constant_features_give_the_class_shares() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2] * 1)
    fit = SoftmaxRegression(np.full((10, 4), 2.5, np.float32), labels, 3).fit(1.0)
    p = np.exp(fit.logits(np.full((1, 4), 2.5)))[0]
    assert p / p.sum() == pytest.approx([0.6, 0.3, 0.1], abs=1e-4)


def test_warm_start_reaches_the_same_minimum() -> None:
    features, labels = _problem()
    problem = SoftmaxRegression(features, labels, 5)
    cold = problem.fit(100.0, tolerance=1e-8)
    warm = problem.fit(100.0, tolerance=1e-8, start=problem.fit(1.0))
    assert warm.logits(features) == pytest.approx(cold.logits(features), abs=1e-3)


def test_cap_on_iterations_is_reported() -> None:
    features, labels = _problem()
    fit = SoftmaxRegression(features, labels, 5).fit(1e3, tolerance=1e-12, max_iterations=2)
    assert not fit.converged
    assert fit.iterations == 2


def test_fit_is_quick() -> None:
    features, labels = _problem(n=4000, width=96, classes=48)
    began = time.process_time()
    assert SoftmaxRegression(features, labels, 48).fit(10.0, tolerance=1e-4).converged
    assert time.process_time() - began < 10


def test_path_finds_every_minimum_of_the_grid() -> None:
    """Each objective against a float64 fit to the last digit, from a penalty that hides all to none to speak of."""
    features, labels = _problem()
    problem = SoftmaxRegression(features, labels, 5)
    cs = np.logspace(-6, 5, 23)
    for fit in problem.path(cs):
        exact = problem.fit(fit.c, tolerance=1e-9, max_iterations=5000)
        assert fit.converged, fit.c
        assert exact.objective * (1 - 1e-9) <= objective_of(fit, problem) <= exact.objective * (1 + 1e-5), fit.c
        assert fit.objective == pytest.approx(objective_of(fit, problem), rel=1e-5)


def objective_of(fit, problem: SoftmaxRegression) -> float:
    """In float64, from the weights that a user gets."""
    features, labels = _problem()
    logits = fit.logits(features)
    logits -= logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return loss.mean() + 0.5 * np.square(fit.weight_DC * problem.scale).sum() / (fit.c * len(labels))


def test_a_line_that_is_cut_short_ends_where_it_was_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and what is said of them belong together, however few evaluations a line has."""
    monkeypatch.setattr(softmax_path, "LINE_STEPS", 1)
    features, labels = _problem()
    problem = SoftmaxRegression(features, labels, 5)
    for fits in (1, 2, 5):
        (fit,) = problem.path([10.0], max_iterations=fits)
        assert fit.objective == pytest.approx(objective_of(fit, problem), rel=1e-5)


def test_path_of_one_value_or_of_values_far_apart_needs_no_neighbours() -> None:
    features, labels = _problem()
    problem = SoftmaxRegression(features, labels, 5)
    whole = {fit.c: fit.objective for fit in problem.path([1e-3, 1.0, 1e3])}
    for c, objective in whole.items():
        (alone,) = problem.path([c])
        assert alone.objective == pytest.approx(objective, rel=1e-5)


def test_path_of_separable_classes_stays_finite() -> None:
    labels = np.arange(60) % 3
    features = 5 * np.eye(3)[labels] + 0.01 * np.random.default_rng(0).standard_normal((60, 3))
    for fit in SoftmaxRegression(features, labels, 3).path(np.logspace(-6, 5, 12)):
        assert np.isfinite(fit.weight_DC).all()
        assert np.isfinite(fit.bias_C).all()
    assert (fit.logits(features).argmax(axis=1) == labels).all()


def test_path_on_constant_features_gives_the_class_shares() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2] * 1)
    for fit in SoftmaxRegression(np.full((10, 4), 2.5, np.float32), labels, 3).path([1e-3, 1.0, 1e3]):
        p = np.exp(fit.logits(np.full((1, 4), 2.5)))[0]
        assert p / p.sum() == pytest.approx([0.6, 0.3, 0.1], abs=2e-3)


def test_path_with_fewer_examples_than_features_and_a_rare_class() -> None:
    features, labels = _problem(n=40, width=64, classes=3)
    labels[labels == 2] = 0
    labels[5] = 2
    problem = SoftmaxRegression(features, labels, 3)
    for fit in problem.path([1e-2, 1.0, 100.0]):
        exact = problem.fit(fit.c, tolerance=1e-9, max_iterations=5000)
        assert fit.objective == pytest.approx(exact.objective, rel=1e-5)
