from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource, label_in, labelled, noise_of
from vlbench.adapters.common.softmax_regression import SoftmaxRegression
from vlbench.adapters.fewshot import ADAPTER, choose_c, draw_shots
from vlbench.core.config import parse
from vlbench.core.errors import UserError
from vlbench.stats.paired import compare_outcomes
from vlbench.store.examples import rows_from_parquet, rows_to_parquet

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
WIDTH = 10


def _encoder(signal: float = 0.8) -> FakeEncoder:
    return FakeEncoder(lambda image: signal * noise_of(CLASSES[label_in(image)], WIDTH) + noise_of(image, WIDTH))


def _data(*, train: int = 240, test: int = 120) -> FakeData:
    sizes = {"train": train, "test": test}
    return FakeData({name: labelled(name, np.arange(n) % 6, CLASSES) for name, n in sizes.items()})


def _config(**settings):
    return ADAPTER.Config(**{"shots": (4, 12), "seeds": (0, 1), "c_count": 5, **settings})


def test_draw_is_by_content_nested_and_different_by_seed() -> None:
    rng = np.random.default_rng(0)
    digests, labels = [f"{i:032x}" for i in range(90)], np.arange(90) % 3
    draw = draw_shots(digests, labels, 10, seed=0, folds=5)
    assert np.bincount(labels[draw.rows]).tolist() == [10, 10, 10]
    assert (np.bincount(draw.folds) == 6).all()
    order = rng.permutation(90)
    moved = draw_shots([digests[i] for i in order], labels[order], 10, seed=0, folds=5)
    assert (order[moved.rows] == draw.rows).all(), "the order of files does not matter"
    assert (moved.folds == draw.folds).all()
    more = draw_shots(digests, labels, 20, seed=0, folds=5)
    assert set(draw.rows) < set(more.rows)
    other = draw_shots(digests, labels, 10, seed=1, folds=5)
    assert 0 < len(set(draw.rows) & set(other.rows)) < 30
    assert not set(draw.rows) <= set(range(30)), "never the first ones of the list"


def test_copies_of_an_image_are_drawn_once() -> None:
    draw = draw_shots(["a", "a", "a", "b"], np.array([0, 0, 0, 0]), 3, seed=0, folds=2)
    assert sorted(draw.rows.tolist()) == [0, 3]


def test_metrics_are_means_over_seeds_of_fits_on_the_shots() -> None:
    encoder, data = _encoder(), _data()
    rows = ADAPTER.predict(encoder, data, _config())
    found = ADAPTER.score(rows, _config())
    train, test = (encoder.images(data.split(name)) for name in ("train", "test"))
    labels, test_labels = (np.array(data.split(name).labels()) for name in ("train", "test"))
    for shots in (4, 12):
        right = []
        for seed, record in enumerate(rows.meta["chosen"][f"@{shots}"]):
            draw = draw_shots(train.digests, labels, shots, seed=seed, folds=5)
            fit = SoftmaxRegression(train.pooled_ND[draw.rows], labels[draw.rows], 6).fit(record["C"])
            right.append((fit.logits(test.pooled_ND).argmax(axis=1) == test_labels).mean())
            assert record["images"] == 6 * shots
            assert record["acc1"] == pytest.approx(right[-1], abs=0.02)
        assert found[f"acc1@{shots}"].value == pytest.approx(np.mean(right), abs=0.01)
    assert found["acc1@12"].value > found["acc1@4"].value > 0.25
    assert set(found) == set(rows.meta["chance"])
    assert found["acc1@4"].n == found["acc1@4"].n_clusters == 120
    assert ADAPTER.score(rows_from_parquet(rows_to_parquet(rows)), _config()) == found


def test_nothing_is_chosen_on_test_or_val() -> None:
    encoder, data = _encoder(), _data()
    before = ADAPTER.predict(encoder, data, _config())
    data.splits["test"]._labels = [(label + 1) % 6 for label in data.splits["test"]._labels]
    data.splits["val"] = labelled("val", np.arange(60) % 6, CLASSES)
    after = ADAPTER.predict(encoder, data, _config())
    for shots in (4, 12):
        chosen = [[record["C"] for record in rows.meta["chosen"][f"@{shots}"]] for rows in (before, after)]
        assert chosen[0] == chosen[1]


