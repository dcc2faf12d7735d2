from __future__ import annotations

import collections
import json
import os
import pickle
import re
import struct

import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Region
from vlbench.data.check import check_source
from vlbench.data.digests import source_fingerprint
from vlbench.data.refer_convert import convert, load_plain, main
from vlbench.data.sources import is_present, list_splits, open_source

NAMES = {1: "COCO_train2014_000000000001.jpg", 2: "COCO_train2014_000000000002.jpg"}
IMAGES = {f"train2014/{name}": png(number, 40, 60) for number, name in NAMES.items()}
BOXES = {10: (1, [1, 2, 3, 4]), 11: (1, [0, 0, 60.4, 40]), 12: (2, [5, 6, 7, 8]), 13: (2, [5, 6, 0, 8])}


def instances(**changes) -> dict:
    whole = {
        "images": [{"id": n, "file_name": name, "width": 60, "height": 40} for n, name in NAMES.items()],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [
            {"id": number, "image_id": image, "category_id": 18, "bbox": box}
            for number, (image, box) in sorted(BOXES.items())
        ],
    }
    return whole | changes


def ref(number: int, annotation: int = 10, split: str = "val", **changes) -> dict:
    sentences = [
        {"sent_id": 10 * number + n, "sent": text, "raw": text, "tokens": text.split()} for n, text in enumerate("ab")
    ]
    whole = {"ref_id": number, "ann_id": annotation, "image_id": BOXES[annotation][0], "category_id": 18}
    return whole | {"split": split, "sentences": sentences, "file_name": "x", "sent_ids": [0, 1]} | changes


REFS = [ref(5, 11), ref(4, 10), ref(3, 12, "testA"), ref(2, 12, "testB"), ref(1, 10, "train")]


def refcoco(root, *, refs=REFS, boxes=None, images=IMAGES, name="refs(unc).json"):
    files = {name: json.dumps(refs), "instances.json": json.dumps(instances() if boxes is None else boxes)}
    return write_files(root, {**files, **images})


# ------------------------------------------------------------------------------------------------------------- reader


def test_refcoco_reads_references_with_all_boxes_of_the_image(tmp_path):
    refcoco(tmp_path)
    assert list_splits(f"refcoco:{tmp_path}") == ("train", "val", "testA", "testB")
    assert is_present(f"refcoco:{tmp_path}")
    source = open_source(f"refcoco:{tmp_path}", "val")
    assert source.ids() == ["5", "4"]
    assert source.provides == {"image", "regions", "expression"}, "a phrase for an object is no caption"
    assert (source.classes, source.labels()) == (None, None)
    example = source[0]
    assert example.image == png(1, 40, 60)
    assert example.texts == {"en": ("a", "b")}
    assert example.regions == (
        Region("dog", (1.0, 2.0, 4.0, 6.0), attributes={"annotation_id": 10}),
        Region("dog", (0.0, 0.0, 60.0, 40.0), attributes={"annotation_id": 11}),
    ), "a box that leaves its image by a fraction of a pixel is cut"
    assert example.extra == {
        "target": 1,
        "sentence_ids": (50, 51),
        "image_id": 1,
        "image_key": "1",
        "split": "val",
    }
    assert source[1].extra["target"] == 0
    assert open_source(f"refcoco:{tmp_path}", "testB")[0].regions[0].box_xyxy == (5.0, 6.0, 12.0, 14.0)


def test_refcoco_source_goes_to_loader_processes(tmp_path):
    source = pickle.loads(pickle.dumps(open_source(f"refcoco:{refcoco(tmp_path)}", "testA")))
    assert source[0].image == png(2, 40, 60)


def test_refcoco_chooses_among_divisions(tmp_path):
    refcoco(tmp_path)
    refcoco(tmp_path, refs=[ref(7, 12, "test")], name="refs(google).json")
    with pytest.raises(UserError, match=r"say \?by=.*google.*unc"):
        list_splits(f"refcoco:{tmp_path}")
    assert list_splits(f"refcoco:{tmp_path}?by=google") == ("test",)
    assert open_source(f"refcoco:{tmp_path}?by=unc", "train").ids() == ["1"]


@pytest.mark.parametrize("folder", ["train2014", "images/train2014", "images/mscoco/images/train2014", "../train2014"])
def test_refcoco_finds_the_images(tmp_path, folder):
    images = {f"{folder}/{name}": png(number) for number, name in NAMES.items()}
    source = open_source(f"refcoco:{refcoco(tmp_path / 'refcoco+', images=images)}", "testA")
    assert source[0].image == png(2)


