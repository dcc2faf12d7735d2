"""What makes a feature another feature, down to the last bit; and what does not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlbench.adapters.encoder import Encoder, EncoderStats
from vlbench.core.cards import Preprocess
from vlbench.core.types import Backbone, Features
from vlbench.data.sources import open_source
from vlbench.models.backbone import backbone_fingerprint, wrap
from vlbench.store.features import FeatureStore

PREPROCESS = Preprocess(image_size=(8, 8), resize_to=9, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images_BCHW: torch.Tensor) -> Features:
        pooled_BD = self.conv(images_BCHW).mean(dim=(2, 3))
        return Features(pooled_BD=pooled_BD, embed_BE=pooled_BD)


def embed(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float(len(text)), 1.0, 0.0, 0.0] for text in texts])


def backbone(preprocess: Preprocess = PREPROCESS, *, nudged: tuple[int, ...] | None = None) -> Backbone:
    """Always the same random weights, but for one that is nudged to the next number that float32 has."""
    torch.manual_seed(0)
    net = Net()
    if nudged is not None:
        with torch.no_grad():
            weight = net.conv.weight[nudged]
            net.conv.weight[nudged] = torch.nextafter(weight, torch.tensor(torch.inf))
    return wrap(net, preprocess=preprocess, name="net", text=embed)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        for number in range(3):
            path = tmp_path / "photos" / "test" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def encoded(tmp_path: Path, photos: Path, model: Backbone | None = None, texts: tuple[str, ...] = ()) -> EncoderStats:
    """What had to be encoded, given what the store of this test has by now."""
    encoder = Encoder(model or backbone(), FeatureStore(tmp_path / "store"))
    encoder.images(open_source(f"imagefolder:{photos}", "test"))
    if texts:
        encoder.texts(texts)
    return encoder.stats


def test_the_same_again_is_not_encoded_again(tmp_path: Path, photos: Path) -> None:
    assert encoded(tmp_path, photos, texts=("a cat",)).images_encoded == 6
    again = encoded(tmp_path, photos, texts=("a cat",))
    assert (again.images_encoded, again.texts_encoded) == (0, 0)


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (3, 2, 2, 2), (1, 0, 2, 1)])
def test_one_weight_by_its_last_bit(tmp_path: Path, photos: Path, place: tuple[int, ...]) -> None:
    encoded(tmp_path, photos)
    assert encoded(tmp_path, photos, backbone(nudged=place)).images_encoded == 6


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": (8, 9)},
        {"image_size": (9, 9)},
        {"resize_to": 10},
        {"resize": "squash"},
        {"interpolation": "bilinear"},
        {"mean": (0.5, 0.5, 0.50000001)},
        {"std": (0.25, 0.2500001, 0.25)},
    ],
    ids=str,
)
def test_one_pixel_or_digit_of_the_preprocessing(tmp_path: Path, photos: Path, change: dict[str, object]) -> None:
    encoded(tmp_path, photos)
    other = backbone(PREPROCESS.model_copy(update=change))
    assert encoded(tmp_path, photos, other).images_encoded == 6


def test_one_pixel_of_one_image(tmp_path: Path, photos: Path) -> None:
    encoded(tmp_path, photos)
    path = photos / "test" / "one" / "1.png"
    pixels = np.array(Image.open(path))
    pixels[3, 4, 1] ^= 1
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    assert encoded(tmp_path, photos).images_encoded == 1


def test_one_prompt(tmp_path: Path, photos: Path) -> None:
    encoded(tmp_path, photos, texts=("a photo of a cat.", "a photo of a dog."))
    assert encoded(tmp_path, photos, texts=("a photo of a cat.", "a photo of a dog")).texts_encoded == 1


def test_names_and_places_of_files_do_not(tmp_path: Path, photos: Path) -> None:
    encoded(tmp_path, photos)
    moved = photos.rename(tmp_path / "elsewhere")
    (moved / "test" / "one").rename(moved / "test" / "uno")
    (moved / "test" / "two" / "0.png").rename(moved / "test" / "two" / "zero.png")
    assert encoded(tmp_path, moved).images_encoded == 0


def test_a_models_name_does_not() -> None:
    other = backbone()
    other.card = other.card.model_copy(update={"id": "another-name"})
    assert backbone_fingerprint(other) == backbone_fingerprint(backbone())