def test_order_of_images_and_classes_does_not_matter() -> None:
    encoder, data = _encoder(), _data()
    before = ADAPTER.score(ADAPTER.predict(encoder, data, _config()), _config())
    rng, order, moved = np.random.default_rng(0), [4, 2, 0, 5, 1, 3], {}
    for name, part in data.splits.items():
        rows = rng.permutation(len(part))
        moved[name] = FakeSource(
            [part.images[i] for i in rows],
            split=name,
            labels=[order.index(part._labels[i]) for i in rows],
            classes=[CLASSES[c] for c in order],
            ids=[part._ids[i] for i in rows],
        )
    after = ADAPTER.score(ADAPTER.predict(encoder, FakeData(moved), _config()), _config())
    for metric, expected in before.items():
        assert after[metric].value == pytest.approx(expected.value, abs=0.01)


def test_cross_validation_is_the_brute_force_one() -> None:
    rng, config = np.random.default_rng(0), _config(c_low=1e-2, c_high=1e4, search_tolerance=1e-7)
    labels, folds = np.repeat(np.arange(4), 10), np.tile(np.arange(5), 8)
    features = rng.standard_normal((4, 8))[labels] + 1.5 * rng.standard_normal((40, 8))
    found = choose_c(features, labels, folds, config=config, device="cpu")
    best = []
    for c in np.logspace(-2, 4, 5):
        right = 0
        for fold in range(5):
            learn = folds != fold
            fit = SoftmaxRegression(features[learn], labels[learn], 4).fit(float(c))
            right += (fit.logits(features[~learn]).argmax(axis=1) == labels[~learn]).sum()
        best.append(right)
    assert best[int(np.argmin(abs(np.logspace(-2, 4, 5) - found)))] == max(best)


def test_spread_over_seeds_and_small_classes_are_said() -> None:
    data = _data()
    part = data.splits["train"]
    keep = [i for i, label in enumerate(part._labels) if label not in (2, 3) or (label == 3 and i < 50)]
    part.images, part._ids = [part.images[i] for i in keep], [part._ids[i] for i in keep]
    part._labels = [part._labels[i] for i in keep]
    rows = ADAPTER.predict(_encoder(), data, _config())
    notes = rows.meta["notes"]
    assert "1 classes have fewer than 12 training images and give all they have" in notes
    assert "1 classes have no training image and are never predicted" in notes
    assert sum("of the 2 draws" in note for note in notes) == 2
    assert (rows["rank@12"][rows["label"] == 2] == 6).all()


def test_fits_that_did_not_converge_are_said() -> None:
    rows = ADAPTER.predict(_encoder(), _data(), _config(max_iterations=1))
    for shots in (4, 12):
        assert f"2 fits to {shots} shots stopped at 1 iterations" in rows.meta["notes"]
    assert not any("stopped at" in note for note in ADAPTER.predict(_encoder(), _data(), _config()).meta["notes"])


def test_models_are_compared_on_the_same_shots() -> None:
    good, bad = (ADAPTER.outcomes(ADAPTER.predict(_encoder(s), _data(), _config()), _config()) for s in (1.6, 0.5))
    for metric in good:
        assert compare_outcomes(good[metric], bad[metric]).p < 0.01


def test_two_classes_have_a_roc_auc() -> None:
    two = FakeData({name: labelled(name, np.arange(100) % 2, CLASSES[:2]) for name in ("train", "test")})
    rows = ADAPTER.predict(_encoder(), two, _config())
    found = ADAPTER.score(rows_from_parquet(rows_to_parquet(rows)), _config())
    expected = np.mean([roc_auc_score(rows["label"], rows["score@12"][:, seed]) for seed in (0, 1)])
    assert found["roc_auc@12"].value == pytest.approx(expected, abs=1e-9)
    assert found["roc_auc@12"].method.startswith("jackknife pseudo-values")
    assert set(found) == set(rows.meta["chance"])


def test_too_little_to_learn_from_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="take two shots or more"):
        ADAPTER.predict(_encoder(), _data(), _config(shots=(1,)))
    with pytest.raises(UserError, match=r"task x: shots\.1: Input should be greater than 0 \(got 0\)"):
        parse(ADAPTER.Config, {"shots": [5, 0]}, where="task x")
    data = FakeData({name: labelled(name, [0] * 5, CLASSES) for name in ("train", "test")})
    with pytest.raises(UserError, match="one class only"):
        ADAPTER.predict(_encoder(), data, _config())
