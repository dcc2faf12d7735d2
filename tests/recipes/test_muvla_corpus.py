"""mu-VLA: the corpus that the recipe makes by itself, and the arm that trains on regions' tags alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.weak.fakes import HashEncoder
from tests.recipes.conftest import logged, losses_on_ranks
from tests.train.conftest import on_ranks
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Example, Region
from vlbench.data.digests import source_fingerprint
from vlbench.data.sources import BaseSource
from vlbench.data.weak.pools import read_pool
from vlbench.models.load import load_backbone
from vlbench.models.weights import read_checkpoint
from vlbench.recipes.muvla import MuvlaConfig
from vlbench.recipes.muvla import corpus as muvla_corpus
from vlbench.recipes.muvla.corpus import corpus_of, find_corpus
from vlbench.train import checkpoint
from vlbench.train.loop import fit

COLOURS = ("red", "blue", "green", "black")
CAPTIONED = {str(number): f"a {colour} ring number {number}" for number, colour in enumerate(COLOURS)}


class Captioned(BaseSource):
    """Images with one region and a caption that names it."""

    def __init__(self, captions: dict[str, str] = CAPTIONED) -> None:
        super().__init__("made:up", None, provides={"image", "regions", "text"})
        self._captions = captions

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Example:
        name, text = list(self._captions.items())[index]
        region = Region(f"{COLOURS[index % 4]} ring", (0.0, 0.0, 1.0, 1.0))
        return Example(name, name.encode(), texts={"en": (text,)}, regions=(region,))

    def ids(self) -> list[str]:
        return list(self._captions)

    def labels(self) -> None:
        return None


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MuvlaConfig:
    """Whose pool is the images' own captions, in a cache of its own."""
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    pool = tmp_path / "pool.txt"
    pool.write_text("\n".join(CAPTIONED.values()))
    return RECIPES.get("muvla").presets["tiny"].model_copy(update={"pool": (str(pool),), "data": ("made:up",), "k": 2})


def test_own_captions_are_found_unless_they_are_excluded(config: MuvlaConfig) -> None:
    sources = [Captioned()]
    found = find_corpus(config, sources)
    assert found.made_of["counts"]["own_found"] == 1.0
    assert all(CAPTIONED[entry.id] == entry.aligned[0].text for entry in found)
    without = find_corpus(override(config, ["exclude_own=true"]), sources)
    assert without.path != found.path
    assert without.made_of["counts"]["own_found"] == 0.0
    for entry in without:
        assert len(entry.aligned) == 2, "others come in its place"
        assert CAPTIONED[entry.id] not in {aligned.text for aligned in entry.aligned}


