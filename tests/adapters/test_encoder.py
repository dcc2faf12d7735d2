from __future__ import annotations

import io
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.adapters.fakes import FakeSource
from vlbench.adapters import encoder as encoder_module
from vlbench.adapters.encoder import Encoder
from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Features
from vlbench.store.features import FeatureStore

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


class MeanColour:
    """A backbone whose feature is the mean of each normalised channel; it counts what it is given."""

    def __init__(self, *, weights_hash: str = "w0", provides: Sequence[str] = ("pooled", "embed", "text")) -> None:
        self.card = ModelCard(
            id="mean-colour",
            loader="build",
            arch="mean",
            preprocess=Preprocess(image_size=(8, 8), mean=MEAN, std=STD),
            provides=frozenset(provides),
        )
        self.weights_hash = weights_hash
        self.images, self.batches, self.texts = 0, 0, []
        self.spoil: int | None = None

    def encode_image(self, images_BCHW: torch.Tensor) -> Features:
        assert images_BCHW.dtype == torch.float32
        self.images += len(images_BCHW)
        self.batches += 1
        pooled = images_BCHW.mean(dim=(2, 3))
        if self.spoil is not None:
            pooled[self.spoil] = torch.nan
        return Features(pooled_BD=pooled, embed_BE=pooled[:, :2] if "embed" in self.card.provides else None)

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        self.texts.append(list(texts))
        return torch.tensor([[float(len(text)), 1.0] for text in texts])


def _source(values: Sequence[int], split: str = "test") -> FakeSource:
    return FakeSource([_png(value) for value in values], split=split)


