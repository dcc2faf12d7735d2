from __future__ import annotations

import numpy as np
import pytest

from tests.adapters.fakes import FakeData, FakeEncoder, label_in, labelled, noise_of
from vlbench.adapters.common.softmax_regression import SoftmaxRegression
from vlbench.adapters.linear import ADAPTER, hold_out, search_c
from vlbench.core.config import parse
from vlbench.core.errors import UserError

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")


def _encoder(signal: float = 1.0) -> FakeEncoder:
    return FakeEncoder(lambda image: signal * noise_of(str(label_in(image)), 10) + noise_of(image, 10))


def _data(*, val: int = 60, train: int = 180, test: int = 120) -> FakeData:
    sizes = {"train": train, "val": val, "test": test}
    return FakeData({name: labelled(name, np.arange(n) % 6, CLASSES) for name, n in sizes.items() if n})


def test_predict_refits_on_train_and_val_with_the_c_of_val() -> None:
    encoder, data = _encoder(), _data()
    rows = ADAPTER.predict(encoder, data, ADAPTER.Config())
    features = {name: encoder.images(data.split(name)).pooled_ND for name in ("train", "val", "test")}
    labels = {name: np.array(data.split(name).labels()) for name in ("train", "val", "test")}
    both = np.concatenate([features["train"], features["val"]])
    fit = SoftmaxRegression(both, np.concatenate([labels["train"], labels["val"]]), 6).fit(rows.meta["chosen"]["C"])
    logits = fit.logits(features["test"])
    assert (rows["pred"] == logits.argmax(axis=1)).mean() > 0.99
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = (p / p.sum(axis=1, keepdims=True))[np.arange(120), labels["test"]]
    assert rows["p"] == pytest.approx(p, abs=2e-3)
    assert 0.3 < ADAPTER.score(rows, ADAPTER.Config())["acc1"].value < 0.95


def test_the_reported_split_chooses_nothing() -> None:
    """Other test labels and images leave C and the classifier as they were."""
    encoder, data = _encoder(0.6), _data()
    before = ADAPTER.predict(encoder, data, ADAPTER.Config())
    data.splits["test"]._labels = [(label + 1) % 6 for label in data.splits["test"]._labels]
    after = ADAPTER.predict(encoder, data, ADAPTER.Config())
    assert after.meta["chosen"] == before.meta["chosen"]
    assert (after["pred"] == before["pred"]).all()
    assert not (after["correct"] & before["correct"]).any()


def test_without_val_a_fifth_of_train_chooses() -> None:
    rows = ADAPTER.predict(_encoder(), _data(val=0), ADAPTER.Config())
    assert rows.meta["train_images"] == 180
    assert rows.meta["fit"]["searched"] > 7
    assert ADAPTER.score(rows, ADAPTER.Config())["acc1"].value > 0.3


def test_hold_out_goes_by_content_and_class() -> None:
    digests = [f"{i:032x}" for i in np.random.default_rng(0).permutation(100)]
    digests[10], digests[11] = digests[0], digests[0]
    labels = np.arange(100) % 2
    labels[[10, 11]] = labels[0]
    held = hold_out(digests, labels, 0.2)
    assert 8 <= held[labels == 0].sum() <= 13
    assert held[0] == held[10] == held[11], "copies stay on one side"
    order = np.random.default_rng(1).permutation(100)
    assert (hold_out([digests[i] for i in order], labels[order], 0.2) == held[order]).all()
    assert not hold_out(["a" * 32], np.array([0]), 0.2).any(), "the only image of a class is learnt from"


def test_search_finds_the_best_of_the_whole_grid_where_it_is_smooth() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    features = rng.standard_normal((4, 30))[labels] * 0.7 + rng.standard_normal((400, 30)) * 2
    train, val = slice(0, 200), slice(200, 400)
    problem = SoftmaxRegression(features[train], labels[train], 4)
    found = search_c(problem, features[val], labels[val], ADAPTER.Config())
    everywhere = [
        (problem.fit(c).logits(features[val]).argmax(1) == labels[val]).mean() for c in np.logspace(-6, 6, 25)
    ]
    assert found["val_accuracy"] >= max(everywhere) - 0.02
    assert found["fits"] <= 15
    assert not found["edge"]


def test_search_of_the_whole_grid_takes_the_best_of_all_its_values() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    features = rng.standard_normal((4, 30))[labels] * 0.7 + rng.standard_normal((400, 30)) * 2
    train, val = slice(0, 200), slice(200, 400)
    problem = SoftmaxRegression(features[train], labels[train], 4)
    values = (10.0, 1e-4, 1e-2, 1.0, 1e3)
    found = search_c(problem, features[val], labels[val], ADAPTER.Config(search="grid", c_grid=values))
    accuracy = {
        c: (problem.fit(c, tolerance=1e-7).logits(features[val]).argmax(1) == labels[val]).mean() for c in values
    }
    assert found["val_accuracy"] == max(accuracy.values())
    assert accuracy[found["c"]] == found["val_accuracy"]
    assert found["fits"] == 5
    steps = ADAPTER.Config(search="grid", c_low=1e-3, c_high=1e3, c_steps=6)
    assert search_c(problem, features[val], labels[val], steps)["fits"] == 7


