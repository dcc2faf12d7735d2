from __future__ import annotations

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.data.making import image_folder, png, write_files, write_tar
from vlbench.adapters.nlvr2 import Side
from vlbench.core.errors import BadExample
from vlbench.core.fingerprint import digest
from vlbench.core.types import Example, Region
from vlbench.data.digests import content_digests, example_digest, image_digests, source_fingerprint
from vlbench.data.images import read_file
from vlbench.data.readers import annotations
from vlbench.data.shapes.world import GROUPS, TINY
from vlbench.data.shapes.write import write_world
from vlbench.data.sources import BaseSource, Subset, open_source, without_images


def test_image_digests_are_those_of_the_files(tmp_path):
    folder = image_folder(tmp_path)
    source = open_source(f"imagefolder:{folder}", "test")
    expected = [digest((folder / "test" / name).read_bytes()) for name in source.ids()]
    assert image_digests(source) == expected


def test_image_digests_refuse_a_bad_example(tmp_path):
    folder = image_folder(tmp_path)
    (folder / "test" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(BadExample, match=r"test/cat/1.png: empty file"):
        image_digests(open_source(f"imagefolder:{folder}", "test"))


def test_source_fingerprint_ignores_names_and_order(tmp_path):
    folder = image_folder(tmp_path / "a")
    source = open_source(f"imagefolder:{folder}", "test")
    before = source_fingerprint(source)
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b/test/cat/0.png").rename(tmp_path / "b/test/cat/zzz.png")
    assert source_fingerprint(open_source(f"imagefolder:{tmp_path}/b", "test")) == before
    assert source_fingerprint(Subset(source, range(len(source))[::-1], split="test")) == before


def test_source_fingerprint_sees_labels_images_and_texts(tmp_path):
    folder = image_folder(tmp_path)
    before = source_fingerprint(open_source(f"imagefolder:{folder}/test"))
    (folder / "test/cat/0.png").rename(folder / "test/dog/9.png")
    moved = source_fingerprint(open_source(f"imagefolder:{folder}/test"))
    (folder / "test/dog/9.png").write_bytes(png(99))
    changed = source_fingerprint(open_source(f"imagefolder:{folder}/test"))
    assert len({before, moved, changed}) == 3
    captions = []
    for text in (b"a cat", b"a dog"):
        tar = write_tar(tmp_path / "0.tar", {"x.png": png(), "x.txt": text})
        captions.append(source_fingerprint(open_source(f"wds:{tar}")))
    assert captions[0] != captions[1]


def test_source_fingerprint_does_not_know_the_format(tmp_path):
    write_files(tmp_path, {"pics/cat/0.png": png(1), "pics/dog/0.png": png(2)})
    write_tar(tmp_path / "w/test/0.tar", {"p.png": png(2), "p.cls": b"1", "q.png": png(1), "q.cls": b"0"})
    write_files(tmp_path, {"w/test/nshards.txt": "1", "w/classnames.txt": "cat\ndog\n"})
    folder = open_source(f"imagefolder:{tmp_path}/pics")
    shards = open_source(f"wds:{tmp_path}/w", "test")
    assert source_fingerprint(folder) == source_fingerprint(shards)


def test_source_fingerprint_names_the_classes_of_several_labels(tmp_path):
    def shards(name, classes, labels):
        buffer = io.BytesIO()
        np.save(buffer, np.array(labels, dtype=np.float32))
        write_tar(tmp_path / name / "test/0.tar", {"x.png": png(), "x.npy": buffer.getvalue()})
        files = {"test/nshards.txt": "1", "classnames.txt": classes, "dataset_type.txt": "multilabel"}
        write_files(tmp_path / name, files)
        return source_fingerprint(open_source(f"wds:{tmp_path}/{name}", "test"))

    assert shards("a", "cat\ndog\n", [1, 0]) == shards("b", "dog\ncat\n", [0, 1])
    assert shards("a", "cat\ndog\n", [1, 0]) != shards("c", "cat\ndog\n", [1, -1])


class Plain(BaseSource):
    """A source as it is, without what it knows of its files."""

    def __init__(self, source):
        super().__init__(source.spec, source.split, provides=source.provides, classes=source.classes)
        self._source = source

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]


@pytest.fixture
def read(monkeypatch):
    """The files of images that readers of questions read, in order."""
    paths = []

    def counted(path):
        paths.append(path)
        return read_file(path)

    monkeypatch.setattr(annotations, "read_file", counted)
    return paths


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), sizes=TINY, workers=1, parts=GROUPS["finetune"])


@pytest.mark.parametrize("part", GROUPS["finetune"])
def test_an_image_that_several_examples_ask_about_is_read_once(world, part, read):
    def opened():
        return open_source(f"shapes:{part}?root={world}", "train")

    source = opened()
    found = content_digests(source)
    assert len(set(read)) == len(read), "once"
    asked = [file for index in range(len(source)) for file in source.image_files(index).values()]
    assert set(asked) == set(read)
    assert len(asked) > len(read)
    assert found == content_digests(Plain(opened())), "whoever reads all of them finds the same"
    some = [len(source) - 1, 0, 1]
    assert content_digests(Subset(opened(), some, split="train")).images == tuple(found.images[i] for i in some)


def test_the_right_images_of_pairs_are_read_once_too(world, read):
    def opened():
        return open_source(f"shapes:nlvr2?root={world}", "train")

    found = content_digests(Side(opened(), 1))
    right = [path for path in read if "img1" in path]
    assert len(set(right)) == len(right) < len(found.images)
    assert found == content_digests(Side(Plain(opened()), 1))


@pytest.mark.parametrize("part", GROUPS["finetune"])
def test_what_is_asked_is_known_without_an_image(world, part, read):
    source = open_source(f"shapes:{part}?root={world}", "train")
    for index in (0, 1):
        bare, whole = without_images(source, index), source[index]
        assert bare.image is None
        extra = {key: value for key, value in whole.extra.items() if key != "right"}
        assert replace(whole, image=None, extra=extra) == bare
    assert len(read) == 2 * len(source.image_files(0)), "of the whole examples"


@pytest.mark.parametrize(
    "attributes", [{"iscrowd": 1}, {"area": 9}, {"area": 16.0}, {"iscrowd": 1, "area": 9}], ids=str
)
def test_what_moves_detections_numbers_makes_another_example(attributes):
    region = Region("cat", (0.0, 0.0, 4.0, 4.0))

    def with_region(attributes):
        return example_digest(Example("a", regions=(replace(region, attributes=attributes),)), None, image="x")

    plain = with_region({})
    assert plain == with_region({"iscrowd": 0}) == with_region({"annotation_id": 5})
    assert with_region(attributes) == with_region({**attributes, "annotation_id": 7}) != plain
    assert with_region({"area": 9}) == with_region({"area": 9.0}) != with_region({"area": 9, "iscrowd": 1})
