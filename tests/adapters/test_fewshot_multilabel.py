from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from tests.adapters.fakes import FakeData, FakeEncoder
from tests.adapters.multilabel_fakes import (
    CLASSES,
    MultilabelSource,
    multilabel_data,
    multilabel_oracle,
    some_labels,
)
from vlbench.adapters.common.logistic_regression import LogisticRegressions
from vlbench.adapters.fewshot_multilabel import ADAPTER, choose_c, deal_folds, draw_shots
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest
from vlbench.stats.paired import compare_outcomes
from vlbench.stats.ranked import average_precision_11, macro
from vlbench.store.examples import rows_from_parquet, rows_to_parquet


def _config(**settings):
    return ADAPTER.Config(**{"shots": (4, 12), "seeds": (0, 1), "c_count": 5, **settings})


def _measure(encoder: FakeEncoder, data: FakeData, **settings):
    config = _config(**settings)
    rows = ADAPTER.predict(encoder, data, config)
    return rows, ADAPTER.score(rows, config)


# ------------------------------------------------------------------------------------------------------- the draw


def test_draw_of_a_small_example_by_hand() -> None:
    labels = np.array([[1, 1], [1, 0], [1, 0], [0, 1], [-1, 1], [0, 0]])
    digests = ["a", "b", "c", "d", "e", "f"]
    order = sorted(digests, key=lambda name: digest(f"7 {name}".encode()))
    wanted = set()
    for c in range(2):
        wanted |= set([name for name in order if labels[digests.index(name), c] == 1][:2])
    draw = draw_shots(digests, labels, 2, seed=7, folds=5)
    assert [digests[row] for row in draw.rows] == [name for name in order if name in wanted]
    assert 5 not in draw_shots(digests, labels, 6, seed=0, folds=5).rows, "an image without a class is never drawn"
    assert set(draw.folds) == {0, 1}, "two shots have two folds"


def test_draw_is_nested_different_by_seed_and_blind_to_order() -> None:
    labels, digests = some_labels(150, 0, difficult=0.1), [digest(f"{i}".encode()) for i in range(150)]
    draw = draw_shots(digests, labels, 8, seed=0, folds=5)
    assert ((labels[draw.rows] == 1).sum(axis=0) >= 8).all()
    assert len(draw.rows) == len(set(draw.rows)) <= 5 * 8
    rng = np.random.default_rng(0)
    files, classes = rng.permutation(150), rng.permutation(5)
    moved = draw_shots([digests[i] for i in files], labels[files][:, classes], 8, seed=0, folds=5)
    assert (files[moved.rows] == draw.rows).all()
    assert (moved.folds == draw.folds).all()
    assert set(draw.rows) < set(draw_shots(digests, labels, 20, seed=0, folds=5).rows)
    other = draw_shots(digests, labels, 8, seed=1, folds=5)
    assert 0 < len(set(draw.rows) & set(other.rows)) < len(draw.rows)


def test_copies_of_an_image_are_drawn_once_in_any_order_of_files() -> None:
    digests, labels = ["a", "a", "b", "a"], np.array([[1, 0], [0, 1], [1, 1], [1, 0]])
    draw = draw_shots(digests, labels, 3, seed=0, folds=2)
    assert sorted(digests[row] for row in draw.rows) == ["a", "b"]
    back = draw_shots(digests[::-1], labels[::-1], 3, seed=0, folds=2)
    assert (labels[::-1][back.rows] == labels[draw.rows]).all()


@pytest.mark.parametrize("seed", range(5))
def test_folds_have_their_share_of_every_class(seed: int) -> None:
    present = some_labels(80, seed) == 1
    present[:, 4] &= np.arange(80) < 20
    present = present[present.any(axis=1)]
    folds = deal_folds(present, 5)
    for c in range(5):
        counts = np.bincount(folds[present[:, c]], minlength=5)
        assert counts.max() - counts.min() <= 2, f"class {c}: {counts}"
    one_each = np.eye(4, dtype=bool)[np.repeat(np.arange(4), 10)]
    assert (np.bincount(deal_folds(one_each, 5) * 4 + one_each.argmax(axis=1)) == 2).all()


