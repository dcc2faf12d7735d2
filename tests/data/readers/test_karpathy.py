from __future__ import annotations

import json

import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.data.sources import is_present, list_splits, open_source


def entry(name: str, split: str, captions=("one", " two\n"), **more) -> dict:
    return {"filename": name, "split": split, "sentences": [{"raw": raw} for raw in captions]} | more


FLICKR = [entry("a.png", "train", imgid=0), entry("b.png", "val", imgid=1), entry("c.png", "test", imgid=2)]
COCO = [
    entry("COCO_train2014_1.png", "train", filepath="train2014", cocoid=1),
    entry("COCO_val2014_2.png", "restval", filepath="val2014", cocoid=2),
    entry("COCO_val2014_3.png", "test", filepath="val2014", cocoid=3),
]


def flickr(root, images="flickr30k-images", entries=FLICKR):
    files = {"dataset_flickr30k.json": json.dumps({"dataset": "flickr30k", "images": entries})}
    return write_files(root, files | {f"{images}/{name}.png": png(ord(name)) for name in "abc"})


@pytest.mark.parametrize("images", ["flickr30k-images", "flickr30k_images", "images", "../images", "."])
def test_karpathy_finds_flickr_s_images_beside_the_json(tmp_path, images):
    root = flickr(tmp_path / "flickr30k", images)
    assert list_splits(f"karpathy:{root}/dataset_flickr30k.json") == ("train", "val", "test")
    source = open_source(f"karpathy:{root}", "test")
    assert (source.ids(), len(source), source.labels(), source.classes) == (["c.png"], 1, None, None)
    assert source.provides == {"image", "text"}
    assert source[0].image == png(ord("c"))
    assert source[0].texts == {"en": ("one", "two")}
    assert source[0].extra == {"number": 2}


def test_karpathy_reads_coco_whose_json_lies_beside_or_below_the_images(tmp_path):
    files = {"val2014/COCO_val2014_2.png": png(2), "val2014/COCO_val2014_3.png": png(3)}
    files |= {"train2014/COCO_train2014_1.png": png(1)}
    for place in ("dataset_coco.json", "annotations/dataset_coco.json"):
        write_files(tmp_path, files | {place: json.dumps({"images": COCO})})
        spec = f"karpathy:{tmp_path}/{place}"
        assert open_source(spec, "test")[0].image == png(3)
        assert open_source(spec, "train").ids() == ["COCO_train2014_1.png", "COCO_val2014_2.png"]
        assert open_source(spec, "train")[1].image == png(2), "train lies in two folders"


def test_karpathy_restval_joins_train_or_stands_apart(tmp_path):
    write_files(tmp_path, {"d.json": json.dumps({"images": COCO}), "COCO_val2014_2.png": png(2)})
    assert list_splits(f"karpathy:{tmp_path}/d.json") == ("train", "test")
    apart = f"karpathy:{tmp_path}/d.json?restval=apart"
    assert list_splits(apart) == ("train", "test", "restval")
    assert open_source(apart, "restval").ids() == ["COCO_val2014_2.png"]
    assert open_source(apart, "restval")[0].image == png(2), "all images may lie in one folder"
    with pytest.raises(UserError, match="did you mean 'train'"):
        list_splits(f"karpathy:{tmp_path}/d.json?restval=trian")
    with pytest.raises(UserError, match="did you mean 'images'"):
        list_splits(f"karpathy:{tmp_path}/d.json?image=x")


def test_karpathy_names_a_missing_image(tmp_path):
    flickr(tmp_path, entries=[*FLICKR, entry("gone.png", "test")])
    with pytest.raises(BadExample, match=r"gone\.png: missing file"):
        open_source(f"karpathy:{tmp_path}", "test")[1]


def test_karpathy_names_what_it_looked_for_where_there_are_no_images(tmp_path):
    write_files(tmp_path, {"dataset_coco.json": json.dumps({"images": COCO})})
    with pytest.raises(UserError, match=r"images are not there, for instance val2014/COCO_val2014_3.png.*\?images=DIR"):
        open_source(f"karpathy:{tmp_path}", "test")
    with pytest.raises(UserError, match="no folder of images"):
        open_source(f"karpathy:{tmp_path}?images=/nowhere", "test")
    write_files(tmp_path, {"elsewhere/val2014/COCO_val2014_3.png": png(3)})
    assert open_source(f"karpathy:{tmp_path}?images=elsewhere", "test")[0].image == png(3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a list 'images'"),
        ('{"images": []}', "a list 'images'"),
        ('{"images": [3]}', "image 0: expected an object"),
        (json.dumps({"images": [{"split": "test"}]}), "image 0: 'filename' is missing"),
        (json.dumps({"images": [{"filename": "a"}]}), "image 0: 'split' is missing"),
        (json.dumps({"images": [entry("a", "test", ())]}), "image 0 .a.: it has no 'sentences'"),
        (json.dumps({"images": [{**entry("a", "test"), "sentences": [{"tokens": []}]}]}), "without 'raw' text"),
        (json.dumps({"images": [entry("a", "test"), entry("a", "val")]}), "'a' is listed twice"),
        (json.dumps({"images": [entry("a", "val"), entry("b", "validation")]}), "both mean the val split"),
    ],
)
def test_karpathy_refuses_a_malformed_json_in_one_line(tmp_path, content, message):
    write_files(tmp_path, {"dataset_x.json": content})
    with pytest.raises(UserError, match=rf"dataset_x\.json.*{message}") as caught:
        list_splits(f"karpathy:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_karpathy_needs_one_json(tmp_path):
    assert not is_present(f"karpathy:{tmp_path}")
    with pytest.raises(UserError, match="holds no dataset_"):
        list_splits(f"karpathy:{tmp_path}")
    write_files(tmp_path, {"dataset_flickr30k.json": "{}", "dataset_flickr8k.json": "{}"})
    with pytest.raises(UserError, match="name the JSON"):
        list_splits(f"karpathy:{tmp_path}")
    with pytest.raises(UserError, match=r"did you mean 'dataset_flickr30k\.json'"):
        list_splits(f"karpathy:{tmp_path}/dataset_flickr3k.json")
    assert not is_present(f"karpathy:{tmp_path}/dataset_flickr30k.json")
