"""Matching against numbers worked out by hand, and the way from images to pairs against the model called by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from tests.adapters.fakes import FakeData, FakeEncoder, FakeSource, noise_of
from vlbench.adapters.encoder import Encoder
from vlbench.adapters.matching import ADAPTER, Config, build_pools
from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest
from vlbench.core.types import Example, Region, Rows
from vlbench.data.images import decode
from vlbench.data.sources import open_source
from vlbench.data.taskdata import TaskData
from vlbench.data.transforms import eval_transform, normalise
from vlbench.models.backbone import TorchBackbone
from vlbench.store.features import FeatureStore

NAMES = ("ant", "bee", "cat", "dog")


def source(count: int = 40, *, order: Any = None, regions: bool = True) -> FakeSource:
    numbers = list(range(count)) if order is None else list(order)
    return FakeSource(
        [f"image/{i}".encode() for i in numbers],
        split="test",
        ids=[f"{i:03d}" for i in numbers],
        texts=[{"en": (f"one {NAMES[i % 4]}, number {i}", f"second text of {i}")} for i in numbers],
        regions=[(Region(NAMES[i % 4], (0, 0, 9, 9)), Region("flea", (0, 0, 1, 1))) for i in numbers]
        if regions
        else None,
    )


def pools(found: FakeSource, **settings: Any) -> list[Any]:
    return build_pools(found, [digest(image) for image in found.images], Config(**settings))


def test_pool_holds_the_own_caption_first_and_others_once() -> None:
    made = pools(source(), pool=10)
    for number, pool in enumerate(made):
        assert pool.captions[0] == f"one {NAMES[number % 4]}, number {number}"
        assert len(set(pool.captions)) == len(pool.captions) == 10
        assert not any(caption.endswith(f"of {number}") for caption in pool.captions)
        assert pool.names == tuple(NAMES[number % 4] in caption for caption in pool.captions)
    drawn = {caption for pool in made for caption in pool.captions[1:]}
    assert len(drawn) > 35, "negatives come from all images"
    assert [pool.captions for pool in pools(source(), pool=10, seed=1)] != [pool.captions for pool in made]
    assert len(pools(source(), pool=1000)[0].captions) == 40


def test_pool_does_not_depend_on_the_order_of_the_data() -> None:
    shuffled = np.random.default_rng(0).permutation(40).tolist()
    there, here = pools(source()), pools(source(order=shuffled))
    assert [(pool.id, pool.captions) for pool in there] == [(pool.id, pool.captions) for pool in here]


def test_a_shared_caption_is_never_held_against_its_owner() -> None:
    found = source(6)
    found.texts = [{"en": ("the same",)} if i < 3 else {"en": (f"text {i}",)} for i in range(6)]
    for pool in pools(found)[:3]:
        assert pool.captions.count("the same") == 1
    found.texts = [{"en": ("the same",)}] * 6
    with pytest.raises(UserError, match="there is no caption of another image that is not one of its own"):
        pools(found)
    with pytest.raises(UserError, match=r"000: no caption in language 'de' \(there: en\)"):
        pools(source(), language="de")


def test_main_object_is_named_in_whole_words() -> None:
    found = source(4)
    found.texts = [{"en": (text,)} for text in ("an Ant here", "pants", "giant ants", "ant-hill")]
    found.regions = [(Region("ant", (0, 0, 9, 9)),)] * 4
    said = dict(zip(pools(found)[0].captions, pools(found)[0].names))
    assert said == {"an Ant here": True, "pants": False, "giant ants": False, "ant-hill": True}


def rows_of(p: list[list[float]], names: list[list[bool]]) -> Rows:
    place = [number for row in p for number in range(len(row))]
    image = [f"i{number}" for number, row in enumerate(p) for _ in row]
    columns = {
        "id": [f"{name}#{at}" for name, at in zip(image, place)],
        "image": image,
        "place": np.array(place),
        "p": np.concatenate([np.array(row, dtype=np.float32) for row in p]),
        "names": np.concatenate([np.array(row) for row in names]),
    }
    return Rows(columns, {})


def test_scores_are_those_worked_out_by_hand() -> None:
    # The best of each pool: own; a wrong one that names the object; own and a wrong one tie; a wrong one.
    p = [[0.9, 0.2, 0.8], [0.6, 0.1, 0.7], [0.5, 0.5, 0.1], [0.1, 0.4, 0.2]]
    names = [[True, False, False], [True, False, True], [True, False, False], [True, False, True]]
    found = ADAPTER.score(rows_of(p, names), Config())
    pairs = [(1, 0.9), (0, 0.2), (1, 0.6), (0, 0.1), (1, 0.5), (0, 0.5), (1, 0.1), (0, 0.4)]
    auc = roc_auc_score([label for label, _ in pairs], [score for _, score in pairs])
    assert found["roc_auc"].value == pytest.approx(auc)
    assert found["accuracy"].value == pytest.approx(6 / 8)
    assert found["pool_recall@1"].value == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert found["right_object"].value == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert found["roc_auc"].n_clusters == found["right_object"].n_clusters == 4


def test_scorer_that_says_one_thing_is_exactly_at_chance_and_a_blind_one_near_it() -> None:
    def text(words: str) -> np.ndarray:
        return noise_of(words, 16)

    data = FakeData({"test": source(200)})
    constant = FakeEncoder(lambda image: np.zeros(16), text=text)
    rows = ADAPTER.predict(constant, data, Config())
    for metric, estimate in ADAPTER.score(rows, Config()).items():
        assert estimate.value == pytest.approx(rows.meta["chance"][metric], abs=1e-9), metric
    blind = FakeEncoder(lambda image: noise_of(image, 16, "blind"), text=text)
    rows = ADAPTER.predict(blind, data, Config())
    found = ADAPTER.score(rows, Config())
    for metric, estimate in found.items():
        assert estimate.value == pytest.approx(rows.meta["chance"][metric], abs=5 * max(estimate.se, 0.005)), metric


def test_images_without_regions_have_no_right_object() -> None:
    encoder = FakeEncoder(lambda image: np.zeros(4), text=lambda text: np.zeros(4))
    rows = ADAPTER.predict(encoder, FakeData({"test": source(regions=False)}), Config())
    assert set(ADAPTER.score(rows, Config())) == {"roc_auc", "accuracy", "pool_recall@1"} == set(rows.meta["chance"])
    assert "right_object is left out" in rows.meta["notes"][0]


# ------------------------------------------------------------------------------------- through a real backbone


class Passed:
    """Another source's examples."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.spec, self.split, self.provides, self.classes = source.spec, source.split, source.provides, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def ids(self) -> Any:
        return self.source.ids()


