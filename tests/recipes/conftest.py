"""What the tests of mu-VLA share: 24 images of two regions with sentences, as a corpus, features and COCO files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.types import Region, Sample
from vlbench.data.regions.features import RegionFeatures
from vlbench.data.regions.npz import npz_path, write_npz
from vlbench.data.weak.corpus import Aligned, Entry, Link, open_corpus, write_corpus
from vlbench.data.wordpiece import train_wordpiece
from vlbench.models.single_stream import StreamConfig
from vlbench.recipes.muvla import Muvla, MuvlaConfig
from vlbench.recipes.muvla.batch import Batcher, Masking, Vocabulary
from vlbench.recipes.muvla.model import RegionTextModel
from vlbench.train.config import OptimConfig
from vlbench.train.loop import fit

TAGS = ("red ring", "blue box", "green star", "red box")
IDS = tuple(f"{number:03d}" for number in range(24))


def entry(number: int) -> Entry:
    """An image of two regions, with a sentence that names both and one that names neither."""
    tags = TAGS[number % 4], TAGS[(number + 1) % 4]
    text = f"see a {tags[0]} beside the {tags[1]} number {number}"
    links = []
    for region, (tag, score) in enumerate(zip(tags, (1.0, 0.5))):
        start = text.index(tag)
        links.append(Link(tag, start, start + len(tag), region, score))
    return Entry(IDS[number], tags, (Aligned(text, 0.9, tuple(links)), Aligned(f"nothing here {number}", 0.1, ())))


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weak") / "weak.arrow"
    write_corpus(path, [entry(number) for number in range(len(IDS))], ids=IDS, made_of={})
    return path


@pytest.fixture(scope="module")
def assets(corpus_path: Path) -> dict[str, bytes]:
    corpus = open_corpus(corpus_path)
    texts = [found.text for item in corpus for found in item.aligned]
    words = train_wordpiece([*TAGS, *texts], 120)
    return {"words": words, "tags": json.dumps(sorted(TAGS)).encode(), "corpus": str(corpus_path).encode()}


def config_of(corpus_path: Path, *changes: str) -> MuvlaConfig:
    base = (
        RECIPES.get("muvla")
        .presets["tiny"]
        .model_copy(
            update={
                "stream": StreamConfig(width=16, layers=1, heads=2, dropout=0.0, positions=32, init_std=0.2),
                "corpus": str(corpus_path),
            }
        )
    )
    return override(
        base,
        ["visual.image_size=32", "roi.strides=[8,32]", "mask_linked=0.8", "mask_words=0.4", "mask_tags=0.4", *changes],
    )


def samples(count: int = 12, *, start: int = 0) -> list[Sample]:
    found = []
    for number in range(start, start + count):
        number %= len(IDS)
        generator = torch.Generator().manual_seed(number)
        tags = entry(number).tags
        boxes = ((1.0, 2.0, 15.0, 20.0), (16.0, 8.0, 30.0, 31.0))
        regions = tuple(Region(tag, box) for tag, box in zip(tags, boxes))
        image = torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8)
        found.append(Sample(image, None, -1, id=IDS[number], regions=regions, seed=1000 + number))
    return found


def batcher(corpus_path: Path, assets: Mapping[str, bytes], masking: Masking, **kwargs: Any) -> Batcher:
    settings: dict[str, Any] = {"objectives": ("rt", "rn", "is"), "k": 1, "longest": 32, "most_regions": 4}
    return Batcher(
        Vocabulary(assets["words"]),
        {tag: number for number, tag in enumerate(sorted(TAGS))},
        masking=masking,
        corpus=open_corpus(corpus_path),
        **(settings | kwargs),
    )


def setting(
    corpus_path: Path, assets: dict[str, bytes], *changes: str
) -> tuple[Muvla, MuvlaConfig, RegionTextModel, dict]:
    config = config_of(corpus_path, *changes)
    recipe = RECIPES.get("muvla").with_assets(assets)
    torch.manual_seed(1)
    model = recipe.build(config, ()).eval()
    batch = recipe.collate(config, samples())
    return recipe, config, model, batch | {"epoch": torch.tensor(0.0)}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    for number, name in enumerate(IDS):
        boxes = np.array([[1, 2, 15, 20], [16, 8, 30, 31]], dtype=np.float32)
        found = rng.normal(size=(2, 10)).astype(np.float32)
        write_npz(npz_path(folder, name), RegionFeatures(found, boxes, entry(number).tags, None, 32, 32))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO files of 24 images with two coloured boxes, ids as the corpus has them."""
    root = tmp_path_factory.mktemp("boxes")
    (root / "annotations").mkdir()
    (root / "train").mkdir()
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for number in range(len(IDS)):
        pixels = rng.integers(90, 150, (32, 32, 3), dtype=np.uint8)
        for place, tag in enumerate(entry(number).tags):
            x, y = (2, 3) if place == 0 else (17, 12)
            pixels[y : y + 12, x : x + 12] = {"red": (230, 20, 20), "blue": (20, 20, 230)}.get(
                tag.split()[0], (20, 230, 20)
            )
            boxes.append(
                {
                    "id": len(boxes),
                    "image_id": number,
                    "category_id": TAGS.index(tag),
                    "bbox": [x, y, 12, 12],
                    "area": 144,
                }
            )
        Image.fromarray(pixels).save(root / "train" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 32, "height": 32})
    categories = [{"id": number, "name": tag} for number, tag in enumerate(TAGS)]
    text = json.dumps({"images": images, "annotations": boxes, "categories": categories})
    (root / "annotations" / "instances_train.json").write_text(text)
    return root


@pytest.fixture(scope="module")
def run_config(world: Path, tmp_path_factory: pytest.TempPathFactory) -> MuvlaConfig:
    pool = tmp_path_factory.mktemp("pool") / "pool.txt"
    pool.write_text("\n".join(f"a {a} and a {b} in one picture" for a in TAGS for b in TAGS))
    base = (
        RECIPES.get("muvla")
        .presets["tiny"]
        .model_copy(
            update={
                "data": (f"coco:{world}",),
                "pool": (str(pool),),
                "optim": OptimConfig(lr=1e-3, clip_norm=1.0),
                "stream": StreamConfig(width=16, layers=1, heads=2, dropout=0.1, positions=32, init_std=0.2),
            }
        )
    )
    changes = ["steps=6", "batch_size=8", "visual.image_size=32", "workers=0", "checkpoint_every=3", "log_every=1"]
    return override(base, [*changes, "mask_words=0.4", "mask_tags=0.4", "mask_linked=0.8", "roi.strides=[8,32]"])


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_on_ranks(config: MuvlaConfig, out: str) -> None:
    from vlbench.train.distributed import session

    torch.set_num_threads(1)
    with session("cpu"):
        fit(RECIPES.get("muvla"), config, out=Path(out))
