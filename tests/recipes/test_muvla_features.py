"""mu-VLA's own mode: which images must have features and sentences, and settings of fixed features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.making import png
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.core.types import Example
from vlbench.data.regions.features import RegionFeatures
from vlbench.data.regions.npz import npz_path, write_npz
from vlbench.data.sources import BaseSource
from vlbench.data.weak.corpus import Aligned, Entry, write_corpus
from vlbench.recipes.muvla.corpus import find_corpus
from vlbench.recipes.muvla.features import check_features

IDS = ("a", "b")


class Files(BaseSource):
    def __init__(self, images: dict[str, bytes]) -> None:
        super().__init__("files", None, provides={"image"})
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return Example(*list(self._images.items())[index])

    def ids(self) -> list[str]:
        return list(self._images)

    def labels(self) -> None:
        return None


def test_images_that_cannot_be_read_need_neither_features_nor_sentences(tmp_path: Path) -> None:
    """Training passes over them; of any that can be read, the first without is named."""
    folder, corpus = tmp_path / "f", tmp_path / "weak.arrow"
    for name in IDS:
        box = np.array([[0, 0, 5, 5]], dtype=np.float32)
        write_npz(npz_path(folder, name), RegionFeatures(np.ones((1, 8), np.float32), box, ("cat",), None, 10, 12))
    write_corpus(corpus, [Entry(name, ("cat",), (Aligned("a cat", 1.0, ()),)) for name in IDS], ids=IDS, made_of={})
    paper = RECIPES.get("muvla").presets["paper"]
    config = override(paper, [f"features={folder}", f"corpus={corpus}"])
    known = {name: png(number) for number, name in enumerate(IDS)}
    for others in ({"more": png(7)}, {"cut": png(8)[:30], "more": png(7)}):
        first, n = next(iter(others)), len(others)
        with pytest.raises(UserError, match=f"{n} images of the data have no features there, first '{first}'"):
            check_features(config, [Files(known | others)])
        with pytest.raises(UserError, match=f"{n} images of the data are not in it, first '{first}'"):
            find_corpus(config, [Files(known | others)])
    bad = Files(known | {"cut": png(8)[:30], "empty": b""})
    assert check_features(config, [bad]) == ["cat"]
    assert find_corpus(config, [bad]).path == corpus


def test_labels_are_of_features() -> None:
    with pytest.raises(UserError, match="feature_labels are of fixed features: give features=PATH too"):
        override(RECIPES.get("muvla").presets["tiny"], ["feature_labels=labels.tsv"])
