from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from scipy import fft

from tests.data.filters.planting import smooth_image
from tests.data.making import encoded
from vlbench.data.filters.phash import HashSearch, perceptual_hash


def bits(first: int | None, second: int | None) -> int:
    assert first is not None
    assert second is not None
    return (first ^ second).bit_count()


@pytest.mark.parametrize("seed", range(5))
def test_hash_is_the_sign_of_low_frequencies_against_their_median(seed):
    image = smooth_image(seed)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    low = fft.dctn(grey, type=2)[:8, :8]  # scipy's own transform, another implementation
    expected = "".join("1" if value > np.median(low) else "0" for value in low.ravel())
    assert perceptual_hash(image) == int(expected, 2)


def test_hash_survives_encoding_resizing_and_brightness_and_tells_images_apart():
    images = [smooth_image(seed) for seed in range(40)]
    hashes = [perceptual_hash(image) for image in images]
    for image, original in zip(images, hashes):
        again = Image.open(io.BytesIO(encoded(image, "JPEG", quality=75)))
        assert bits(perceptual_hash(again), original) <= 4
        assert bits(perceptual_hash(image.resize((96, 80), Image.Resampling.BICUBIC)), original) <= 4
        assert bits(perceptual_hash(image.point(lambda value: 20 + value * 0.8)), original) <= 4
    apart = [bits(hashes[i], hashes[j]) for i in range(40) for j in range(i)]
    assert min(apart) > 10


@pytest.mark.parametrize("colour", ["black", "white", (12, 200, 31)])
def test_flat_images_have_no_hash(colour):
    assert perceptual_hash(Image.new("RGB", (40, 30), colour)) is None
    noisy = np.asarray(Image.new("L", (64, 64), 90)) + np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
    assert perceptual_hash(Image.fromarray(noisy)) is None


def test_a_gradient_has_the_same_hash_at_any_size():
    # 56 of its 64 coefficients are zero but for rounding: they must not decide.
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 2, dtype=np.uint8), (128, 1)))
    assert perceptual_hash(ramp) is not None
    assert bits(perceptual_hash(ramp), perceptual_hash(ramp.resize((128, 40)))) == 0


@pytest.mark.parametrize("distance", [0, 1, 4, 9, 16])
@pytest.mark.parametrize("block", [1, 100, 1 << 21])
def test_search_finds_what_comparing_all_with_all_finds(distance, block):
    rng = np.random.default_rng(distance)
    stored = rng.integers(0, 1 << 63, 120, dtype=np.uint64)
    stored[60:80] = stored[:20]  # equal hashes
    queries = stored[rng.integers(0, 120, 150)]
    for _ in range(2 * distance):
        flip = rng.integers(0, 64, 150).astype(np.uint64)
        queries = np.where(rng.random(150) < 0.5, queries ^ (np.uint64(1) << flip), queries)
    queries[:10] = rng.integers(0, 1 << 63, 10, dtype=np.uint64)
    apart = np.array([[(int(q) ^ int(s)).bit_count() for s in stored] for q in queries])
    index, found = HashSearch(stored, distance).nearest(queries, block=block)
    near = apart.min(axis=1) <= distance
    assert near.any()
    assert (index == np.where(near, apart.argmin(axis=1), -1)).all()  # argmin: the first of equals
    assert (found == np.where(near, apart.min(axis=1), 65)).all()


def test_search_of_nothing_finds_nothing():
    index, _ = HashSearch(np.array([], dtype=np.uint64), 4).nearest(np.array([1, 2], dtype=np.uint64))
    assert index.tolist() == [-1, -1]
    index, _ = HashSearch(np.array([1], dtype=np.uint64), 4).nearest(np.array([], dtype=np.uint64))
    assert index.tolist() == []
