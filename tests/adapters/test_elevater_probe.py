from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource, label_in, labelled, noise_of
from tests.adapters.multilabel_fakes import multilabel_data, multilabel_oracle
from vlbench.adapters.common.minibatch import Problem, Training, random_head, train_heads
from vlbench.adapters.common.prompts import class_embeddings
from vlbench.adapters.elevater_probe import ADAPTER, hold_out_first
from vlbench.core.errors import UserError
from vlbench.stats.paired import compare_outcomes
from vlbench.store.examples import rows_from_parquet, rows_to_parquet

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
WIDTH = 10


def _encoder(signal: float = 0.8) -> FakeEncoder:
    return FakeEncoder(
        lambda image: signal * noise_of(CLASSES[label_in(image)], WIDTH) + noise_of(image, WIDTH),
        text=lambda text: noise_of(next(c for c in CLASSES if c in text), WIDTH),
    )


def _data(classes: tuple[str, ...] = CLASSES, *, train: int = 120, test: int = 120) -> FakeData:
    sizes = {"train": train, "test": test}
    return FakeData({name: labelled(name, np.arange(n) % len(classes), classes) for name, n in sizes.items()})


def _config(**settings):
    return ADAPTER.Config(**{"epochs": 12, "search_epochs": 3, **settings})


def _measure(encoder: FakeEncoder, data: FakeData, **settings):
    rows = ADAPTER.predict(encoder, data, _config(**settings))
    return rows, ADAPTER.score(rows, _config(**settings))


def test_last_and_best_epoch_are_those_of_the_chosen_setting() -> None:
    encoder, data = _encoder(), _data()
    rows, found = _measure(encoder, data)
    train, test = (encoder.images(data.split(name)) for name in ("train", "test"))
    labels = {name: np.array(data.split(name).labels()) for name in ("train", "test")}
    chosen = rows.meta["chosen"]
    problem = Problem.of(train.pooled_ND, labels["train"], train.digests, device="cpu")
    training = Training("sgd", "constant", True, False, 64, 0)
    right = []
    for epoch in range(1, 13):
        heads = train_heads(
            problem,
            random_head(CLASSES, WIDTH, seed=0),
            [(chosen["lr"], chosen["weight_decay"])],
            epochs=epoch,
            training=training,
        )
        logits = heads.logits(problem.features_ND.new_tensor(test.pooled_ND), 0).numpy()
        right.append((logits.argmax(axis=1) == labels["test"]).mean())
    assert found["acc1"].value == pytest.approx(right[-1])
    assert found["acc1_best_on_test"].value == pytest.approx(max(right))
    assert found["best_on_test_gap"].value == pytest.approx(max(right) - right[-1])
    assert rows.meta["best_epoch_on_test"] == 1 + int(np.argmax(right))
    assert 0.3 < right[-1] < 0.98


def test_rows_survive_the_store_and_give_the_same_numbers() -> None:
    rows, found = _measure(_encoder(), _data())
    again = ADAPTER.score(rows_from_parquet(rows_to_parquet(rows)), _config())
    assert again == found
    assert set(found) == set(rows.meta["chance"])
    assert set(found) == {"acc1", "acc5", "mean_per_class_recall", "acc1_best_on_test", "best_on_test_gap"}
    assert found["best_on_test_gap"].value >= 0


def test_ninety_fits_at_most_are_searched_on_train_alone() -> None:
    encoder, data = _encoder(), _data()
    before = ADAPTER.predict(encoder, data, _config())
    assert before.meta["fit"]["searched"] <= 90
    data.splits["test"]._labels = [(label + 1) % 6 for label in data.splits["test"]._labels]
    after = ADAPTER.predict(encoder, data, _config())
    assert after.meta["chosen"] == before.meta["chosen"]
    assert (after["pred"] == before["pred"]).all(), "the last epoch knows nothing of the test labels"


def test_official_val_split_is_left_alone() -> None:
    data = _data()
    before = ADAPTER.predict(_encoder(), data, _config())
    data.splits["val"] = labelled("val", np.arange(60) % 6, CLASSES)
    after = ADAPTER.predict(_encoder(), data, _config())
    assert (after["pred"] == before["pred"]).all()


def test_order_of_images_and_classes_does_not_matter() -> None:
    encoder, data = _encoder(), _data()
    before, found = _measure(encoder, data)
    rng, moved = np.random.default_rng(0), {}
    order = [4, 2, 0, 5, 1, 3]
    for name, part in data.splits.items():
        rows = rng.permutation(len(part))
        images, ids = [part.images[i] for i in rows], [part._ids[i] for i in rows]
        labels = [order.index(part._labels[i]) for i in rows]
        moved[name] = FakeSource(images, split=name, labels=labels, classes=[CLASSES[c] for c in order], ids=ids)
    after, found_after = _measure(encoder, FakeData(moved))
    for key in ("lr", "weight_decay"):
        assert after.meta["chosen"][key] == before.meta["chosen"][key]
    named = {name: CLASSES[pred] for name, pred in zip(before["id"], before["pred"])}
    same = [named[name] == CLASSES[order[pred]] for name, pred in zip(after["id"], after["pred"])]
    assert np.mean(same) > 0.98
    assert found_after["acc1"].value == pytest.approx(found["acc1"].value, abs=0.02)