def _expected(values: Sequence[int]) -> np.ndarray:
    colours = np.array([[value % 256, value // 256, 7] for value in values])
    return (colours / 255 - 0.5) / 0.25


def test_features_come_in_the_order_of_the_source() -> None:
    values = [5, 3, 700, 3, 11]
    found = Encoder(MeanColour(), None, batch_size=2).images(_source(values))
    assert found.pooled_ND == pytest.approx(_expected(values), abs=1e-5)
    assert found.embed_NE == pytest.approx(_expected(values)[:, :2], abs=1e-5)
    assert found.pooled_ND.dtype == np.float32
    assert found.ids == tuple(f"test/{i}" for i in range(5))
    assert found.digests[1] == found.digests[3]


def test_each_distinct_image_is_encoded_once_over_splits_tasks_and_runs(tmp_path) -> None:
    store = FeatureStore(tmp_path)
    first = MeanColour()
    encoder = Encoder(first, store, batch_size=3)
    encoder.images(_source([1, 2, 3, 2]))
    encoder.images(_source([3, 4], split="train"))
    encoder.images(_source([1, 2, 3, 2]))
    assert first.images == 4
    assert (encoder.stats.images_encoded, encoder.stats.images_reused) == (4, 4)
    second = MeanColour()
    again = Encoder(second, store).images(_source([4, 3, 2, 1]))
    assert second.images == 0
    assert again.pooled_ND == pytest.approx(_expected([4, 3, 2, 1]), abs=1e-5)


@pytest.mark.parametrize("change", ["weights", "precision", "preprocess"])
def test_another_model_or_precision_or_preprocessing_reuses_nothing(tmp_path, change: str) -> None:
    store = FeatureStore(tmp_path)
    Encoder(MeanColour(), store).images(_source([1, 2]))
    other = MeanColour(weights_hash="w1" if change == "weights" else "w0")
    if change == "preprocess":
        other.card = other.card.model_copy(update={"preprocess": Preprocess(image_size=(8, 8))})
    Encoder(other, store, precision="bf16" if change == "precision" else "fp32").images(_source([1, 2]))
    assert other.images == 2


def test_a_killed_run_loses_one_shard_at_most(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "SHARD_ROWS", 4)
    dying = MeanColour()

    def die_late(images: torch.Tensor) -> Features:
        if dying.images >= 10:
            raise KeyboardInterrupt
        return MeanColour.encode_image(dying, images)

    dying.encode_image = die_late
    with pytest.raises(KeyboardInterrupt):
        Encoder(dying, FeatureStore(tmp_path), batch_size=2).images(_source(range(20)))
    after = MeanColour()
    found = Encoder(after, FeatureStore(tmp_path)).images(_source(range(20)))
    assert after.images == 12, "eight images were stored in two shards before the kill"
    assert found.pooled_ND == pytest.approx(_expected(range(20)), abs=1e-5)


def test_features_that_are_not_finite_name_model_and_image() -> None:
    backbone = MeanColour()
    backbone.spoil = 1
    with pytest.raises(UserError, match=r"mean-colour: pooled features are not finite for 1 of 3 images.*'test/1'"):
        Encoder(backbone, None).images(_source([1, 2, 3]))


def test_features_of_a_wrong_shape_are_refused() -> None:
    backbone = MeanColour()
    backbone.encode_image = lambda images: Features(pooled_BD=images)
    with pytest.raises(UserError, match=r"have shape \(2, 3, 8, 8\), expected \(batch, width\)"):
        Encoder(backbone, None).images(_source([1, 2]))


def test_backbone_without_a_joint_space_has_no_embedding(tmp_path) -> None:
    found = Encoder(MeanColour(provides=("pooled",)), FeatureStore(tmp_path)).images(_source([1, 2]))
    assert found.embed_NE is None
    honest = MeanColour()
    honest.encode_image = lambda images: Features(pooled_BD=images.mean(dim=(2, 3)))
    with pytest.raises(UserError, match="embed features of 2 images have shape None"):
        Encoder(honest, None).images(_source([1, 2]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_test_image_is_an_error_that_names_it(workers: int) -> None:
    source = _source([1, 2, 3])
    source.images[1] = b"this is text"
    with pytest.raises(BadExample, match=r"test/1.*not an image"):
        Encoder(MeanColour(), None, workers=workers).images(source)


def test_workers_give_the_same_features() -> None:
    found = Encoder(MeanColour(), None, batch_size=2, workers=2).images(_source(range(7)))
    assert found.pooled_ND == pytest.approx(_expected(range(7)), abs=1e-5)


def test_texts_are_encoded_once_in_batches_of_like_length(tmp_path) -> None:
    backbone = MeanColour()
    encoder = Encoder(backbone, FeatureStore(tmp_path), batch_size=2)
    texts = ["dddd", "a", "ccc", "a", "bb"]
    assert encoder.texts(texts)[:, 0].tolist() == [4, 1, 3, 1, 2]
    assert backbone.texts == [["a", "bb"], ["ccc", "dddd"]]
    Encoder(backbone, FeatureStore(tmp_path)).texts(["a", "eeeee"])
    assert backbone.texts[2:] == [["eeeee"]]
    assert (encoder.stats.texts_encoded, encoder.stats.texts_reused) == (4, 0)


def test_features_of_another_version_are_not_reused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    Encoder(MeanColour(), FeatureStore(tmp_path)).images(_source([1, 2]))
    monkeypatch.setattr(encoder_module, "FEATURES_VERSION", encoder_module.FEATURES_VERSION + 1)
    later = MeanColour()
    Encoder(later, FeatureStore(tmp_path)).images(_source([1, 2]))
    assert later.images == 2


@pytest.mark.parametrize("name", ["enabled", "benchmark", "deterministic"])
@pytest.mark.parametrize("value", [True, False])
def test_arithmetic_mode_switches_off_tf32_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, name: str, value: bool
) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(cudnn, name, value)
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with Encoder(MeanColour(), None).mode():
            assert getattr(cudnn, name) is value
            assert not cudnn.allow_tf32
            assert not matmul.allow_tf32
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
    assert getattr(cudnn, name) is value


def test_bf16_features_are_kept_in_float32() -> None:
    backbone = MeanColour()
    weight = torch.eye(3) * 1.001
    backbone.encode_image = lambda images: Features(
        pooled_BD=images.mean(dim=(2, 3)) @ weight, embed_BE=images.mean(dim=(2, 3)) @ weight
    )
    exact = Encoder(backbone, None).images(_source([1, 2, 3])).pooled_ND
    rounded = Encoder(backbone, None, precision="bf16").images(_source([1, 2, 3])).pooled_ND
    assert rounded.dtype == np.float32
    assert 0 < np.abs(exact - rounded).max() < 0.05


def test_progress_and_stats() -> None:
    seen: list[tuple[int, int]] = []
    encoder = Encoder(MeanColour(), None, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    before = encoder.stats.copy()
    encoder.images(_source([1, 2, 3]))
    assert seen == [(2, 3), (3, 3)]
    assert encoder.stats.since(before).images_encoded == 3
    assert encoder.stats.images_per_second is not None
    assert SimpleNamespace(**vars(before)).images_encoded == 0, "a copy stays as it was"