def test_refcoco_without_images_has_its_phrases(tmp_path):
    refcoco(tmp_path / "a", images={})
    source = open_source(f"refcoco:{tmp_path}/a", "val")
    assert source.provides == {"regions", "expression"}
    assert (source[0].image, len(source[0].regions)) == (None, 2)
    assert not is_present(f"refcoco:{tmp_path}/a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the images are not there, for instance COCO_train2014_000000000001\.jpg"):
        open_source(f"refcoco:{tmp_path}/a?images={tmp_path}/empty", "val")


def test_refcoco_check_names_missing_images_and_takes_no_duplicates(tmp_path):
    images = {name: data for name, data in IMAGES.items() if "02.jpg" not in name}
    refcoco(tmp_path, images=images, refs=[*REFS, ref(9, 12)])
    source = open_source(f"refcoco:{tmp_path}", "val")
    with pytest.raises(BadExample, match=r"000000000002\.jpg: missing file"):
        source[2]
    report = check_source(source)
    assert (report.n, report.n_bad, report.duplicates, report.regions) == (3, 1, 0, 4)
    assert report.languages == {"en": 4}


def test_refcoco_fingerprint_covers_target_phrases_and_boxes(tmp_path):
    moved = instances()
    moved["annotations"][0] = {**moved["annotations"][0], "bbox": [1, 2, 3, 5]}
    other = ref(5, 11)
    other["sentences"][0]["sent"] = "another"
    ways = {
        "a": {},
        "same": {"refs": REFS[::-1]},
        "target": {"refs": [ref(5, 10), *REFS[1:]]},
        "phrase": {"refs": [other, *REFS[1:]]},
        "box": {"boxes": moved},
    }
    prints = {
        source_fingerprint(open_source(f"refcoco:{refcoco(tmp_path / name, **how)}", "val"))
        for name, how in ways.items()
    }
    assert len(prints) == 4


def boxed(box) -> dict:
    return {"boxes": instances(annotations=[{"id": 10, "image_id": 1, "category_id": 18, "bbox": box}])}


BROKEN = {
    "a box outside its image": (
        boxed([50, 0, 20, 10]),
        r"instances\.json, annotations 0 \(id 10\): bbox \[50, 0, 20, 10\] reaches outside its image of 40 x 60 pixels",
    ),
    "a box of negative width": (boxed([50, 0, -20, 10]), r"\(id 10\): bbox .* has a negative size"),
    "a box of three": (boxed([1, 2, 3]), r"\(id 10\): bbox \[1, 2, 3\] is not \[left, top, width, height\]"),
    "a box of no numbers": (boxed([1, 2, 3, "4"]), r"\(id 10\): bbox .* is not \[left, top, width, height\]"),
    "a box of NaN": (boxed([1, 2, float("nan"), 4]), r"\(id 10\): bbox .* has a number that is not finite"),
    "no box": (
        {"boxes": instances(annotations=[{"id": 10, "image_id": 1, "category_id": 18}])},
        r"\(id 10\): 'bbox' is missing",
    ),
    "a box of an unknown image": (
        {"boxes": instances(annotations=[{"id": 10, "image_id": 9, "category_id": 18, "bbox": [0, 0, 1, 1]}])},
        r"\(id 10\): image_id 9 is not among the images of the file",
    ),
    "a box of an unknown category": (
        {"boxes": instances(annotations=[{"id": 10, "image_id": 1, "category_id": 9, "bbox": [0, 0, 1, 1]}])},
        r"\(id 10\): category_id 9 is not among the categories",
    ),
    "an annotation twice": (
        {"boxes": instances(annotations=[instances()["annotations"][0]] * 2)},
        r"annotations 1 \(id 10\): annotation id 10 was given before, in annotations 0",
    ),
    "an image twice": (
        {"boxes": instances(images=[instances()["images"][0]] * 2)},
        r"images 1 \(id 1\): image id 1 was given before, in images 0",
    ),
    "a target without area": (
        {"refs": [ref(5, 13)]},
        r"refs 0 \(ref_id 5\): the box of ann_id 13 has no area",
    ),
    "an unknown image": ({"refs": [ref(5, image_id=9)]}, r"\(ref_id 5\): image_id 9 is not among the images"),
    "an unknown annotation": ({"refs": [ref(5, ann_id=9)]}, r"\(ref_id 5\): ann_id 9 is not among the annotations"),
    "a target in another image": (
        {"refs": [ref(5, ann_id=12)]},
        r"\(ref_id 5\): ann_id 12 belongs to image 2, the reference to image 1",
    ),
    "a reference twice": ({"refs": [ref(5), ref(5)]}, r"refs 1 \(ref_id 5\): ref_id 5 was given before, in refs 0"),
    "a phrase twice": (
        {"refs": [ref(5), ref(6, sentences=ref(5)["sentences"])]},
        r"refs 1 \(ref_id 6\), sentence 0: sent_id 50 was given before",
    ),
    "no phrases": ({"refs": [ref(5, sentences=[])]}, r"\(ref_id 5\): it has no sentences"),
    "an empty phrase": (
        {"refs": [ref(5, sentences=[{"sent_id": 1, "sent": ""}])]},
        r"\(ref_id 5\), sentence 0: 'sent' is empty",
    ),
    "no split": ({"refs": [{"ref_id": 5}]}, r"refs 0: 'split' is missing"),
    "no references": ({"refs": []}, r"expected an object with a list 'refs'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refcoco_names_file_and_id_of_what_is_broken(tmp_path, name):
    how, message = BROKEN[name]
    refcoco(tmp_path, **how)
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"refcoco:{tmp_path}", "val")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_refcoco_names_absent_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"there is no refs\(unc\)\.json"):
        list_splits(f"refcoco:{tmp_path}")
    write_files(tmp_path, {"refs(unc).json": json.dumps(REFS)})
    with pytest.raises(UserError, match=r"instances\.json: cannot be read: No such file"):
        open_source(f"refcoco:{tmp_path}", "val")
    write_files(tmp_path, {"refs(unc).json": "[\n{]"})
    with pytest.raises(UserError, match=r"refs\(unc\)\.json: not valid JSON: .*line 2"):
        open_source(f"refcoco:{tmp_path}", "val")


