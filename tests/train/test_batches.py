"""What the model is fed does not depend on who feeds it: workers, ranks, parts, or the step it starts from."""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.making import write_tar
from tests.train.conftest import CLASSES, stopped_and_resumed
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.errors import RunError, UserError
from vlbench.core.types import Example
from vlbench.data.readers.tarindex import read_members
from vlbench.data.sources import BaseSource
from vlbench.data.stream import Mixture
from vlbench.recipes.supervised import RECIPE
from vlbench.train.batches import Positions, Samples, batches, data_identity, open_mixture
from vlbench.train.distributed import Ranks
from vlbench.train.loop import fit

ALONE = Ranks()


def feed(config: Any, *, start: int = 0, here: Ranks = ALONE) -> list[dict[str, torch.Tensor]]:
    return list(batches(RECIPE, config, open_mixture(RECIPE, config, here=here), start=start, here=here, pin=False))


def joined(fed: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([batch["images_BCHW"] for batch in fed])


def test_batches_do_not_depend_on_workers_ranks_parts_or_start(settings: Callable[..., Any]) -> None:
    whole = joined(feed(settings()))
    assert whole.shape == (96, 3, 32, 32)
    assert whole.dtype == torch.uint8
    assert torch.equal(joined(feed(settings("workers=2"))), whole)
    assert torch.equal(joined(feed(settings("accumulate=4"))), whole)
    assert torch.equal(joined(feed(settings(), start=5)), whole[40:])
    ranks = [feed(settings("accumulate=2"), here=Ranks(rank, 2)) for rank in range(2)]
    assert torch.equal(joined([batch for pair in zip(*ranks, strict=True) for batch in pair]), whole)


RAND_AUGMENT = "augment.rand_augment=rand-m9-n3-p1-mstd0.5-inc1"


def test_rand_augment_is_a_function_of_the_position(settings: Callable[..., Any]) -> None:
    """Though timm draws from the generators of the process, of which every loader process has its own."""
    whole = joined(feed(settings(RAND_AUGMENT)))
    plain = joined(feed(settings()))
    assert torch.mean((whole != plain).flatten(1).any(1).float()) > 0.9
    for other in (["workers=2"], ["accumulate=4"]):
        random.seed(len(other[0]))
        np.random.seed(len(other[0]))
        assert torch.equal(joined(feed(settings(RAND_AUGMENT, *other))), whole)
    assert torch.equal(joined(feed(settings(RAND_AUGMENT), start=5)), whole[40:])
    filled = joined(feed(settings(RAND_AUGMENT, "eval_images.mean=[1, 0, 0]")))
    assert not torch.equal(filled, whole), "what is shifted in has the colour of the mean"


def test_run_with_rand_augment_is_resumed_to_the_bit(settings: Callable[..., Any], tmp_path: Path) -> None:
    stopped_and_resumed(settings(RAND_AUGMENT, "checkpoint_every=2"), tmp_path, stop=3)


def test_rand_augment_is_refused_where_boxes_would_have_to_follow() -> None:
    muvla = RECIPES.get("muvla")
    with pytest.raises(UserError, match=r"^augment.rand_augment=rand-m9.*: muvla learns from regions; leave it out$"):
        open_mixture(muvla, override(muvla.presets["tiny"], ["augment.rand_augment=rand-m9"]))


def test_positions_cut_every_batch_into_parts_and_ranks(settings: Callable[..., Any]) -> None:
    config = settings("steps=3", "batch_size=8", "accumulate=2")
    mine = list(Positions(config, start=1, here=Ranks(1, 2)))
    assert mine == [[10, 11], [14, 15], [18, 19], [22, 23]]
    assert len(Positions(config, start=1, here=Ranks(1, 2))) == 4


class Spoken(BaseSource):
    """Black images with captions, labels, templates, as the test wants."""

    def __init__(self, examples: Sequence[Example], **about: Any) -> None:
        super().__init__("spoken", None, **about)
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def ids(self) -> list[str]:
        return [example.id for example in self.examples]

    def labels(self) -> list[int | None]:
        return [example.label for example in self.examples]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def samples(sources: Sequence[Any], *assignments: str) -> list[Any]:
    recipe = RECIPES.get("unicl")
    config = override(recipe.presets["tiny"], ["visual.image_size=8", "templates=auto", *assignments])
    sample_at = Samples(recipe, config, Mixture(sources, None, 0, needs=recipe.needs))
    return [sample_at(position) for position in range(64)]


def test_texts_come_from_captions_else_from_the_sources_own_templates() -> None:
    base = Example(id="x", image=png())
    captions = Spoken([replace(base, texts={"en": ("one", "two"), "de": ("eins",)})], provides={"image", "text"})
    labels = Spoken(
        [replace(base, label=0), replace(base, label=1)],
        provides={"image", "label"},
        classes=("red_square", "ring"),
        templates=("a {}!",),
    )
    plain = Spoken([replace(base, label=0)], provides={"image", "label"}, classes=("ring",))
    found = {(sample.text, sample.label) for sample, bad in samples([captions, labels])}
    assert found == {("one", -1), ("two", -1), ("a red square!", 0), ("a ring!", 1)}
    assert {s.text for s, _ in samples([captions], "languages=[de]")} == {"eins"}
    assert len({s.text for s, _ in samples([plain])}) == 8  # ours, and every one is used
    assert all("ring" in s.text for s, _ in samples([plain], "templates=imagenet81"))
    assert {s.text for s, _ in samples([labels], "templates=simple")} > {"this is a ring."}


def test_caption_in_no_wanted_language_is_a_bad_example_and_all_of_them_an_error() -> None:
    base = Example(id="x", image=png())
    german = replace(base, id="g", texts={"de": ("eins",)})
    mixed = Spoken([german, replace(base, id="e", texts={"en": ("one",)})], provides={"image", "text"})
    found = samples([mixed])
    assert {sample.text for sample, _ in found} == {"one"}
    assert {error.kind for _, bad in found for error in bad} == {"no text in en"}
    with pytest.raises(RunError, match="no text in en"):
        samples([Spoken([german], provides={"image", "text"})])


def test_sources_are_checked_for_what_the_recipe_needs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("filepath\ttitle\n" + f"{folder / 'red' / '0.png'}\ta red thing\n")
    captions = f"csv:{tmp_path / 'a.csv'}"
    for name, data, wrong in (
        ("supervised", (f"imagefolder:{folder}", captions), "a.csv' has no labels, and supervised learns from labels"),
        ("clip", (), "no data of its own; give --data"),
    ):
        recipe = RECIPES.get(name)
        config = recipe.presets["tiny"].model_copy(update={"data": data})
        with pytest.raises(UserError, match=wrong):
            open_mixture(recipe, config)
    clip = RECIPES.get("clip")
    both = clip.presets["tiny"].model_copy(update={"data": (f"imagefolder:{folder}@3", f"{captions}@1")})
    mixture = open_mixture(clip, both)
    counts = [mixture.locate(position)[0] for position in range(128)]
    assert (counts.count(0), counts.count(1)) == (96, 32)


def test_users_error_in_a_loader_process_arrives_as_itself(settings: Callable[..., Any], folder: Path) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(RECIPE, name)

        def collate(self, config: Any, samples: Any) -> Any:
            raise AssertionError("not reached")

    config = settings("workers=1", "steps=1")
    mixture = open_mixture(RECIPE, config)
    mixture.sources = (Spoken([Example(id="empty", label=0)] * 48, provides={"image", "label"}),)  # type: ignore
    with pytest.raises(UserError, match="in a row") as error:
        list(batches(Broken(), config, mixture, start=0, here=ALONE, pin=False))  # type: ignore[arg-type]
    assert "Traceback" not in str(error.value)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> str:
    """The colours as twelve shards of two to six samples."""
    root = tmp_path_factory.mktemp("shards")
    images = [(path, label) for label, name in enumerate(CLASSES) for path in sorted((folder / name).iterdir())]
    order = np.random.default_rng(0).permutation(len(images))
    for shard, start in enumerate(np.cumsum([0, *[2, 6, 4] * 4])[:-1]):
        members = {}
        for index in order[start : start + (2, 6, 4)[shard % 3]]:
            path, label = images[index]
            members[f"s{index:03d}.png"], members[f"s{index:03d}.cls"] = path.read_bytes(), str(label).encode()
        write_tar(root / f"{shard:02d}.tar", members)
    return f"data=['wds:{root}/{{00..11}}.tar']"


def test_batches_by_shard_do_not_depend_on_workers_parts_or_start(settings: Callable[..., Any], shards: str) -> None:
    words = (shards, "order=shards", "open_shards=2")
    for rank in range(2):
        here = Ranks(rank, 2)
        whole = joined(feed(settings(*words), here=here))
        assert torch.equal(joined(feed(settings(*words, "workers=2"), here=here)), whole)
        parts, labels = feed(settings(*words, "accumulate=2"), here=here), feed(settings(*words), here=here)
        assert torch.equal(*(torch.cat([batch["labels_B"] for batch in fed]) for fed in (parts, labels)))
        assert torch.equal(joined(feed(settings(*words), start=5, here=here)), whole[20:])
        assert not torch.equal(joined(feed(settings(shards), here=here)), whole)


def test_ranks_read_few_shards_of_their_own_and_all_of_the_data(
    settings: Callable[..., Any], shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def reading(path: str, places: Any) -> dict[str, bytes]:
        read.append(path)
        return read_members(path, places)

    monkeypatch.setattr("vlbench.data.readers.wds_source.read_members", reading)
    config = settings(shards, "order=shards", "open_shards=2", "steps=6")  # one epoch of 48
    opened = []
    for rank in range(2):
        mixture = open_mixture(RECIPE, config, here=Ranks(rank, 2))
        read.clear()  # labels are read on opening
        list(batches(RECIPE, config, mixture, start=0, here=Ranks(rank, 2), pin=False))
        assert len(read) == 24
        assert all(len(set(read[start : start + 4])) <= 4 for start in range(21))  # two windows of two shards at most
        opened.append(list(read))
    assert len(set(opened[0]) & set(opened[1])) <= 1
    assert len(set(opened[0]) | set(opened[1])) == 12


def test_run_by_shard_is_resumed_to_the_bit_and_refuses_other_shards(
    settings: Callable[..., Any], shards: str, tmp_path: Path
) -> None:
    config = settings(shards, "order=shards", "open_shards=2")
    stopped_and_resumed(config, tmp_path, stop=7)
    identity = data_identity(config, open_mixture(RECIPE, config))
    assert identity[0]["shards"] != data_identity(config, open_mixture(RECIPE, settings("order=shards")))[0]["shards"]
    assert "shards" not in data_identity(settings(shards), open_mixture(RECIPE, settings(shards)))[0]


@pytest.mark.parametrize(("loading", "computing"), [(0.03, 0.0), (0.0, 0.03)])
def test_data_wait_is_the_share_of_the_time_that_steps_wait(
    loading: float, computing: float, settings: Callable[..., Any], tmp_path: Path
) -> None:
    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(RECIPE, name)

        def with_assets(self, assets: Any) -> Any:
            return self

        def collate(self, config: Any, samples: Any) -> Any:
            time.sleep(loading)
            return RECIPE.collate(config, samples)

        def loss(self, model: Any, batch: Any, config: Any) -> Any:
            time.sleep(computing)
            return RECIPE.loss(model, batch, config)

    fit(Slow(), settings("steps=6", "log_every=6", "accumulate=2"), out=tmp_path)  # type: ignore[arg-type]
    record = json.loads((tmp_path / "log.jsonl").read_text())
    slept, whole = 12 * max(loading, computing), 6 * 8 / record["images_per_second"]
    if loading:
        assert slept / whole <= record["data_wait"] <= 1
    else:
        assert 0 < record["data_wait"] <= 1 - slept / whole + 1e-3
