from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsRegressor

from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource, noise_of
from tests.adapters.multilabel_fakes import (
    CLASSES,
    WIDTH,
    MultilabelSource,
    labels_in,
    multilabel_data,
    multilabel_oracle,
    some_labels,
)
from vlbench.adapters.common.classification import unit
from vlbench.adapters.common.logistic_regression import LogisticRegressions
from vlbench.adapters.common.multilabel import held_out, multilabel_outcomes, multilabels_of
from vlbench.adapters.knn_multilabel import ADAPTER as KNN
from vlbench.adapters.knn_multilabel import vote_shares
from vlbench.adapters.linear_multilabel import ADAPTER as LINEAR
from vlbench.adapters.zeroshot_multilabel import ADAPTER as ZEROSHOT
from vlbench.core.errors import UserError
from vlbench.stats.intervals import mean_of
from vlbench.stats.paired import compare_outcomes
from vlbench.store.examples import rows_from_parquet, rows_to_parquet

ADAPTERS = [ZEROSHOT, LINEAR, KNN]


def _measure(adapter, encoder: FakeEncoder, data: FakeData, **settings):
    config = adapter.Config(**settings)
    rows = adapter.predict(encoder, data, config)
    return rows, adapter.score(rows, config)


def _map_of(labels_NC: np.ndarray, scores_NC: np.ndarray) -> float:
    judged = [labels_NC[:, c] >= 0 for c in range(labels_NC.shape[1])]
    pairs = [(labels_NC[keep, c], scores_NC[keep, c]) for c, keep in enumerate(judged)]
    return float(np.mean([average_precision_score(y, s) for y, s in pairs]))


# ------------------------------------------------------------------------------------------------- what they share


def test_labels_are_read_and_checked() -> None:
    labels = some_labels(6, 0, difficult=0.2)
    assert (multilabels_of(MultilabelSource(labels, split="test")) == labels).all()
    with pytest.raises(UserError, match="has no lists of labels"):
        multilabels_of(FakeSource([b"a"], split="test"))
    source = MultilabelSource(labels, split="test")
    source.labels_NC = labels[:, :3]
    with pytest.raises(UserError, match="test/0: its labels are not 5 numbers of -1, 0 and 1"):
        multilabels_of(source)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_metrics_are_those_of_the_stored_rows(adapter) -> None:
    rows, found = _measure(adapter, multilabel_oracle(noise=1.0), multilabel_data(difficult=0.1))
    again = rows_from_parquet(rows_to_parquet(rows))
    assert again["labels"].dtype == np.int8
    assert again["scores"].dtype == np.float32
    assert again["scores"].shape == (200, 5)
    assert found["map"].value == pytest.approx(_map_of(again["labels"], again["scores"]), abs=1e-9)
    assert found == adapter.score(again, adapter.Config())
    assert set(found) == {"map11", "map"} == set(rows.meta["chance"])
    assert 0.35 < found["map"].value < 0.95
    assert found["map11"].method.startswith("jackknife pseudo-values")


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_order_of_images_and_classes_does_not_matter(adapter) -> None:
    data, encoder = multilabel_data(difficult=0.1, val=0), multilabel_oracle(noise=1.0)
    before = _measure(adapter, encoder, data)[1]
    rng = np.random.default_rng(0)
    shuffled = FakeData({name: part.reordered(rng.permutation(len(part))) for name, part in data.splits.items()})
    after = _measure(adapter, encoder, shuffled)[1]
    # Bytes still hold the labels in the old order of the classes: features are the same, labels and names move along.
    order = [3, 0, 4, 2, 1]
    for part in data.splits.values():
        part.labels_NC, part.classes = part.labels_NC[:, order], tuple(CLASSES[c] for c in order)
    data.classnames = tuple(CLASSES[c] for c in order)
    moved = _measure(adapter, encoder, data)[1]
    for metric, expected in before.items():
        for found in (after[metric], moved[metric]):
            assert (found.value, found.lo) == pytest.approx((expected.value, expected.lo), abs=2e-3)


def test_class_without_positives_is_left_out_and_said() -> None:
    data = multilabel_data()
    data.splits["test"].labels_NC[:, 1] = 0
    rows, found = _measure(ZEROSHOT, multilabel_oracle(), data)
    assert any(
        "1 classes have no positive image and are left out of the mean, first 'bee'" in n for n in rows.meta["notes"]
    )
    assert found["map"].value == 1.0
    data.splits["test"].labels_NC[:] = 0
    with pytest.raises(UserError, match="no class has a positive"):
        _measure(ZEROSHOT, multilabel_oracle(), data)


def test_models_are_compared_on_the_same_images() -> None:
    data = multilabel_data(test=300)
    good, bad = (
        multilabel_outcomes(_measure(ZEROSHOT, multilabel_oracle(noise=noise), data)[0])["map11"]
        for noise in (0.4, 1.2)
    )
    test = compare_outcomes(good, bad)
    assert test.diff == pytest.approx(mean_of(good) - mean_of(bad))
    assert test.p < 0.01
    assert test.n_clusters == 300


def test_held_out_goes_by_content() -> None:
    digests = [f"{i:03d}" for i in range(50)] + ["000"]
    held = held_out(digests, 0.2)
    assert held.sum() == 11
    assert held[0]
    assert held[50]
    assert not held_out(["a"], 0.2).any()


# ------------------------------------------------------------------------------------------------------- zero-shot