# ---------------------------------------------------------------------------------------------------------- converter


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_convert_makes_json_that_the_reader_reads(tmp_path, protocol):
    refcoco(tmp_path / "json")
    refcoco(tmp_path / "pickle")
    (tmp_path / "pickle" / "refs(unc).json").unlink()
    write_files(tmp_path / "pickle", {"refs(unc).p": pickle.dumps(REFS, protocol)})
    with pytest.raises(UserError, match=re.escape(f"vlbench.data.refer_convert '{tmp_path}/pickle/refs(unc).p'")):
        list_splits(f"refcoco:{tmp_path}/pickle")
    assert convert(tmp_path / "pickle" / "refs(unc).p") == tmp_path / "pickle" / "refs(unc).json"
    sources = [open_source(f"refcoco:{tmp_path}/{name}", "val") for name in ("json", "pickle")]
    assert [source[i] for source in sources[:1] for i in range(2)] == [sources[1][i] for i in range(2)]


def test_load_plain_reads_python_2_and_every_plain_type():
    assert load_plain(b"(lp0\n(dp1\nS'sent'\np2\nS'a caf\\xc3\\xa9'\np3\nsa.", where="f") == [{"sent": "a café"}]
    plain = [None, True, False, 0, -1, 1 << 80, 1.5, "é", b"\x00\xff" * 200, (), (1,), (1, 2, 3, 4), {"a": [{}]}]
    for protocol in (3, 4, 5):
        assert load_plain(pickle.dumps(plain, protocol), where="f") == plain
    assert load_plain(pickle.dumps([{1, 2}, frozenset({3})], 4), where="f") == [{1, 2}, frozenset({3})]


class _Runs:
    def __reduce__(self):
        return (os.mkdir, ("made-by-a-pickle",))


