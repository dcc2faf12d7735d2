from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Region
from vlbench.data.sources import list_splits, open_source

IMAGES = [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}]
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}]
MASK = {"size": [12, 10], "counts": [5, 3, 112]}


def instance(number: int, **changes) -> dict:
    return {"id": number, "image_id": 3, "category_id": 17, "bbox": [1, 2, 3, 4], "iscrowd": 0} | changes


def coco(root, *, split="val2017", annotations=None, captions=(), images="val2017"):
    annotations = [instance(1, segmentation=MASK), instance(2, category_id=18)] if annotations is None else annotations
    instances = {"images": IMAGES, "annotations": annotations, "categories": CATEGORIES}
    texts = {"images": IMAGES, "annotations": list(captions)}
    return write_files(
        root,
        {
            f"annotations/instances_{split}.json": json.dumps(instances),
            f"annotations/captions_{split}.json": json.dumps(texts),
            f"{images}/a.png": png(1),
            f"{images}/b.png": png(2),
        },
    )


def test_coco_reads_objects_and_captions(tmp_path):
    captions = [{"id": 1, "image_id": 7, "caption": "one\n"}, {"id": 2, "image_id": 7, "caption": "two"}]
    coco(tmp_path, captions=captions)
    assert list_splits(f"coco:{tmp_path}") == ("val",)
    source = open_source(f"coco:{tmp_path}", "val")
    assert source.ids() == ["3", "7"]
    assert source.provides == {"image", "text", "regions", "labels"}
    assert source.classes == ("cat", "dog"), "by category id, not as listed"
    assert source.labels() is None
    assert source[0].regions == (
        Region("cat", (1.0, 2.0, 4.0, 6.0), MASK, {"iscrowd": 0}),
        Region("dog", (1.0, 2.0, 4.0, 6.0), None, {"iscrowd": 0}),
    )
    assert (source[0].image, source[0].texts, source[0].extra["file_name"]) == (png(1), {}, "a.png")
    assert source[1].texts == {"en": ("one", "two")}
    assert [source[i].extra["labels"].tolist() for i in (0, 1)] == [[1, 1], [0, 0]]
    assert source[0].extra["labels"].dtype == np.int8


def test_coco_counts_several_objects_and_crowds_as_one_class(tmp_path):
    coco(tmp_path, annotations=[instance(1), instance(2), instance(3, image_id=7, category_id=18, iscrowd=1)])
    source = open_source(f"coco:{tmp_path}")
    assert [source[i].extra["labels"].tolist() for i in (0, 1)] == [[1, 0], [0, 1]]


@pytest.mark.parametrize("place", ["annotations/", ""])
def test_coco_reads_captions_alone(tmp_path, place):
    texts = {"images": IMAGES, "annotations": [{"id": 1, "image_id": 7, "caption": "one"}]}
    write_files(
        tmp_path, {f"{place}captions_val2014.json": json.dumps(texts), "val2014/a.png": png(1), "val2014/b.png": png(2)}
    )
    for spec in (f"coco:{tmp_path}", f"coco:{tmp_path}/{place}captions_val2014.json"):
        source = open_source(spec)
        assert (source.provides, source.classes) == ({"image", "text"}, None)
        assert (source[1].image, source[1].texts) == (png(2), {"en": ("one",)})
        assert source[1].extra == {"file_name": "b.png"}


@pytest.mark.parametrize("images", ["val2017", "images/val2017", "val", "images"])
def test_coco_finds_the_images(tmp_path, images):
    coco(tmp_path, images=images)
    assert open_source(f"coco:{tmp_path}")[0].image == png(1)


def test_coco_takes_the_images_from_the_option(tmp_path):
    coco(tmp_path / "a", images="../elsewhere")
    assert open_source(f"coco:{tmp_path}/a?images={tmp_path}/elsewhere")[0].image == png(1)
    assert open_source(f"coco:{tmp_path}/a/annotations/instances_val2017.json?images={tmp_path}/elsewhere")[0].image
    with pytest.raises(UserError, match="no folder of images"):
        open_source(f"coco:{tmp_path}/a?images={tmp_path}/nowhere")


def test_coco_knows_splits_by_file_name(tmp_path):
    coco(tmp_path, split="train2017", images="train2017")
    coco(tmp_path)
    assert list_splits(f"coco:{tmp_path}") == ("train", "val")
    coco(tmp_path, split="val2014", images="val2014")
    assert set(list_splits(f"coco:{tmp_path}")) == {"train2017", "val2014", "val2017"}


def test_coco_names_file_and_annotation_of_what_dangles(tmp_path):
    wrong = [
        instance(1),
        instance(2, image_id=99),
        instance(3, category_id=5),
        instance(4, bbox=[1, 2, 3]),
        "junk",
    ]
    coco(tmp_path, annotations=wrong)
    source = open_source(f"coco:{tmp_path}")
    assert len(source) == 2 + 4
    assert len(source[0].regions) == 1
    for index, (kind, number) in enumerate(
        [("dangling annotation", 2), ("missing class", 3), ("bad box", 4), ("bad annotation", "?")], start=2
    ):
        with pytest.raises(BadExample) as caught:
            source[index]
        assert caught.value.kind == kind
        assert caught.value.where == f"{tmp_path}/annotations/instances_val2017.json annotation {number}"


@pytest.mark.parametrize("content", ["{", "[]", '{"images": 3}', '{"images": [{"id": 1}]}', '{"annotations": []}'])
def test_coco_refuses_files_that_are_no_coco(tmp_path, content):
    write_files(tmp_path, {"instances_val.json": content})
    with pytest.raises(UserError, match=r"instances_val\.json: "):
        open_source(f"coco:{tmp_path}")


def test_coco_names_absent_folders(tmp_path):
    (tmp_path / "coco").mkdir()
    with pytest.raises(UserError, match="did you mean 'coco'"):
        open_source(f"coco:{tmp_path}/cocos")
    with pytest.raises(UserError, match=r"no instances_SPLIT.json or captions_SPLIT.json"):
        open_source(f"coco:{tmp_path}/coco")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (
            "images",
            r"instances_val2017\.json, images 2: image id 7 was given before, in images 0; each must be there once",
        ),
        ("categories", r"instances_val2017\.json, categories 2: category id 18 was given before, in categories 0"),
    ],
)
def test_coco_refuses_images_and_categories_of_one_id(tmp_path, kind, line):
    coco(tmp_path)
    file = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content[kind].append(content[kind][0])
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=line):
        open_source(f"coco:{tmp_path}")
    content[kind][-1] = content[kind][0] | {"id": [7]}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"id \[7\] is neither a number nor a text"):
        open_source(f"coco:{tmp_path}")


def test_coco_counts_an_annotation_whose_id_was_given_before_as_bad(tmp_path):
    # The captions number their annotations by themselves; ids that are left out are not the same id.
    captions = [{"id": 1, "image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "two"}]
    nameless = {key: value for key, value in instance(0).items() if key != "id"}
    coco(tmp_path, annotations=[instance(1), instance(1, category_id=18), nameless, nameless], captions=captions)
    source = open_source(f"coco:{tmp_path}")
    assert len(source) == 2 + 1
    assert len(source[0].regions) == 3
    with pytest.raises(BadExample, match=r"instances_val2017.json annotation 1: repeated annotation: .* has this id"):
        source[2]