def test_zeroshot_scores_are_cosines_or_elevaters_softmax() -> None:
    data, plain = multilabel_data(), multilabel_oracle(noise=1.0)
    # Cosines as close together as CLIP's, so that the softmax keeps its digits.
    encoder = FakeEncoder(lambda image: plain.pooled(image) + 15 * np.eye(WIDTH)[-1], text=plain.text)
    images = encoder.images(data.split("test")).embed_NE
    cosine = unit(images) @ np.eye(WIDTH)[: len(CLASSES)].T
    rows, found = _measure(ZEROSHOT, encoder, data)
    assert rows["scores"] == pytest.approx(cosine, abs=1e-6)
    p = np.exp(100 * cosine - (100 * cosine).max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    softmax = _measure(ZEROSHOT, encoder, data, softmax=True)[1]
    assert softmax["map"].value == pytest.approx(_map_of(data.split("test").labels_NC, p), abs=1e-3)
    assert abs(softmax["map"].value - found["map"].value) > 0.01, "the two are not the same protocol"


def test_zeroshot_softmax_of_one_class_is_one_clear_line() -> None:
    labels = np.array([[1], [0], [1], [0]], dtype=np.int8)
    data = FakeData({"test": MultilabelSource(labels, split="test", classes=CLASSES[:1])})
    assert _measure(ZEROSHOT, multilabel_oracle(classes=CLASSES[:1]), data)[1]["map"].value == 1.0
    with pytest.raises(UserError, match="a softmax over one class says nothing"):
        _measure(ZEROSHOT, multilabel_oracle(classes=CLASSES[:1]), data, softmax=True)


def test_zeroshot_without_templates_is_one_clear_line() -> None:
    data = multilabel_data()
    data.templates = ()
    with pytest.raises(UserError, match="no prompt templates"):
        _measure(ZEROSHOT, multilabel_oracle(), data)


# ------------------------------------------------------------------------------------------------------------- kNN


def test_vote_shares_equal_sklearn_on_every_class() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((120, 6)), rng.standard_normal((30, 6))
    labels = some_labels(120, 1)
    shares = vote_shares(test, train, labels_MC=labels, config=KNN.Config(k=10, block_bytes=4 * 120 * 7), device="cpu")
    oracle = KNeighborsRegressor(10, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    assert shares == pytest.approx(oracle.fit(train, labels).predict(test), abs=1e-4)


def test_neighbours_with_unjudged_labels_have_no_vote() -> None:
    train = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    labels = np.array([[1, -1, -1], [-1, 0, -1], [0, 1, 1]])
    shares = vote_shares(train[:1], train, labels_MC=labels, config=KNN.Config(k=2), device="cpu")
    assert shares[0] == pytest.approx([1.0, 0.0, 1.0]), "the third class takes its share among the training images"


# ---------------------------------------------------------------------------------------------------- linear probe


@pytest.mark.parametrize("c", [1e-2, 1.0, 1e3])
def test_logistic_regressions_equal_sklearn_with_unjudged_images_left_out(c: float) -> None:
    rng = np.random.default_rng(0)
    labels = some_labels(150, 2, difficult=0.15)
    features = rng.standard_normal((150, 8)) * np.logspace(-1, 1, 8) + 5
    features[:, :5] += 0.7 * (labels == 1)
    fit = LogisticRegressions(features.astype(np.float32), labels).fit(c, tolerance=1e-9)
    assert fit.converged
    centred = features - features.mean(axis=0)
    scaled = centred / np.sqrt((centred**2).sum(axis=1).mean())
    for k in range(5):
        known = labels[:, k] >= 0
        oracle = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(scaled[known], labels[known, k])
        expected = oracle.decision_function(scaled)
        assert fit.logits(features)[:, k] == pytest.approx(expected, abs=2e-3 * max(1, abs(expected).max()))


def test_linear_refits_on_train_and_val_with_the_c_of_val() -> None:
    encoder, data = multilabel_oracle(noise=1.0), multilabel_data()
    rows, _ = _measure(LINEAR, encoder, data)
    both = [data.split(name) for name in ("train", "val")]
    features = np.concatenate([encoder.images(part).pooled_ND for part in both])
    labels = np.concatenate([part.labels_NC for part in both])
    problem = LogisticRegressions(features, labels)
    fit = problem.fit(rows.meta["chosen"]["C"])
    assert rows["scores"] == pytest.approx(fit.logits(encoder.images(data.split("test")).pooled_ND), abs=2e-3)
    assert rows.meta["fit"]["searched"] <= 15


def test_linear_chooses_nothing_on_the_reported_split() -> None:
    encoder, data = multilabel_oracle(noise=1.0), multilabel_data(val=0)
    before, _ = _measure(LINEAR, encoder, data)
    data.splits["test"].labels_NC = 1 - data.splits["test"].labels_NC
    after, _ = _measure(LINEAR, encoder, data)
    assert before.meta["chosen"] == after.meta["chosen"]
    assert (before["scores"] == after["scores"]).all()


def test_linear_scores_a_class_alike_that_it_cannot_learn() -> None:
    data = multilabel_data(val=0)
    data.splits["train"].labels_NC[:, 2] = 0
    rows, _ = _measure(LINEAR, multilabel_oracle(), data, c=1.0)
    assert (rows["scores"][:, 2] == 0).all()
    assert any("1 classes have no positive or no negative training image" in note for note in rows.meta["notes"])
    data.splits["train"].labels_NC[:] = 0
    with pytest.raises(UserError, match="nothing to learn"):
        _measure(LINEAR, multilabel_oracle(), data, c=1.0)


def test_labels_in_reads_what_the_source_wrote() -> None:
    source = MultilabelSource(some_labels(3, 0), split="test")
    assert (np.stack([labels_in(image) for image in source.images]) == source.labels_NC).all()
    assert noise_of(b"a", 3).shape == (3,)