HOSTILE = {
    "a call": (pickle.dumps([_Runs()], 2), r"at byte \d+ it would run something \(GLOBAL 'posix mkdir'\)"),
    "a call, protocol 0": (pickle.dumps([_Runs()], 0), r"it would run something \(GLOBAL 'posix mkdir'\)"),
    "a call, protocol 4": (pickle.dumps([_Runs()], 4), r"it would run something \(STACK_GLOBAL\)"),
    "a harmless class": (pickle.dumps(collections.OrderedDict(a=1), 2), r"GLOBAL 'collections OrderedDict'"),
    "an instance": (b"(iposix\nsystem\n.", r"it would run something \(INST 'posix system'\)"),
    "an extension": (b"\x80\x02\x82\x01.", r"it would run something \(EXT1\)"),
    "something kept elsewhere": (b"Pelsewhere\n.", r"it would run something \(PERSID 'elsewhere'\)"),
    "a buffer": (b"\x80\x05\x97.", r"it would run something \(NEXT_BUFFER\)"),
    "a reduction": (b"]]R.", r"it would run something \(REDUCE\)"),
    "a state": (b"]}b.", r"it would run something \(BUILD\)"),
    "a far place": (b"]r" + struct.pack("<I", 1 << 31) + b".", r"it stores at 2147483648, which no writer does"),
    "a far place in digits": (b"]p99999999999\n.", r"it stores at 99999999999, which no writer does"),
    "something behind its end": (pickle.dumps([1]) + pickle.dumps([_Runs()]), r"something follows after its end"),
    "a cut file": (pickle.dumps(REFS)[:-20], r"not a whole pickle"),
    "a claim of much": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", r"not a whole pickle"),
    "no pickle": (b"<html>not found</html>", r"not a whole pickle"),
    "nothing": (b"", r"not a whole pickle"),
    "an empty stack": (b"a.", r"not a well-formed pickle|not a whole pickle"),
    "a text without quotes": (b"Sabc\n.", r"not a well-formed pickle: UnpicklingError"),
    "an unknown opcode": (b"]\xff.", r"not a whole pickle: byte 1 is b'\\xff', which begins nothing"),
    "a hash of a list": (b"}]]s.", r"not a well-formed pickle: TypeError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_load_plain_refuses_everything_else_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, message = HOSTILE[name]
    (tmp_path / "refs(unc).p").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / "refs(unc).p")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/refs(unc).p: ")
    assert [path.name for path in tmp_path.iterdir()] == ["refs(unc).p"], "nothing ran and nothing was written"


def test_the_hostile_pickles_would_do_something(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["a call"][0])
    assert (tmp_path / "made-by-a-pickle").is_dir()


def _python_2(content: object) -> bytes:
    """As Python 2 writes it, whose texts are bytes: a lone surrogate stands for a byte that is no UTF-8."""
    data = pickle.dumps(content, 0)
    return re.sub(rb"V([^\n]*)\n", lambda match: b"S'" + match[1].replace(rb"\udce9", rb"\xe9") + b"'\n", data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"refs": []}, "expected a list of references, got dict"),
        ([], "expected a list of references, got list"),
        ([3], "reference 0: expected a dict, got int"),
        ([{"ref_id": 1}], "reference 0: 'ann_id' is missing"),
        ([ref(1), ref(2, split=3)], "reference 1: 'split' is int, expected str"),
        ([ref(1, ann_id=True)], "reference 0: 'ann_id' is bool, expected int"),
        ([ref(1, split="caf\udce9")], r"reference 0: 'split' is no UTF-8: 'caf\\udce9'"),
        ([ref(1, sentences=["x"])], r"reference 0 \(ref_id 1\): sentence 0 is no dict"),
        ([ref(1, sentences=[{"sent": "x"}])], r"reference 0 \(ref_id 1\), sentence 0: 'sent_id' is missing"),
    ],
)
def test_convert_names_the_reference_that_is_broken(tmp_path, content, message):
    (tmp_path / "refs(unc).p").write_bytes(_python_2(content))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "refs(unc).p")
    assert not (tmp_path / "refs(unc).json").exists()


def test_convert_is_a_command_of_its_own(tmp_path, capsys):
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFS, 2))
    assert main([f"{tmp_path}/refs(unc).p"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/refs(unc).json\n"
    written = json.loads((tmp_path / "refs(unc).json").read_text("utf-8"))
    assert [item["ref_id"] for item in written] == [5, 4, 3, 2, 1]
    assert written[0]["sentences"] == [{"sent_id": 50, "sent": "a"}, {"sent_id": 51, "sent": "b"}]
    assert main([f"{tmp_path}/absent.p"]) == 2
    assert "absent.p: cannot be read: No such file" in capsys.readouterr().err
    assert main([]) == 2
    with pytest.raises(UserError, match="it would be written over"):
        convert(tmp_path / "refs(unc).p", tmp_path / "refs(unc).p")
