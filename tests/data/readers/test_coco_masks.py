from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.data.check import check_source
from vlbench.data.masks import from_bitmap, to_bitmap, to_rle
from vlbench.data.sources import open_source

IMAGES = [
    {"id": 3, "file_name": "a.png", "height": 12, "width": 10},
    {"id": 7, "file_name": "b.png", "height": 12, "width": 10},
]
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}]
POLYGON = [[1, 2, 4, 2, 4, 6, 1, 6]]


def instance(number: int, **changes) -> dict:
    own = {"id": number, "image_id": 3, "category_id": 18, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12.0}
    return own | {"segmentation": POLYGON} | changes


def coco(root, annotations, images=IMAGES) -> str:
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    files = {"annotations/instances_val.json": json.dumps(content), "val/a.png": png(1), "val/b.png": png(2)}
    write_files(root, files)
    return f"coco:{root}"


def test_an_example_tells_what_a_detector_is_judged_by(tmp_path) -> None:
    crowd = instance(
        2,
        category_id=17,
        iscrowd=1,
        bbox=[0, 0.1, 10, 11.9],
        segmentation={"size": [12, 10], "counts": [0, 120]},
        area=120,
    )
    source = open_source(coco(tmp_path, [instance(1), crowd]), "val")
    full, empty = source[0], source[1]
    assert full.extra["categories"] == (1, 0)
    assert [source.classes[place] for place in full.extra["categories"]] == [region.category for region in full.regions]
    assert full.extra["bboxes"] == ((1, 2, 3, 4), (0, 0.1, 10, 11.9)), "as they are written"
    assert (full.extra["height"], full.extra["width"]) == (12, 10)
    assert [dict(region.attributes) for region in full.regions] == [
        {"iscrowd": 0, "area": 12.0},
        {"iscrowd": 1, "area": 120},
    ]
    masks = [to_bitmap(to_rle(region.segmentation, 12, 10, where="here")) for region in full.regions]
    assert [int(mask.sum()) for mask in masks] == [12, 120]
    assert (empty.regions, empty.extra["categories"], empty.extra["bboxes"]) == ((), (), ())
    assert (empty.extra["height"], empty.extra["width"]) == (12, 10)


WRONG = [
    ({"segmentation": [[1, 1, 5, 5]]}, "bad mask", "a polygon of 4 numbers"),
    ({"segmentation": [[1, 1, 5, 5, 2, 2, 3]]}, "bad mask", "a polygon of 7 numbers"),
    ({"segmentation": {"size": [10, 12], "counts": [120]}}, "bad mask", "but the image is 12 x 10 pixels"),
    ({"segmentation": {"size": [12, 10], "counts": [5, 3]}}, "bad mask", "add up to 8, not to 12 x 10 = 120"),
    ({"segmentation": {"size": [12, 10], "counts": "53"}}, "bad mask", "add up to 8, not to 12 x 10 = 120"),
    ({"bbox": [8, 2, 6, 4]}, "bad box", "reaches outside its image of 12 x 10 pixels"),
    ({"bbox": [30, 30, 2, 2]}, "bad box", "reaches outside its image"),
    ({"bbox": [5, 5, -2, 2]}, "bad box", "has a negative size"),
    ({"image_id": 99}, "dangling annotation", "image_id 99 is not among the images of the file"),
    ({"category_id": 5}, "missing class", "category_id 5 is not among the categories"),
    ({"image_id": [3]}, "dangling annotation", "image_id [3] is not among the images of the file"),
    ({"category_id": {}}, "missing class", "category_id {} is not among the categories"),
    ({"iscrowd": 2}, "bad annotation", "iscrowd 2 is neither 0 nor 1"),
    ({"area": -1}, "bad annotation", "area -1 is not a number of pixels"),
    ({"area": None}, "bad annotation", "area None is not"),
]


@pytest.mark.parametrize("changes, kind, words", WRONG, ids=[f"{place}-{case[1]}" for place, case in enumerate(WRONG)])
def test_a_malformed_annotation_is_one_line_with_file_and_id(tmp_path, changes, kind, words) -> None:
    source = open_source(coco(tmp_path, [instance(41), instance(42, **changes)]), "val")
    assert len(source) == 2 + 1
    assert len(source[0].regions) == len(source[0].extra["categories"]) == 1, "the right one stays"
    with pytest.raises(BadExample) as caught:
        source[2]
    file = tmp_path / "annotations/instances_val.json"
    assert str(caught.value).startswith(f"{file} annotation 42: {kind}: ")
    assert words in caught.value.reason
    assert "\n" not in str(caught.value)


def test_where_all_annotations_are_wrong_that_is_told(tmp_path) -> None:
    source = open_source(coco(tmp_path, [instance(1, bbox=[100, 200, 300, 400])]), "val")
    assert (source.provides, source.classes) == ({"image", "regions", "labels"}, ("cat", "dog"))
    with pytest.raises(BadExample, match=r"annotation 1: bad box: .* reaches outside its image"):
        source[2]


def test_the_check_counts_them_by_kind(tmp_path) -> None:
    annotations = [instance(place, **changes) for place, (changes, *_) in enumerate(WRONG)]
    report = check_source(open_source(coco(tmp_path, [*annotations, instance(99)]), "val"))
    assert {kind: problem.count for kind, problem in report.bad.items()} == {
        "bad annotation": 3,
        "bad box": 3,
        "bad mask": 5,
        "dangling annotation": 2,
        "missing class": 2,
    }
    assert report.regions == 1
    assert "annotation 0: a polygon of 4 numbers" in report.bad["bad mask"].examples[0]


def test_what_coco_itself_has_is_no_error(tmp_path) -> None:
    own = [
        instance(1, bbox=[2.5, 3, 0, 4]),  # boxes without area, and corners rounded to beyond the image
        instance(2, bbox=[0, 0, 10.6, 12.4]),
        instance(3, segmentation=from_bitmap(np.eye(12, 10))),
        instance(4, segmentation=[[-0.5, 2, 10.2, 2, 4, 12.3]]),
        {key: value for key, value in instance(5).items() if key not in ("segmentation", "iscrowd", "area")},
    ]
    source = open_source(coco(tmp_path, own), "val")
    assert len(source) == 2
    assert len(source[0].regions) == 5


def test_without_sizes_in_the_file_there_are_none_to_check_against(tmp_path) -> None:
    bare = [{key: image[key] for key in ("id", "file_name")} for image in IMAGES]
    source = open_source(coco(tmp_path, [instance(1, bbox=[30, 2, 3, 4])], images=bare), "val")
    assert len(source) == 2
    assert "height" not in source[0].extra


@pytest.mark.parametrize("side", [0, -3, "12", 12.5, None])
def test_a_size_that_is_none_is_refused(tmp_path, side) -> None:
    images = [IMAGES[0], IMAGES[1] | {"height": side}]
    with pytest.raises(
        UserError, match=r"instances_val.json: image 7 of height .* and width 10: expected whole pixels"
    ):
        open_source(coco(tmp_path, [instance(1)], images=images), "val")