def test_search_of_the_whole_grid_keeps_to_the_settings_of_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, path = [], SoftmaxRegression.path

    def note(self, cs, **options):
        asked.append(options)
        return path(self, cs, **options)

    monkeypatch.setattr(SoftmaxRegression, "path", note)
    ADAPTER.predict(_encoder(), _data(), ADAPTER.Config(search="grid", c_grid=(0.1, 1.0, 10.0)))
    assert asked[0] == {"tolerance": pytest.approx(1e-7), "max_iterations": 1000}
    settings = {"search_tolerance": 1e-6, "max_iterations": 1}
    rows = ADAPTER.predict(_encoder(), _data(), ADAPTER.Config(search="grid", c_grid=(0.1, 1.0, 10.0), **settings))
    assert asked[1] == {"tolerance": pytest.approx(1e-11), "max_iterations": 1}
    assert "3 of 3 fits of the path did not converge" in rows.meta["notes"]


def test_a_grid_that_nothing_reads_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="task x: c_grid is read by `search: grid` alone"):
        parse(ADAPTER.Config, {"c_grid": [0.1, 1.0]}, where="task x")


def test_the_default_search_is_recorded_as_before_there_was_another() -> None:
    coarse, grid = ADAPTER.Config().model_dump(mode="json"), ADAPTER.Config(search="grid").model_dump(mode="json")
    assert {"search", "c_grid"} & coarse.keys() == set()
    assert grid["search"] == "grid"
    assert ADAPTER.Config(**coarse) == ADAPTER.Config()
    assert ADAPTER.Config(**grid) == ADAPTER.Config(search="grid")


def test_grid_and_coarse_search_report_the_same_classifier_where_they_choose_the_same() -> None:
    coarse = ADAPTER.predict(_encoder(), _data(), ADAPTER.Config())
    c = coarse.meta["chosen"]["C"]
    grid = ADAPTER.predict(_encoder(), _data(), ADAPTER.Config(search="grid", c_grid=(c,)))
    assert grid.meta["chosen"]["C"] == c
    assert grid.meta["fit"]["searched"] == 1
    assert not grid.meta["chosen"]["at_grid_edge"], "a single value has no edge"
    assert (grid["pred"] == coarse["pred"]).all()
    assert grid["p"] == pytest.approx(coarse["p"], abs=1e-12)


def test_best_c_at_the_edge_is_noted() -> None:
    # Two values make a grid of nothing but edges.
    rows = ADAPTER.predict(_encoder(), _data(), ADAPTER.Config(c_low=1e-7, c_high=1e-6, c_steps=2, c_stride=1))
    assert rows.meta["chosen"]["at_grid_edge"] is True
    assert any("edge of the grid" in note for note in rows.meta["notes"])
    rows = ADAPTER.predict(_encoder(), _data(), ADAPTER.Config(c=1e-3))
    assert rows.meta["chosen"]["C"] == 1e-3
    assert rows.meta["fit"]["searched"] == 0


def test_class_without_training_images_is_never_predicted_and_said() -> None:
    data = _data()
    for name in ("train", "val"):
        source = data.splits[name]
        keep = [i for i, label in enumerate(source._labels) if label != 2]
        source.images, source._ids = [source.images[i] for i in keep], [source._ids[i] for i in keep]
        source._labels = [source._labels[i] for i in keep]
    rows = ADAPTER.predict(_encoder(), data, ADAPTER.Config())
    assert not (rows["pred"] == 2).any()
    assert (rows["rank"][rows["label"] == 2] == 6).all()
    assert (rows["p"][rows["label"] == 2] == 0).all()
    assert any("1 classes have no training image" in note for note in rows.meta["notes"])


def test_one_class_is_one_clear_line() -> None:
    data = FakeData({name: labelled(name, [0] * 5, CLASSES) for name in ("train", "test")})
    with pytest.raises(UserError, match="one class only"):
        ADAPTER.predict(_encoder(), data, ADAPTER.Config())


def test_predict_is_the_same_twice() -> None:
    first, second = (ADAPTER.predict(_encoder(), _data(val=0), ADAPTER.Config()) for _ in range(2))
    assert (first["pred"] == second["pred"]).all()
    assert (first["p"] == second["p"]).all()
    assert first.meta == second.meta
