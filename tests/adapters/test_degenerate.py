"""Models that know nothing land on chance, on every adapter; a model that knows everything near the top.

A new adapter without an entry in ``AUDITS`` fails here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.adapters import multilabel_fakes
from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource, label_in, labelled, noise_of, spoken
from vlbench.core.catalog import ADAPTERS
from vlbench.core.types import Region

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
WIDTH = 16
N_IMAGES, N_CAPTIONS = 240, 2


@dataclass(frozen=True)
class Audit:
    """Data on which an adapter is audited, a model that knows the answers, and whether ties count as wrong."""

    data: Callable[[], FakeData]
    oracle: Callable[[], FakeEncoder]
    pessimistic: bool = False
    optimistic: tuple[str, ...] = ()
    """Metrics that choose on the reported split: above chance by their nature, which is why they are not headlines."""


def _class_data(classes: tuple[str, ...] = CLASSES) -> FakeData:
    sizes, n_classes = {"train": 320, "val": 160, "test": 480}, len(classes)
    return FakeData({name: labelled(name, np.arange(n) % n_classes, classes) for name, n in sizes.items()})


def _two_class_data() -> FakeData:
    return _class_data(CLASSES[:2])


def _class_oracle() -> FakeEncoder:
    def image(data: bytes) -> np.ndarray:
        return np.eye(WIDTH)[label_in(data)] + 0.05 * noise_of(data, WIDTH)

    return FakeEncoder(image, text=lambda text: np.eye(WIDTH)[next(i for i, c in enumerate(CLASSES) if c in text)])


def _caption_data() -> FakeData:
    images = [f"image/{i}".encode() for i in range(N_IMAGES)]
    texts = [{"en": tuple(f"caption {n} of {i}" for n in range(N_CAPTIONS))} for i in range(N_IMAGES)]
    return FakeData({"test": FakeSource(images, split="test", texts=texts)})


def _matched_data() -> FakeData:
    """Captions that name their image's largest object, of which there are eight kinds."""
    images = [f"image/{i}".encode() for i in range(N_IMAGES)]
    texts = [{"en": (f"{CLASSES[i % 8]} in picture {i}",)} for i in range(N_IMAGES)]
    regions = [(Region("fly", (0, 0, 2, 2)), Region(CLASSES[i % 8], (3, 3, 30, 30))) for i in range(N_IMAGES)]
    return FakeData({"test": FakeSource(images, split="test", texts=texts, regions=regions)})


def _caption_oracle() -> FakeEncoder:
    return FakeEncoder(
        lambda data: noise_of(data.rsplit(b"/", 1)[1], WIDTH), text=lambda text: noise_of(text.rsplit(" ", 1)[1], WIDTH)
    )


def _described_data() -> FakeData:
    images = [f"image/{i}".encode() for i in range(N_IMAGES)]
    said = [spoken(noise_of(str(i), WIDTH)) for i in range(N_IMAGES)]
    return FakeData({"test": FakeSource(images, split="test", texts=[{"en": (text, f"{text} too")} for text in said])})


AUDITS = {
    "zeroshot": Audit(_class_data, _class_oracle),
    "linear": Audit(_class_data, _class_oracle),
    "knn": Audit(_class_data, _class_oracle),
    "retrieval": Audit(_caption_data, _caption_oracle, pessimistic=True),
    "zeroshot_multilabel": Audit(multilabel_fakes.multilabel_data, multilabel_fakes.multilabel_oracle),
    "linear_multilabel": Audit(multilabel_fakes.multilabel_data, multilabel_fakes.multilabel_oracle),
    "knn_multilabel": Audit(multilabel_fakes.multilabel_data, multilabel_fakes.multilabel_oracle),
    "svm": Audit(multilabel_fakes.multilabel_data, multilabel_fakes.multilabel_oracle),
    "fewshot": Audit(_class_data, _class_oracle),
    "fewshot_multilabel": Audit(multilabel_fakes.multilabel_data, multilabel_fakes.multilabel_oracle),
    "elevater_probe": Audit(_class_data, _class_oracle, optimistic=("acc1_best_on_test", "best_on_test_gap")),
    "clip_benchmark_probe": Audit(_class_data, _class_oracle),
    "matching": Audit(_matched_data, _caption_oracle),
    "captioning": Audit(_described_data, _caption_oracle, pessimistic=True),
}
"""Every adapter, on data that it is made for."""
AUDITS_OF_VARIANTS = {
    "zeroshot, two classes": Audit(_two_class_data, _class_oracle),
    "linear, two classes": Audit(_two_class_data, _class_oracle),
    "knn, two classes": Audit(_two_class_data, _class_oracle),
    "elevater_probe, many labels": Audit(
        multilabel_fakes.multilabel_data,
        multilabel_fakes.multilabel_oracle,
        optimistic=("map11_best_on_test", "best_on_test_gap"),
    ),
}
"""The same adapters on data of another form: the adapter's name, a comma, and what is different."""
EVERY_AUDIT = AUDITS | AUDITS_OF_VARIANTS


def _width(oracle: FakeEncoder, data: FakeData) -> int:
    return len(oracle.pooled(data.split("test").images[0]))