# ---------------------------------------------------------------------------------------------------- the protocol


def test_metrics_are_means_over_seeds_of_sklearn_s_fits_on_the_shots() -> None:
    encoder, data = multilabel_oracle(noise=1.0), multilabel_data(difficult=0.1)
    rows, found = _measure(encoder, data)
    train, test = (encoder.images(data.split(name)) for name in ("train", "test"))
    labels, test_labels = (data.split(name).labels_NC for name in ("train", "test"))
    for shots in (4, 12):
        precision, eleven = [], []
        for seed, record in enumerate(rows.meta["chosen"][f"@{shots}"]):
            drawn = draw_shots(train.digests, labels, shots, seed=seed, folds=5).rows
            features = train.pooled_ND[drawn].astype(np.float64)
            scale = np.sqrt(((features - features.mean(axis=0)) ** 2).sum(axis=1).mean())
            scores = np.zeros(test_labels.shape)
            for c in range(5):
                known = labels[drawn, c] >= 0
                oracle = LogisticRegression(C=record["C"], tol=1e-6, max_iter=10_000)
                oracle.fit(features[known] / scale, labels[drawn[known], c])
                scores[:, c] = oracle.decision_function(test.pooled_ND / scale)
            judged = [test_labels[:, c] >= 0 for c in range(5)]
            precision.append(
                np.mean([average_precision_score(test_labels[k, c], scores[k, c]) for c, k in enumerate(judged)])
            )
            eleven.append(macro(average_precision_11, test_labels, scores).value)
            assert record["map11"] == pytest.approx(eleven[-1], abs=5e-3)
            assert record["images"] == len(drawn)
        assert found[f"map@{shots}"].value == pytest.approx(np.mean(precision), abs=5e-3)
        assert found[f"map11@{shots}"].value == pytest.approx(np.mean(eleven), abs=5e-3)
    assert set(found) == {"map11@4", "map@4", "map11@12", "map@12"} == set(rows.meta["chance"])
    assert found["map11@12"].value > found["map11@4"].value > rows.meta["chance"]["map11@4"]
    assert found["map11@4"].n == found["map11@4"].n_clusters == 200
    assert found["map11@4"].method.startswith("jackknife pseudo-values")


def test_stored_rows_give_the_same_numbers_and_the_mean_of_the_draws() -> None:
    rows, found = _measure(multilabel_oracle(noise=1.0), multilabel_data())
    again = rows_from_parquet(rows_to_parquet(rows))
    assert again["scores@4"].shape == (200, 2, 5)
    assert ADAPTER.score(again, _config()) == found
    draws = [macro(average_precision_11, again["labels"], again["scores@4"][:, seed]).value for seed in (0, 1)]
    assert found["map11@4"].value == pytest.approx(np.mean(draws), abs=1e-12)
    assert draws[0] != draws[1]
    percents = ", ".join(f"{100 * value:.1f}" for value in draws)
    assert f"map11@4 of the 2 draws: {percents}%" in rows.meta["notes"]


def test_cross_validation_is_the_brute_force_one() -> None:
    rng, config = np.random.default_rng(0), _config(c_low=1e-2, c_high=1e4, c_count=7, search_tolerance=1e-8)
    labels = some_labels(60, 3, difficult=0.1)
    features = 0.5 * rng.standard_normal((60, 8))
    features[:, :5] += labels == 1
    features[:, 5] *= 6
    folds = deal_folds(labels == 1, 5)
    grid, quality = np.logspace(-2, 4, 7), []
    for c in grid:
        fits = [LogisticRegressions(features[folds != f], labels[folds != f]).fit(float(c)) for f in range(5)]
        held = [(labels[folds == f], fit.logits(features[folds == f])) for f, fit in enumerate(fits)]
        quality.append(sum(macro(average_precision_11, of, logits).value for of, logits in held))
    found = choose_c(features, labels, folds, config=config, device="cpu")
    assert found == pytest.approx(grid[int(np.argmax(quality))])
    assert 1e-2 < found < 1e4, "the best is inside the grid"


