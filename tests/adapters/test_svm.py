from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from tests.adapters.fakes import FakeData
from tests.adapters.multilabel_fakes import multilabel_data, multilabel_oracle
from vlbench.adapters.svm import ADAPTER, fit_svm
from vlbench.core.errors import UserError


def _sorted_trainval(data: FakeData, encoder) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length features and labels of train and val, in the order of the images' digests."""
    parts = [data.split(name) for name in ("train", "val")]
    features = [encoder.images(part) for part in parts]
    order = np.argsort([image for part in features for image in part.digests])
    pooled = np.concatenate([part.pooled_ND for part in features]).astype(np.float64)
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return unit[order], np.concatenate([part.labels_NC for part in parts])[order]


def test_number_is_that_of_the_protocol_written_with_sklearn() -> None:
    data, encoder = multilabel_data(difficult=0.1), multilabel_oracle(noise=0.8)
    train, labels = _sorted_trainval(data, encoder)
    test = encoder.images(data.split("test")).pooled_ND.astype(np.float64)
    test, test_labels = test / np.linalg.norm(test, axis=1, keepdims=True), data.split("test").labels_NC
    expected, costs = [], []
    for c in range(labels.shape[1]):
        target = np.where(labels[:, c] == 1, 1, -1)  # difficult images are negatives where it learns
        best = (-1.0, None, None)
        for cost in (0.01, 0.1, 1.0, 10.0):
            machine = LinearSVC(
                C=cost, class_weight={1: 2, -1: 1}, loss="squared_hinge", max_iter=2000, dual=True, random_state=0
            )
            quality = cross_val_score(machine, train, target, cv=3, scoring="average_precision").mean()
            if quality > best[0]:
                best = (quality, cost, machine.fit(train, target))
        judged = test_labels[:, c] != -1  # and do not exist where it is tested
        expected.append(average_precision_score(test_labels[judged, c], best[2].decision_function(test[judged])))
        costs.append(best[1])
    rows = ADAPTER.predict(encoder, data, ADAPTER.Config())
    assert rows.meta["chosen"]["C"] == costs
    assert rows.meta["train_images"] == 280
    assert ADAPTER.score(rows, ADAPTER.Config())["map"].value == pytest.approx(np.mean(expected), abs=1e-6)
    assert 0.4 < np.mean(expected) < 0.95


def test_length_of_features_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    data, encoder = multilabel_data(), multilabel_oracle(noise=0.8)
    before = ADAPTER.predict(encoder, data, ADAPTER.Config())
    plain = encoder.pooled
    encoder.pooled = lambda image: plain(image) * rng.uniform(0.1, 10)
    after = ADAPTER.predict(encoder, data, ADAPTER.Config())
    assert after["scores"] == pytest.approx(before["scores"], abs=1e-3)


def test_order_of_images_does_not_matter() -> None:
    data, encoder = multilabel_data(), multilabel_oracle(noise=0.8)
    before = ADAPTER.score(ADAPTER.predict(encoder, data, ADAPTER.Config()), ADAPTER.Config())
    rng = np.random.default_rng(1)
    other = FakeData({name: part.reordered(rng.permutation(len(part))) for name, part in data.splits.items()})
    after = ADAPTER.score(ADAPTER.predict(encoder, other, ADAPTER.Config()), ADAPTER.Config())
    assert after["map"].value == pytest.approx(before["map"].value, abs=1e-9)


def test_the_reported_split_chooses_nothing() -> None:
    data, encoder = multilabel_data(), multilabel_oracle(noise=0.8)
    before = ADAPTER.predict(encoder, data, ADAPTER.Config())
    data.splits["test"].labels_NC = 1 - data.splits["test"].labels_NC
    after = ADAPTER.predict(encoder, data, ADAPTER.Config())
    assert after.meta["chosen"] == before.meta["chosen"]
    assert (after["scores"] == before["scores"]).all()


def test_class_with_too_few_positives_scores_alike_and_is_said() -> None:
    data = multilabel_data(val=0)
    data.splits["train"].labels_NC[:, 3] = 0
    data.splits["train"].labels_NC[:2, 3] = 1
    rows = ADAPTER.predict(multilabel_oracle(), data, ADAPTER.Config())
    assert (rows["scores"][:, 3] == 0).all()
    assert rows.meta["chosen"]["C"][3] is None
    assert "1 classes lack 3 images on one side and score all alike, first 'dog'" in rows.meta["notes"]
    data.splits["train"].labels_NC[:] = 0
    with pytest.raises(UserError, match="no class has 3 positive and 3 negative images"):
        ADAPTER.predict(multilabel_oracle(), data, ADAPTER.Config())


def test_of_equal_costs_the_first_is_taken() -> None:
    features, positive = np.eye(12).repeat(4, axis=0), np.arange(48) % 2 == 0
    features[positive, 0] += 5
    assert fit_svm(features, positive, ADAPTER.Config())[0] == 0.01
