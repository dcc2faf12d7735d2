from __future__ import annotations

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.data.making import image_folder, png, write_files, write_tar
from vlbench.core.errors import BadExample
from vlbench.core.fingerprint import digest
from vlbench.core.types import Example, Region
from vlbench.data.digests import example_digest, image_digests, source_fingerprint
from vlbench.data.sources import Subset, open_source


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
