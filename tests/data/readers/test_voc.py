from __future__ import annotations

import numpy as np
import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.data.sources import is_present, list_splits, open_source

CAT = "000005  1\n000007 -1\n000009  0\n"
DOG = "000005 -1\n000007  1\n000009  1\n"


def voc(root, **changes):
    files = {"cat_train": CAT, "dog_train": DOG, "cat_test": "000012 -1\n", "dog_test": "000012  1\n"} | changes
    texts = {f"ImageSets/Main/{name}.txt": text for name, text in files.items()}
    texts |= {"ImageSets/Main/train.txt": "000005\n000007\n000009\n"}
    return write_files(
        root, texts | {f"JPEGImages/{name}.jpg": png(int(name)) for name in ("000005", "000009", "000012")}
    )


@pytest.mark.parametrize("inner", ["", "VOC2007", "VOCdevkit/VOC2007"])
def test_voc_reads_present_absent_and_difficult(tmp_path, inner):
    voc(tmp_path / inner)
    assert is_present(f"voc:{tmp_path}")
    assert list_splits(f"voc:{tmp_path}") == ("train", "test")
    source = open_source(f"voc:{tmp_path}", "train")
    assert source.classes == ("cat", "dog")
    assert source.provides == {"image", "labels"}
    assert (source.ids(), source.labels()) == (["000005", "000007", "000009"], None)
    example = source[0]
    assert (example.id, example.image, example.label) == ("000005", png(5), None)
    assert example.extra["labels"].dtype == np.int8
    assert example.extra["labels"].tolist() == [1, 0], "VOC writes -1 for absent"
    assert source[2].extra["labels"].tolist() == [-1, 1], "and 0 for difficult"
    with pytest.raises(BadExample, match=r"000007\.jpg: missing file"):
        source[1]


def test_voc_offers_every_split_it_has(tmp_path):
    voc(tmp_path, cat_trainval=CAT, dog_trainval=DOG, cat_val="1 1\n", dog_val="1 1\n")
    assert list_splits(f"voc:{tmp_path}") == ("train", "val", "test", "trainval")
    assert len(open_source(f"voc:{tmp_path}", "trainval")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cat_train": "000005 2\n"}, r"cat_train\.txt, line 1: expected 'IMAGE 1'"),
        ({"cat_train": "000005\n"}, r"cat_train\.txt, line 1"),
        ({"cat_train": "000005 1\n000005 1\n"}, r"cat_train\.txt, line 2: image 000005 is named twice"),
        ({"dog_train": DOG + "000011 1\n"}, r"dog_train\.txt: image 000011 is in only one of it and cat_train"),
        ({"cat_train": ""}, r"cat_train\.txt: it names no image"),
        ({"bird_test": "000012 1\n"}, r"no bird_train\.txt, but other classes have one"),
    ],
)
def test_voc_refuses_malformed_lists_in_one_line(tmp_path, changes, message):
    voc(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"voc:{tmp_path}", "train")
    assert "\n" not in str(caught.value)


def test_voc_names_what_is_absent(tmp_path):
    (tmp_path / "VOCdevkit").mkdir()
    with pytest.raises(UserError, match="did you mean 'VOCdevkit'"):
        open_source(f"voc:{tmp_path}/VOCdevki")
    with pytest.raises(UserError, match="no ImageSets/Main"):
        open_source(f"voc:{tmp_path}/VOCdevkit")
    assert not is_present(f"voc:{tmp_path}/VOCdevkit")
    (tmp_path / "VOCdevkit/ImageSets/Main").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no CLASS_SPLIT\.txt"):
        open_source(f"voc:{tmp_path}/VOCdevkit")
