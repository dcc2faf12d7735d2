from __future__ import annotations

import pytest

from tests.data.making import image_folder
from vlbench.core.catalog import READERS
from vlbench.core.errors import UserError
from vlbench.core.types import Source
from vlbench.data.sources import Reader, Subset, is_present, list_splits, open_source, split_table


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "pets", splits=("train", "validation", "test"))


def test_every_reader_in_the_catalog_is_a_reader():
    for name in READERS.names():
        reader = READERS.get(name)
        assert isinstance(reader, Reader)
        assert reader.name == name
        assert reader.help.startswith(name) or name == "shapes"


def test_open_source_takes_train_unless_told(folder):
    source = open_source(f"imagefolder:{folder}@3")
    assert isinstance(source, Source)
    assert source.split == "train"
    assert source.spec == f"imagefolder:{folder}"


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev"])
def test_open_source_knows_the_aliases_of_a_split(folder, name):
    assert open_source(f"imagefolder:{folder}", name).split == "val"
    assert list_splits(f"imagefolder:{folder}") == ("train", "val", "test")


def test_open_source_lists_the_splits_where_one_is_missing(tmp_path):
    folder = image_folder(tmp_path / "pets")
    with pytest.raises(UserError, match="no split 'val'; it has train, test"):
        open_source(f"imagefolder:{folder}", "val")
    with pytest.raises(UserError, match="not divided into splits"):
        open_source(f"imagefolder:{folder}/train", "test")
    with pytest.raises(UserError, match="which split"):
        open_source(f"imagefolder:{image_folder(tmp_path / 'late', splits=('val', 'test'))}")


def test_open_source_refuses_an_unknown_option(folder):
    with pytest.raises(UserError, match="did you mean 'label'"):
        open_source(f"hf:{folder}?lable=x")


def test_is_present_asks_for_the_path(folder):
    assert is_present(f"imagefolder:{folder}")
    assert not is_present(f"imagefolder:{folder}/absent")
    assert not is_present(f"wds:{folder}/absent/{{0..3}}.tar")


def test_split_table_refuses_two_names_of_one_split():
    with pytest.raises(UserError, match="both mean the val split"):
        split_table(["val", "validation"], "here")
    assert list(split_table(["test_r", "test", "train"], "here")) == ["train", "test", "test_r"]


def test_subset_keeps_ids_and_labels_together(folder):
    source = open_source(f"imagefolder:{folder}")
    subset = Subset(source, [4, 0], split="test")
    assert isinstance(subset, Source)
    assert list(subset.ids()) == [source.ids()[4], source.ids()[0]]
    assert list(subset.labels()) == [1, 0]
    assert subset[0] == source[4]
    assert (len(subset), subset.split, subset.classes) == (2, "test", ("cat", "dog"))


def test_subset_knows_regions_where_its_source_does(folder):
    source = open_source(f"imagefolder:{folder}")
    assert not hasattr(Subset(source, [4, 0], split="test"), "regions_of")
    source.regions_of = lambda index: (index,)
    inner = Subset(Subset(source, [4, 0, 2], split="test"), [2, 0], split="test")
    assert [inner.regions_of(index) for index in (0, 1)] == [(2,), (4,)]