def test_encoder_enters_the_key_by_its_weights(config: MuvlaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def load(name: str) -> HashEncoder:
        made.append(name)
        return HashEncoder(width)

    monkeypatch.setattr(muvla_corpus, "load_encoder", load)
    sources, width = [Captioned()], 48
    by_words = find_corpus(config, sources)
    assert not made, "TF-IDF has nothing to load"
    dense = override(config, ["encoder=some/model"])
    first = find_corpus(dense, sources)
    assert made == ["some/model"]
    assert first.made_of["encoder"] == "hash"
    assert first.path != by_words.path
    assert find_corpus(dense, sources).path == first.path
    width = 32  # other weights under the same name
    assert find_corpus(dense, sources).path != first.path


def test_encoder_that_is_not_here_is_one_line(config: MuvlaConfig) -> None:
    with pytest.raises(UserError, match=r"needs the package|cannot load it"):
        find_corpus(override(config, ["encoder=/no/such/folder"]), [Captioned()])


def test_corpora_made_by_default_lie_where_they_lay(config: MuvlaConfig) -> None:
    """The key as it was before there were an encoder and exclude_own: what was made is found, not made anew."""
    sources = [Captioned()]
    before = {
        "sources": [source_fingerprint(sources[0])],
        "pool": read_pool(config.pool),
        "settings": {
            "k": 2,
            "encoder": "tfidf",
            "chunker": "tags",
            "metric": "cosine",
            "order": "given",
            "exclude_own": False,
            "aligned": None,
            "min_link": 0.0,
            "language": "en",
            "seed": 0,
            "backend": "auto",
            "block": 32_768,
            "queries": 512,
        },
        "ids": fingerprint([sources[0].ids()]),
    }
    assert find_corpus(config, sources).path.stem == fingerprint(before)


def test_emptied_cache_is_made_again_with_the_same_settings(
    config: MuvlaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muvla_corpus, "open_source", lambda spec: Captioned())
    monkeypatch.setattr(muvla_corpus, "parse_spec", lambda text: text)
    without = override(config, ["exclude_own=true"])
    made = find_corpus(without, [Captioned()])
    assets, content = {"corpus": str(made.path).encode()}, list(made)
    made.path.unlink()
    assert list(corpus_of(without, assets)) == content


def test_settings_of_a_made_corpus_are_refused_beside_a_given_one(config: MuvlaConfig) -> None:
    for change in ("exclude_own=true", "encoder=minilm"):
        with pytest.raises(UserError, match="leave encoder and exclude_own out"):
            override(config, ["pool=[]", "corpus=weak.arrow", change])


def test_run_says_how_many_images_found_their_own_caption(
    config: MuvlaConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Data:
        sources = (Captioned(CAPTIONED | {"0": "nothing of the kind"}),)

    recipe = RECIPES.get("muvla")
    assets = recipe.learn_assets(config, Data())
    said = capsys.readouterr().err.splitlines()
    assert said == ["corpus: own caption among the sentences of 75.0% of the images that have captions"]
    assert json.loads(assets["corpus_counts"])["own_found"] == 0.75
    recipe.learn_assets(override(config, ["exclude_own=true"]), Data())
    assert "sentences of 0.0% of" in capsys.readouterr().err


def test_runs_of_an_older_vlbench_resume(run_config: MuvlaConfig, tmp_path: Path) -> None:
    """Its settings had neither encoder nor exclude_own: they count as their defaults."""
    older = run_config.model_dump(mode="json")
    for name in ("encoder", "exclude_own"):
        del older[name]
    content = {"recipe": "muvla", "preset": "tiny", "config": older}
    (tmp_path / checkpoint.SETTINGS).write_text(json.dumps(content))
    assert checkpoint.load(tmp_path, recipe="muvla", config=run_config) is None
    with pytest.raises(UserError, match="exclude_own: false, now true"):
        checkpoint.load(tmp_path, recipe="muvla", config=override(run_config, ["exclude_own=true"]))


# ------------------------------------------------------------------------------------------- without objectives


@pytest.mark.parametrize("mask_pixels", [False, True])
def test_regions_tags_alone_train_a_tower_and_nothing_else(
    mask_pixels: bool,
    run_config: MuvlaConfig,
    tmp_path: Path,
) -> None:
    config = override(run_config, ["objectives=[]", f"roi.mask_pixels={mask_pixels}", "steps=12"])
    path = fit(RECIPES.get("muvla"), config, out=tmp_path / "run")
    lines = logged(tmp_path / "run")
    assert all(line["loss"] == line["roi_tags"] for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    saved = read_checkpoint(path)
    assert all(name.startswith(("visual.", "detector.")) for name in saved["model"]), "no stream, no heads"
    assert "corpus" not in saved["assets"]
    backbone = load_backbone(str(path))
    assert {"pooled", "maps"} <= backbone.card.provides
    assert "match" not in backbone.card.provides
    assert np.isfinite(backbone.encode_image(torch.zeros(2, 3, 32, 32)).pooled_BD.numpy()).all()


def test_regions_tags_alone_train_on_ranks(run_config: MuvlaConfig, tmp_path: Path) -> None:
    config = override(
        run_config, ["objectives=[]", "steps=3", "visual.arch=timm:test_vit", "roi.strides=[16]", "batch_size=8"]
    )
    fit(RECIPES.get("muvla"), config, out=tmp_path / "one")
    on_ranks(losses_on_ranks, config, str(tmp_path / "two"))
    for alone, together in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        for name in ("loss", "roi_tags", "grad_norm"):
            assert together[name] == pytest.approx(alone[name], rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize("changes", [["roi.classify=false"], ["features=f"], ["bert=folder"]])
def test_no_objectives_without_what_they_leave_is_refused(changes: list[str], config: MuvlaConfig) -> None:
    with pytest.raises(UserError) as error:
        override(config, ["objectives=[]", *changes])
    assert "give roi.classify=true, neither features nor bert, or objectives" in str(error.value)
    assert "\n" not in str(error.value)