class _Reader(nn.Module):
    """Reads the mean colour under the boxes and the length of the text; a stand-in for a single-stream model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def match(
        self, images_BCHW: torch.Tensor, texts: list[str], image_of_M: torch.Tensor, regions: list[tuple[Region, ...]]
    ) -> torch.Tensor:
        seen = []
        for image, row in zip(images_BCHW, regions, strict=True):
            parts = [
                image[:, int(y1) : int(y2), int(x1) : int(x2)].mean() for x1, y1, x2, y2 in (r.box_xyxy for r in row)
            ]
            seen.append(torch.stack(parts).sum())
        length = torch.tensor([float(len(text)) for text in texts])
        return torch.sigmoid(self.weight * torch.stack(seen)[image_of_M] + 0.05 * length - 2)


def backbone(side: int = 32) -> TorchBackbone:
    card = ModelCard(
        id="reader",
        loader="native",
        arch="reader",
        preprocess=Preprocess(image_size=(side, side)),
        provides=frozenset({"match"}),
    )
    reader = _Reader()
    return TorchBackbone(card, reader, image_fn=lambda images: images.mean((2, 3)), match_fn=reader.match)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    from vlbench.data.shapes.world import TINY
    from vlbench.data.shapes.write import write_world

    root = write_world(tmp_path_factory.mktemp("world") / "shapes", sizes=TINY, workers=1, parts=("retrieval",))
    return f"wds:{root / 'retrieval'}"


def test_pairs_reach_the_model_with_boxes_in_its_own_pixels(shapes: str) -> None:
    data, model = TaskData(shapes), backbone()
    rows = ADAPTER.predict(Encoder(model, None, batch_size=5), data, Config(pool=4))
    opened, transform = open_source(shapes, "test"), eval_transform(model.card.preprocess)
    example = opened[opened.ids().index(rows["id"][0].partition("#")[0])]
    image = normalise(transform(decode(example.image, where="x"))[None], model.card.preprocess)
    # 64 pixels at 32: boxes are half as large.
    moved = tuple(Region(r.category, tuple(side / 2 for side in r.box_xyxy)) for r in example.regions)
    own = example.texts["en"][0]
    assert rows["p"][0] == pytest.approx(model.match(image, [own], regions=[moved]).item(), rel=1e-6)


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (32, 0), (7, 1)])
def test_scores_do_not_depend_on_the_batches(shapes: str, batch_size: int, workers: int) -> None:
    data = TaskData(shapes)
    rows = ADAPTER.predict(Encoder(backbone(), None, batch_size=5), data, Config(pool=4))
    again = ADAPTER.predict(Encoder(backbone(), None, batch_size=batch_size, workers=workers), data, Config(pool=4))
    assert list(rows["id"]) == list(again["id"])
    np.testing.assert_allclose(rows["p"], again["p"], rtol=1e-6)


def test_a_crop_takes_its_boxes_along() -> None:
    from PIL import Image

    image = Image.new("RGB", (60, 40))
    transform = eval_transform(Preprocess(image_size=(20, 20), resize_to=20))
    image.paste((255, 255, 255), (20, 10, 40, 30))
    box = transform.view(image).box((20, 10, 40, 30))
    np.testing.assert_allclose(box, (5, 5, 15, 15))
    lit = transform(image)[0] > 127
    assert lit.any(0).nonzero()[[0, -1], 0].tolist() == [5, 14]
    squash = eval_transform(Preprocess(image_size=(20, 20), resize="squash"))
    np.testing.assert_allclose(squash.view(image).box((20, 10, 40, 30)), (20 / 3, 5, 40 / 3, 15))


def test_scores_are_kept_and_a_changed_box_is_another_pair(shapes: str, tmp_path: Path) -> None:
    class Moved(Passed):
        """The same images and captions with every box two pixels shorter."""

        def __getitem__(self, index: int) -> Example:
            example = self.source[index]
            boxes = ((region, region.box_xyxy) for region in example.regions)
            shorter = (replace(region, box_xyxy=(x1, y1, x2 - 2, y2)) for region, (x1, y1, x2, y2) in boxes)
            return replace(example, regions=tuple(shorter))

    def seen(source: Any) -> tuple[Rows, int]:
        encoder = Encoder(backbone(), FeatureStore(tmp_path), batch_size=5)
        return ADAPTER.predict(encoder, FakeData({"test": source}), Config(pool=4)), encoder.stats.images_encoded

    opened = open_source(shapes, "test")
    first, encoded = seen(opened)
    assert encoded == len(first) / 4
    again, encoded = seen(opened)
    assert encoded == 0
    assert np.array_equal(first["p"], again["p"])
    moved, encoded = seen(Moved(opened))
    assert encoded == len(first) / 4
    assert not np.array_equal(first["p"], moved["p"])


def test_another_file_of_features_under_the_same_name_is_other_data(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"one")
    config = Config(features=str(tmp_path))
    before = config.contents()
    assert before == config.contents()
    (tmp_path / "a.npz").write_bytes(b"another")
    assert config.contents() != before
    assert Config().contents() == []


def test_model_without_matching_says_so() -> None:
    card = ModelCard(id="plain", loader="native", arch="x", preprocess=Preprocess(image_size=(8, 8)))
    plain = TorchBackbone(card, nn.Flatten())
    with pytest.raises(UserError, match="plain scores no pairs; vlbench pretrain muvla trains a model that does"):
        plain.match(torch.zeros(1, 3, 8, 8), ["text"])


def test_scores_that_are_no_numbers_are_refused(shapes: str) -> None:
    model = backbone()
    with torch.no_grad():
        model.module.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"reader: p.match. of 20 pairs has shape .20,. or is not finite"):
        ADAPTER.predict(Encoder(model, None, batch_size=5), TaskData(shapes), Config(pool=4))