def test_nothing_is_chosen_on_test_or_val() -> None:
    encoder, data = multilabel_oracle(noise=1.0), multilabel_data(val=0)
    before, _ = _measure(encoder, data)
    data.splits["test"].labels_NC = 1 - data.splits["test"].labels_NC
    data.splits["val"] = MultilabelSource(some_labels(60, 9), split="val")
    after, _ = _measure(encoder, data)
    for shots in (4, 12):
        assert (before[f"scores@{shots}"] == after[f"scores@{shots}"]).all()


def test_order_of_images_and_classes_does_not_matter() -> None:
    data, encoder = multilabel_data(difficult=0.1, val=0), multilabel_oracle(noise=1.0)
    before = _measure(encoder, data)[1]
    rng, order = np.random.default_rng(0), [3, 0, 4, 2, 1]
    moved = FakeData({name: part.reordered(rng.permutation(len(part))) for name, part in data.splits.items()})
    for part in moved.splits.values():
        part.labels_NC, part.classes = part.labels_NC[:, order], tuple(CLASSES[c] for c in order)
    after = _measure(encoder, moved)[1]
    for metric, expected in before.items():
        assert (after[metric].value, after[metric].lo) == pytest.approx((expected.value, expected.lo), abs=2e-3)


def test_models_are_compared_on_the_same_shots() -> None:
    data = multilabel_data(test=300)
    good, bad = (ADAPTER.outcomes(_measure(multilabel_oracle(noise=noise), data)[0], _config()) for noise in (0.4, 1.2))
    for metric in good:
        test = compare_outcomes(good[metric], bad[metric])
        assert test.diff > 0
        assert test.p < 0.01
        assert test.n_clusters == 300


def test_small_and_missing_classes_are_said() -> None:
    data = multilabel_data()
    labels = data.splits["train"].labels_NC
    labels[:, 2] = 0
    labels[np.flatnonzero(labels[:, 3] == 1)[6:], 3] = 0
    rows, found = _measure(multilabel_oracle(), data)
    notes = rows.meta["notes"]
    assert "1 classes have fewer than 12 training images and give all they have" in notes
    assert "1 classes have no positive or no negative among 4 shots and score all alike" in notes
    assert (rows["scores@4"][:, :, 2] == 0).all()
    assert found["map11@12"].value < 0.95


def test_too_little_to_learn_from_is_one_clear_line() -> None:
    encoder, data = multilabel_oracle(), multilabel_data()
    with pytest.raises(UserError, match="take two a class or more"):
        _measure(encoder, data, shots=(1,))
    data.splits["train"].labels_NC[:] = 0
    with pytest.raises(UserError, match="no class has both a positive and a negative training image"):
        _measure(encoder, data)
    data = multilabel_data()
    data.splits["test"].labels_NC[:] = 0
    with pytest.raises(UserError, match="no class has a positive image"):
        _measure(encoder, data)


def test_few_images_of_many_dimensions_are_quick_and_equal_sklearn() -> None:
    """5 shots of a ResNet's 2,048 features: in their own small space, not by factors of 2,048."""
    rng = np.random.default_rng(0)
    labels = some_labels(80, 5, difficult=0.05)
    features = rng.standard_normal((80, 2048)).astype(np.float32)
    features[:, :5] += 4 * (labels == 1)
    began = time.process_time()
    fit = LogisticRegressions(features, labels).fit(10.0, tolerance=1e-9)
    assert time.process_time() - began < 2, "the whole factorisation takes longer"
    scaled = features - features.mean(axis=0, dtype=np.float64)
    scaled /= np.sqrt((scaled**2).sum(axis=1).mean())
    for c in range(5):
        known = labels[:, c] >= 0
        oracle = LogisticRegression(C=10.0, tol=1e-9, max_iter=10_000).fit(scaled[known], labels[known, c])
        assert fit.logits(features)[:, c] == pytest.approx(oracle.decision_function(scaled), abs=2e-3)