def _constant_images(oracle: FakeEncoder, data: FakeData) -> FakeEncoder:
    return FakeEncoder(lambda image: np.ones(_width(oracle, data)), text=oracle.text)


def _constant_everything(oracle: FakeEncoder, data: FakeData) -> FakeEncoder:
    return FakeEncoder(lambda image: np.ones(_width(oracle, data)), text=lambda text: np.ones(_width(oracle, data)))


def _zeros(oracle: FakeEncoder, data: FakeData) -> FakeEncoder:
    return FakeEncoder(lambda image: np.zeros(WIDTH), text=lambda text: np.zeros(WIDTH))


def _noise(oracle: FakeEncoder, data: FakeData) -> FakeEncoder:
    return FakeEncoder(lambda image: noise_of(image, _width(oracle, data), "blind"), text=oracle.text)


def _shuffled(oracle: FakeEncoder, data: FakeData) -> FakeEncoder:
    images = [image for source in data.splits.values() for image in source.images]
    other = dict(zip(images, np.random.default_rng(0).permutation(np.array(images, dtype=object))))
    return FakeEncoder(lambda image: oracle.pooled(other[image]), text=oracle.text)


BLIND = {
    "constant images": _constant_images,
    "constant everything": _constant_everything,
    "zeros": _zeros,
    "noise": _noise,
    "shuffled": _shuffled,
}


def _measure(name: str, encoder: FakeEncoder, data: FakeData) -> tuple[dict, dict[str, float]]:
    adapter = ADAPTERS.get(name.partition(",")[0])
    config = adapter.Config()
    rows = adapter.predict(encoder, data, config)
    return adapter.score(rows, config), rows.meta["chance"]


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_every_adapter_has_an_audit(name: str) -> None:
    if getattr(ADAPTERS.get(name), "trains", False):
        return  # what is fine-tuned is audited with the baselines: test_baselines.py, test_detection.py
    assert name in AUDITS, f"adapter {name!r} has no entry in AUDITS: audit it with models that know nothing"


@pytest.mark.parametrize("blind", BLIND)
@pytest.mark.parametrize("name", EVERY_AUDIT)
def test_blind_model_lands_on_chance(name: str, blind: str) -> None:
    audit = EVERY_AUDIT[name]
    data = audit.data()
    estimates, chance = _measure(name, BLIND[blind](audit.oracle(), data), data)
    assert chance, "an adapter says what chance is"
    assert set(estimates) == set(chance)
    for metric, expected in chance.items():
        n = estimates[metric].n_clusters
        # Five standard errors of a binomial at chance: about one false alarm in a million.
        slack = 5 * math.sqrt(expected * (1 - expected) / n) + 1 / n
        value = estimates[metric].value
        if metric in audit.optimistic:
            assert value >= expected - slack, f"{metric}: {value} is below chance {expected}"
            continue
        assert value <= expected + slack, f"{metric}: {value} is above chance {expected}"
        if not audit.pessimistic:
            assert value >= expected - slack, f"{metric}: {value} is below chance {expected}"
        assert estimates[metric].lo <= expected + slack


@pytest.mark.parametrize("name", EVERY_AUDIT)
def test_model_that_knows_everything_is_near_the_top(name: str) -> None:
    audit = EVERY_AUDIT[name]
    estimates, _ = _measure(name, audit.oracle(), audit.data())
    for metric, estimate in estimates.items():
        if metric == "best_on_test_gap":
            assert estimate.value < 0.02
            continue
        assert estimate.value > 0.98, f"{metric}: {estimate.value}"


def test_retrieval_with_equal_scores_is_zero_and_with_noise_is_chance() -> None:
    data = _caption_data()
    estimates, _ = _measure("retrieval", _constant_everything(_caption_oracle(), data), data)
    assert all(estimate.value == 0 for estimate in estimates.values())
    # Noise has no ties, so pessimism costs it nothing: R@10 of 480 captions among 240 images is 10/240.
    estimates, chance = _measure("retrieval", _noise(_caption_oracle(), data), data)
    metric = "image_retrieval_recall@10"
    assert estimates[metric].value == pytest.approx(chance[metric], abs=0.04)
    assert estimates[metric].value > 0


@pytest.mark.parametrize("name", ["zeroshot", "knn"])
def test_constant_features_favour_no_class(name: str) -> None:
    """On an uneven test set too: a tie broken by position would score the share of class 0."""
    labels = np.array([0] * 400 + list(range(1, 8)) * 20)
    data = FakeData({"train": labelled("train", np.arange(80) % 8, CLASSES), "test": labelled("test", labels, CLASSES)})
    estimates, _ = _measure(name, _constant_everything(_class_oracle(), data), data)
    assert estimates["acc1"].value == pytest.approx(1 / 8, abs=0.06)


@pytest.mark.parametrize("name", ["zeroshot, two classes", "linear, two classes", "knn, two classes"])
@pytest.mark.parametrize("blind", ["constant images", "constant everything", "zeros"])
def test_equal_scores_have_a_roc_auc_of_exactly_one_half(name: str, blind: str) -> None:
    data = _two_class_data()
    estimates, _ = _measure(name, BLIND[blind](_class_oracle(), data), data)
    assert estimates["roc_auc"].value == 0.5
