from __future__ import annotations

import numpy as np
import pytest

from tests.adapters.fakes import FakeData, FakeEncoder, label_in, labelled, noise_of
from vlbench.adapters.zeroshot import ADAPTER, class_embeddings
from vlbench.core.errors import UserError

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
TEMPLATES = ("a {}.", "the big {}.", "{} at night.")


def _encoder(signal: float = 1.0) -> FakeEncoder:
    return FakeEncoder(
        lambda image: signal * noise_of(CLASSES[label_in(image)], 8) + noise_of(image, 8),
        text=lambda text: (
            (1 + len(text))
            * (noise_of(next(c for c in CLASSES if c in text), 8) + noise_of(text.replace("ant", ""), 8))
        ),
    )


def _data(n: int = 120) -> FakeData:
    return FakeData({"test": labelled("test", np.arange(n) % len(CLASSES), CLASSES)}, templates=TEMPLATES)


def _by_hand(encoder: FakeEncoder, data: FakeData) -> np.ndarray:
    """The prompt ensemble written out: normalise, average, normalise; cosine; first maximum."""
    weights = []
    for name in CLASSES:
        texts = np.stack([encoder.text(t.format(name)) for t in TEMPLATES])
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
        mean = texts.mean(axis=0)
        weights.append(mean / np.linalg.norm(mean))
    images = np.stack([encoder.pooled(image) for image in data.split("test").images])
    return (images / np.linalg.norm(images, axis=1, keepdims=True)) @ np.stack(weights).T


def test_predict_equals_the_ensemble_by_hand() -> None:
    encoder, data = _encoder(), _data()
    rows = ADAPTER.predict(encoder, data, ADAPTER.Config(block=7))
    scores = _by_hand(encoder, data)
    labels = np.array(data.split("test").labels())
    assert (rows["pred"] == scores.argmax(axis=1)).all()
    own = scores[np.arange(len(labels)), labels][:, None]
    assert (rows["rank"] == 1 + (scores > own).sum(axis=1)).all()
    found = ADAPTER.score(rows, ADAPTER.Config())
    assert 0.2 < found["acc1"].value < 0.95, "the case must be able to fail"
    assert found["acc5"].value == pytest.approx((rows["rank"] <= 5).mean())


def test_ensemble_normalises_before_and_after_the_mean() -> None:
    """Texts of very different length have the same say, and the class vectors have length one."""
    encoder = FakeEncoder(
        lambda i: i, text=lambda t: np.array([100.0, 0.0]) if t.startswith("a") else np.array([0, 1.0])
    )
    class_CE = class_embeddings(encoder, ["x"], ["a {}", "the {}"])
    assert class_CE == pytest.approx(np.array([[0.5**0.5, 0.5**0.5]]))


def test_all_texts_go_in_one_call() -> None:
    encoder = _encoder()
    ADAPTER.predict(encoder, _data(), ADAPTER.Config())
    assert [len(call) for call in encoder.text_calls] == [len(CLASSES) * len(TEMPLATES)]


def test_order_of_classes_and_examples_does_not_matter() -> None:
    encoder, data = _encoder(), _data()
    before = ADAPTER.predict(encoder, data, ADAPTER.Config())
    order = np.random.default_rng(0).permutation(120)
    source = data.split("test")
    source.images = [source.images[i] for i in order]
    source._ids = [source._ids[i] for i in order]
    source._labels = [source._labels[i] for i in order]
    after = ADAPTER.predict(encoder, data, ADAPTER.Config())
    assert (after["pred"] == before["pred"][order]).all()


def test_no_templates_is_one_clear_line() -> None:
    data = _data()
    data.templates = ()
    with pytest.raises(UserError, match="no prompt templates"):
        ADAPTER.predict(_encoder(), data, ADAPTER.Config())
