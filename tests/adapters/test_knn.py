from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource, label_in, labelled, noise_of
from vlbench.adapters.knn import ADAPTER, vote_blocks


def _features(seed: int, n: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def _votes(test: np.ndarray, train: np.ndarray, labels: np.ndarray, n_classes: int = 5, **settings) -> np.ndarray:
    config = ADAPTER.Config(**settings)
    return np.concatenate(
        list(vote_blocks(test, train, labels_M=labels, n_classes=n_classes, config=config, device="cpu"))
    )


@pytest.mark.parametrize("k", [1, 20, 150])
def test_votes_equal_sklearn(k: int) -> None:
    train, test = _features(0, 150), _features(1, 40)
    labels = np.random.default_rng(2).integers(0, 5, 150)
    votes = _votes(test, train, labels, k=k, block_bytes=4 * 150 * 7)
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    assert votes == pytest.approx(oracle.fit(train, labels).predict_proba(test), abs=1e-4)


def test_tied_neighbours_share_the_places_that_are_left() -> None:
    # One clear neighbour of class 0, then four at the same distance (classes 1, 1, 1, 2) for two places.
    train = np.array([[1, 0.1], [1, 1], [1, 1], [2, 2], [3, 3], [-1, 0]], dtype=np.float32)
    labels = np.array([0, 1, 1, 1, 2, 3])
    similarity = train @ np.array([1.0, 0.0]) / np.linalg.norm(train, axis=1)
    weight = np.exp(similarity / 0.07)
    expected = np.array([weight[0], 3 * weight[1] * 0.5, weight[1] * 0.5, 0.0])
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        votes = _votes(np.array([[1.0, 0.0]], np.float32), train[order], labels[order], 4, k=3)
        assert votes[0] == pytest.approx(expected / expected.sum(), rel=1e-4)


def test_more_neighbours_than_images_is_all_of_them_and_said() -> None:
    train, test = _features(0, 12), _features(1, 5)
    labels = np.arange(12) % 3
    assert _votes(test, train, labels, 3, k=500) == pytest.approx(_votes(test, train, labels, 3, k=12))
    classes = ("a", "b", "c")
    data = FakeData({"train": labelled("train", labels, classes), "test": labelled("test", [0, 1], classes)})
    rows = ADAPTER.predict(FakeEncoder(lambda i: noise_of(i, 6)), data, ADAPTER.Config(k=500))
    assert any("all of them vote" in note for note in rows.meta["notes"])


def test_order_of_training_images_does_not_matter() -> None:
    train, test, labels = _features(0, 60), _features(1, 30), np.arange(60) % 5
    order = np.random.default_rng(3).permutation(60)
    assert _votes(test, train[order], labels[order]) == pytest.approx(_votes(test, train, labels), abs=1e-9)


def test_test_images_among_the_training_images_are_counted() -> None:
    classes = ("a", "b")
    train = FakeSource([b"1/0", b"2/1", b"3/0"], split="train", labels=[0, 1, 0], classes=classes)
    test = FakeSource([b"1/0", b"9/1"], split="test", labels=[0, 1], classes=classes)
    encoder = FakeEncoder(lambda image: np.eye(2)[label_in(image)])
    rows = ADAPTER.predict(encoder, FakeData({"train": train, "test": test}), ADAPTER.Config(k=1))
    assert rows.meta["notes"][0] == "1 of 2 test images are, byte for byte, training images too"
    assert rows["correct"].all()
