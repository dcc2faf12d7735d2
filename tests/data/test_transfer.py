"""Learnt from one data set, tested on another: classes are matched, answers are the test set's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import UserError
from vlbench.data.digests import image_digests
from vlbench.data.sources import Subset, open_source
from vlbench.data.taskdata import TaskData
from vlbench.data.transfer import Relabelled, match_classes


def match(test, train, *, test_names=None, train_names=None):
    return match_classes(
        test, train, test_names=test_names or test, train_names=train_names or train, where="imagefolder:t"
    )


def test_classes_are_matched_by_the_datas_own_names_first():
    # In words the two would be matched otherwise: their tables disagree.
    classes, new = match(["n2", "n0"], ["n0", "n1", "n2"], test_names=["cat", "dog"], train_names=["cat", "ox", "dog"])
    assert classes == ["n2", "n0", "n1"]
    assert new == [1, 2, 0]


def test_classes_are_matched_by_words_where_the_own_names_differ():
    classes, new = match(["0", "1"], ["n0", "n1", "n2"], test_names=["dog", "cat"], train_names=["cat", "ox", "dog"])
    assert classes == ["dog", "cat", "ox"]
    assert new == [1, 2, 0]


def test_a_name_that_two_classes_have_is_matched_in_order_where_both_sets_have_both():
    names = ["missile", "dog", "missile"]
    assert match(["0", "1", "2"], ["a", "b", "c"], test_names=names, train_names=names)[1] == [0, 1, 2]
    with pytest.raises(UserError, match=r"'missile' is the name of 2 classes of the training data; name the folders"):
        match(["0"], ["a", "b", "c"], test_names=["missile"], train_names=names)


def test_a_class_that_was_never_learnt_is_named():
    with pytest.raises(UserError, match=r"imagefolder:t.*2 of 3 classes are not in the training data.*'yak'"):
        match(["dog", "yak", "gnu"], ["cat", "dog"])


@pytest.fixture
def folders(tmp_path):
    files = {}
    for split, count in (("train", 3), ("val", 2)):
        for number, name in enumerate(("ant", "bee", "cow", "doe")):
            for i in range(count):
                files[f"learn/{split}/{name}/{i}.png"] = png(100 * number + 10 * len(split) + i)
    for number, name in enumerate(("doe", "bee")):
        for i in range(2):
            files[f"shift/{name}/{i}.png"] = png(1000 + 10 * number + i)
    write_files(tmp_path, files)
    return tmp_path


def test_task_data_learn_from_other_data(folders):
    learnt = TaskData(f"imagefolder:{folders}/learn")
    data = TaskData(f"imagefolder:{folders}/shift", {"test": "all"}).learning_from(learnt)
    test, train = data.split("test"), data.split("train")
    assert test.classes == train.classes == ("bee", "doe", "ant", "cow")
    assert data.told_apart == 2
    assert data.own_classes == ("bee", "doe")
    for source in (test, train):
        by_name = {source.ids()[i]: source.classes[source[i].label] for i in range(len(source))}
        assert all(name in id_ for id_, name in by_name.items()), by_name
        assert [source[i].label for i in range(len(source))] == list(source.labels())
    assert len(train) == 12
    # The training data report their val split, as ImageNet does: nothing is chosen on it.
    assert not data.has("val")


def test_the_training_images_are_read_once(folders):
    learnt = TaskData(f"imagefolder:{folders}/learn")
    data = TaskData(f"imagefolder:{folders}/shift", {"test": "all"}).learning_from(learnt)
    assert image_digests(data.split("train")) == image_digests(learnt.split("train"))
    assert data.split("train")._content_digests is learnt.split("train")._content_digests


def test_the_fingerprint_covers_both_sets(folders):
    def fingerprint():
        learnt = TaskData(f"imagefolder:{folders}/learn")
        data = TaskData(f"imagefolder:{folders}/shift", {"test": "all"}).learning_from(learnt)
        return data.fingerprint(("train", "test"))

    seen = {fingerprint(), fingerprint()}
    (folders / "learn" / "train" / "cow" / "0.png").write_bytes(png(7))
    seen.add(fingerprint())
    (folders / "shift" / "doe" / "0.png").write_bytes(png(8))
    seen.add(fingerprint())
    assert len(seen) == 3


def _several(folders, labels):
    """A source whose first image has these labels."""
    source = open_source(f"imagefolder:{folders}/learn")
    several = Subset(source, [0], split="train")
    several._source = [replace(source[0], label=None, extra={"labels": np.array(labels, dtype=np.int8)})]
    return several


def test_several_labels_an_image_are_relabelled_too(folders):
    seen = Relabelled(_several(folders, [1, 0, -1, 0]), ["doe", "bee", "ant", "cow"], [2, 1, 3, 0])
    labels_C = seen[0].extra["labels"]
    assert labels_C.tolist() == [0, 0, 1, -1]  # ant, which is present, is the third now
    assert labels_C.dtype == np.int8
    short = Relabelled(_several(folders, [0, 1, 0, 1]), ["bee", "doe", "gnu", "yak", "ant", "cow"], [4, 0, 5, 1])
    assert short[0].extra["labels"].tolist() == [1, 1, -1, -1, 0, 0], "of a class it does not know it says nothing"


@pytest.mark.parametrize(("own", "united"), [((0, 1), 1), ((0, -1), -1), ((-1, 1), 1), ((0, 0), 0)])
def test_labels_that_are_learnt_as_one_are_united(folders, own, united):
    seen = Relabelled(_several(folders, [own[0], 0, own[1], 0]), ["insect", "bee", "doe"], [0, 1, 0, 2])
    assert seen[0].extra["labels"].tolist() == [united, 0, 0]


def test_classes_of_objects_are_relabelled_too(folders):
    source = open_source(f"imagefolder:{folders}/learn")
    learnt = Subset(source, [0, 1], split="train")
    objects = replace(source[0], extra={"categories": (0, 3, 3), "height": 4})
    learnt._source = [objects, source[1]]
    seen = Relabelled(learnt, ["doe", "bee", "ant", "cow"], [2, 1, 3, 0])
    assert seen[0].extra == {"categories": (2, 0, 0), "height": 4}
    assert objects.extra["categories"] == (0, 3, 3)
    assert seen[1].extra == source[1].extra