def test_first_fifth_of_every_class_goes_by_content() -> None:
    digests = [f"{i:03d}" for i in np.random.default_rng(0).permutation(41)]
    labels = np.array([0] * 21 + [1] * 19 + [2])
    held = hold_out_first(digests, labels, 0.2)
    assert [held[labels == c].sum() for c in range(3)] == [5, 4, 0], "ceil(4.2), ceil(3.8), and never all of a class"
    first = np.sort(np.array(digests)[labels == 0])[:5]
    assert set(np.array(digests)[held & (labels == 0)]) == set(first)


def test_language_head_starts_at_the_class_embeddings() -> None:
    encoder, data = _encoder(), _data(test=300)
    data.templates = ("a {}.", "the {}.")
    # One epoch at a rate of nothing: what is left is the start, on features that BatchNorm has scaled.
    still = {"lr_log_low": -30, "lr_log_high": -30, "lr_count": 1, "epochs": 1, "search_epochs": 1}
    found = _measure(encoder, data, head="language", **still)[1]
    class_CE = class_embeddings(encoder, list(CLASSES), list(data.templates))
    assert class_CE.shape == (6, WIDTH)
    assert found["acc1"].value > 0.4 > _measure(encoder, data, **still)[1]["acc1"].value
    assert encoder.text_calls, "the text tower was asked"


def test_language_head_without_a_joint_space_is_one_clear_line() -> None:
    encoder = _encoder()
    images = encoder.images
    encoder.images = lambda source: type(images(source))(**{**vars(images(source)), "embed_NE": None})
    with pytest.raises(UserError, match="needs a model with a text tower; use 'random'"):
        _measure(encoder, _data(), head="language")


def test_metric_chooses_and_must_fit_the_data() -> None:
    _, found = _measure(_encoder(), _data(), metric="mean_per_class_recall")
    assert "mean_per_class_recall_best_on_test" in found
    with pytest.raises(UserError, match="'map11' is not one of data with one label"):
        _measure(_encoder(), _data(), metric="map11")
    with pytest.raises(UserError, match="'acc1' is not one of data with many labels"):
        _measure(multilabel_oracle(), multilabel_data(), metric="acc1")
    with pytest.raises(UserError, match="needs two classes"):
        _measure(_encoder(), _data(), metric="roc_auc")


def test_two_classes_are_measured_by_roc_auc() -> None:
    rows, found = _measure(_encoder(), _data(("ant", "bee")), metric="roc_auc")
    assert rows.meta["selected_by"] == "roc_auc"
    assert found["roc_auc_best_on_test"].value >= found["roc_auc"].value > 0.55
    assert set(found) == set(rows.meta["chance"])


def test_several_labels_are_ranked_by_logits() -> None:
    encoder, data = multilabel_oracle(noise=0.8), multilabel_data(difficult=0.1)
    rows, found = _measure(encoder, data)
    labels, scores = rows["labels"], rows["scores"]
    judged = [(labels[:, c] >= 0) for c in range(5)]
    expected = np.mean([average_precision_score(labels[k, c], scores[k, c]) for c, k in enumerate(judged)])
    assert found["map"].value == pytest.approx(expected, abs=1e-9)
    assert set(found) == {"map11", "map", "map11_best_on_test", "best_on_test_gap"} == set(rows.meta["chance"])
    gap = found["map11_best_on_test"].value - found["map11"].value
    assert found["best_on_test_gap"].value == pytest.approx(gap, abs=1e-9)
    assert gap >= 0
    assert found["map11"].value > 0.5


def test_models_are_compared_on_every_metric() -> None:
    good, bad = (ADAPTER.outcomes(_measure(_encoder(s), _data())[0], _config()) for s in (1.5, 0.4))
    for metric in good:
        test = compare_outcomes(good[metric], bad[metric])
        assert test.n == 120
        if metric in ("acc1", "mean_per_class_recall", "acc1_best_on_test"):
            assert test.p < 0.01


def test_settings_that_diverge_are_counted_and_never_chosen() -> None:
    rows, found = _measure(_encoder(), _data(), search_epochs=40)
    assert rows.meta["fit"]["diverged"] > 0
    assert found["acc1"].value > 0.3
    wild = {"wd_log_low": 6, "wd_log_high": 6, "wd_count": 1, "lr_log_low": 30, "lr_log_high": 30, "lr_count": 1}
    with pytest.raises(UserError, match="every fit of the search diverged"):
        _measure(_encoder(), _data(), **wild)
