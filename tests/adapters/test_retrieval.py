from __future__ import annotations

import numpy as np
import pytest

from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource, noise_of
from vlbench.adapters.retrieval import ADAPTER, IMAGE_TO_TEXT, TEXT_TO_IMAGE, ranks
from vlbench.core.errors import UserError


def _brute_force(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> tuple[list[int], list[int]]:
    """Ranks by sorting every list of candidates, wrong ones first among equals."""
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    scores = np.round(images @ texts.T, 9)
    to_image, to_text = [], []
    for t in range(len(texts)):
        order = sorted(range(len(images)), key=lambda i: (-scores[i, t], i == owner[t]))
        to_image.append(1 + order.index(owner[t]))
    for i in range(len(images)):
        order = sorted(range(len(texts)), key=lambda t: (-scores[i, t], owner[t] == i))
        to_text.append(1 + min(order.index(t) for t in range(len(texts)) if owner[t] == i))
    return to_image, to_text


@pytest.mark.parametrize("block_bytes", [1, 8 * 90 * 7, 1 << 26])
@pytest.mark.parametrize("levels", [2, 1000])
def test_ranks_equal_brute_force(levels: int, block_bytes: int) -> None:
    """With two levels a coordinate nearly everything ties; with a thousand nothing does."""
    rng = np.random.default_rng(levels)
    images = rng.integers(1, levels + 1, (30, 3)).astype(np.float32)
    texts = rng.integers(1, levels + 1, (90, 3)).astype(np.float32)
    owner = np.concatenate([np.arange(30), rng.integers(0, 30, 60)])
    to_image, to_text = ranks(images, texts, owner_M=owner, block_bytes=block_bytes)
    assert (to_image.tolist(), to_text.tolist()) == _brute_force(images, texts, owner)


def _data(n: int, captions: int = 2, **changes) -> FakeData:
    images = [f"image/{i}".encode() for i in range(n)]
    texts = [{"en": tuple(f"caption {c} of {i}" for c in range(captions)), "de": (f"Text {i}",)} for i in range(n)]
    return FakeData({"test": FakeSource(images, split="test", texts=texts, **changes)})


def _encoder(noise: float = 0.7) -> FakeEncoder:
    def embed(key: str, whole: bytes | str) -> np.ndarray:
        return noise_of(key, 8) + noise * noise_of(whole, 8)

    return FakeEncoder(
        lambda image: embed(image.decode().rsplit("/", 1)[1], image),
        text=lambda text: embed(text.rsplit(" ", 1)[1], text),
    )


def test_metrics_of_a_worked_example() -> None:
    # Image 0 has captions 0 and 1, image 1 has caption 2. Cosines: see the comments.
    images = {b"image/0": [1.0, 0.0], b"image/1": [0.0, 1.0]}
    texts = {"caption 0": [1.0, 0.1], "caption 1": [0.1, 1.0], "caption 2": [0.2, 1.0]}
    source = FakeSource(
        list(images), split="test", texts=[{"en": ("caption 0", "caption 1")}, {"en": ("caption 2",)}], ids=["a", "b"]
    )
    encoder = FakeEncoder(lambda image: np.array(images[image]), text=lambda text: np.array(texts[text]))
    config = ADAPTER.Config(k=(1, 2))
    rows = ADAPTER.predict(encoder, FakeData({"test": source}), config)
    assert rows["id"] == ["a#0", "a#1", "b#0", "a", "b"]
    assert rows["direction"] == [TEXT_TO_IMAGE] * 3 + [IMAGE_TO_TEXT] * 2
    # Caption 1 points at image 1, so its own image is second; image 1 likes caption 1 better than its own.
    assert rows["rank"].tolist() == [1, 2, 1, 1, 2]
    found = ADAPTER.score(rows, config)
    assert found["image_retrieval_recall@1"].value == pytest.approx(2 / 3)
    assert found["text_retrieval_recall@1"].value == pytest.approx(1 / 2)
    assert found["image_retrieval_recall@2"].value == found["text_retrieval_recall@2"].value == 1
    assert found["mean_recall"].value == pytest.approx((2 / 3 + 1 / 2 + 1 + 1) / 4)
    assert found["image_retrieval_recall@1"].n_clusters == 2, "captions of one image are one cluster"


def test_order_of_entries_does_not_matter() -> None:
    before = ADAPTER.score(ADAPTER.predict(_encoder(), _data(60), ADAPTER.Config()), ADAPTER.Config())
    data = _data(60)
    source, order = data.split("test"), np.random.default_rng(0).permutation(60)
    source.images, source.texts = [source.images[i] for i in order], [source.texts[i] for i in order]
    after = ADAPTER.score(ADAPTER.predict(_encoder(), data, ADAPTER.Config()), ADAPTER.Config())
    assert {name: e.value for name, e in after.items()} == pytest.approx({name: e.value for name, e in before.items()})
    assert 0.1 < before["image_retrieval_recall@1"].value < 0.95


def test_copies_of_an_image_are_one_candidate_with_all_captions() -> None:
    data = _data(20)
    source = data.split("test")
    source.images[7] = source.images[3]
    rows = ADAPTER.predict(_encoder(0.0), data, ADAPTER.Config())
    assert rows.meta["images"] == 19
    assert rows.meta["captions"] == 40
    ids = source.ids()
    assert any(note.endswith(f"byte for byte and joined it: {ids[7]} (of {ids[3]})") for note in rows.meta["notes"])
    image_of = dict(zip(rows["id"], rows["image"]))
    assert image_of["test/7#0"] == image_of["test/3#0"]


def test_shared_captions_are_counted_and_pessimistic() -> None:
    data = _data(10, captions=1)
    source = data.split("test")
    source.texts[4] = source.texts[2]
    rows = ADAPTER.predict(_encoder(0.0), data, ADAPTER.Config())
    assert any(note.startswith("2 of 10 captions also belong") for note in rows.meta["notes"])
    rank = dict(zip(rows["id"], rows["rank"]))
    assert rank["test/2"] == 2, "the other image's equal caption stands first"


def test_language_is_chosen_and_its_absence_is_one_clear_line() -> None:
    rows = ADAPTER.predict(_encoder(), _data(8), ADAPTER.Config(language="de"))
    assert rows.meta["captions"] == 8
    with pytest.raises(UserError, match=r"no caption in language 'fr' \(there: de, en\)"):
        ADAPTER.predict(_encoder(), _data(8), ADAPTER.Config(language="fr"))


def test_chance_is_that_of_a_random_order() -> None:
    """Against a simulation, with uneven numbers of captions."""
    counts, k = [1, 2, 5, 1, 3, 2], 3
    images = [f"image/{i}".encode() for i in range(len(counts))]
    texts = [{"en": tuple(f"caption {c} of {i}" for c in range(n))} for i, n in enumerate(counts)]
    data = FakeData({"test": FakeSource(images, split="test", texts=texts)})
    chance = ADAPTER.predict(_encoder(), data, ADAPTER.Config(k=(k,))).meta["chance"]
    assert chance[f"image_retrieval_recall@{k}"] == pytest.approx(k / len(counts))
    rng, owner = np.random.default_rng(0), np.repeat(np.arange(len(counts)), counts)
    hits = [[i in owner[rng.permutation(len(owner))[:k]] for i in range(len(counts))] for _ in range(4000)]
    assert chance[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(hits), abs=0.02)
