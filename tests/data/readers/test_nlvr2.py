from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.data.check import check_source
from vlbench.data.digests import source_fingerprint
from vlbench.data.sources import is_present, list_splits, open_source
from vlbench.stats.consistency import image_set, sentence_group

IDS = ("dev-850-0-0", "dev-850-2-0", "dev-850-2-1", "dev-851-0-0")
IMAGES = {
    f"dev/{pair}-img{place}.png": png(10 * number + place)
    for number, pair in enumerate(("dev-850-0", "dev-850-2", "dev-851-0"))
    for place in (0, 1)
}


def line(identifier: str, label: object = "True", **changes) -> dict:
    return {"identifier": identifier, "sentence": f"About {identifier}.", "label": label, "synset": "dog"} | changes


LINES = [line(IDS[0]), line(IDS[1], "False"), line(IDS[2], "true"), line(IDS[3], False)]


def nlvr2(root, *, name="dev.json", lines=LINES, images=IMAGES):
    text = "".join(f"{json.dumps(item)}\n" for item in lines)
    return write_files(root, {name: text, **images})


def test_nlvr2_reads_pairs_with_their_sentence(tmp_path):
    nlvr2(tmp_path)
    assert list_splits(f"nlvr2:{tmp_path}") == ("val",)
    assert is_present(f"nlvr2:{tmp_path}")
    source = open_source(f"nlvr2:{tmp_path}", "dev")
    assert source.ids() == list(IDS)
    assert source.classes == ("False", "True")
    assert source.labels() == [1, 0, 1, 0]
    assert source.provides == {"image", "pair"}, "the sentence is no caption, the label no class of an image"
    example = source[1]
    assert (example.image, example.extra["right"]) == (png(10), png(11))
    assert (example.texts, example.label) == ({"en": ("About dev-850-2-0.",)}, 0)
    assert {key: value for key, value in example.extra.items() if key != "right"} == {
        "identifier": "dev-850-2-0",
        "group": "dev-850-0",
        "set": "dev-850",
        "image_key": "dev-850-2",
    }


def test_nlvr2_groups_are_those_of_the_metric(tmp_path):
    source = open_source(f"nlvr2:{nlvr2(tmp_path, images={})}")
    for example in (source[i] for i in range(len(source))):
        assert example.extra["group"] == sentence_group(example.id)
        assert example.extra["set"] == image_set(example.id)


def test_nlvr2_source_goes_to_loader_processes(tmp_path):
    source = pickle.loads(pickle.dumps(open_source(f"nlvr2:{nlvr2(tmp_path)}")))
    assert source[3].extra["right"] == png(21)


def test_nlvr2_test_is_the_public_test_set(tmp_path):
    for name in ("train.json", "dev.json", "test1.json", "test2.json"):
        nlvr2(tmp_path, name=f"nlvr2/data/{name}")
    assert list_splits(f"nlvr2:{tmp_path}") == ("train", "val", "test", "test2")
    nlvr2(tmp_path, name="nlvr2/data/test.json")
    with pytest.raises(UserError, match="test and test1 lie together"):
        list_splits(f"nlvr2:{tmp_path}")


@pytest.mark.parametrize("folder", ["dev", "images/dev", "images", "."])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_nlvr2_finds_the_images(tmp_path, folder, suffix):
    images = {f"{folder}/{name[4:-3]}{suffix}": data for name, data in IMAGES.items()}
    source = open_source(f"nlvr2:{nlvr2(tmp_path, images=images)}")
    assert (source[0].image, source[0].extra["right"]) == (png(0), png(1))


def test_nlvr2_finds_images_in_the_directory_of_a_line(tmp_path):
    lines = [line("train-10-0-0", directory=37), line("train-11-0-0", directory="4")]
    images = {f"images/train/37/train-10-0-img{n}.png": png(n) for n in (0, 1)}
    images |= {f"images/train/4/train-11-0-img{n}.png": png(2 + n) for n in (0, 1)}
    source = open_source(f"nlvr2:{nlvr2(tmp_path, name='train.json', lines=lines, images=images)}")
    assert [source[i].extra["right"] for i in (0, 1)] == [png(1), png(3)]
    flat = {f"flat/{name.rpartition('/')[2]}": data for name, data in images.items()}
    root = nlvr2(tmp_path / "b", name="train.json", lines=lines, images=flat)
    assert open_source(f"nlvr2:{root}?images=flat")[1].image == png(2)


def test_nlvr2_reads_one_file_and_no_images(tmp_path):
    nlvr2(tmp_path, images={})
    assert list_splits(f"nlvr2:{tmp_path}/dev.json") == ()
    source = open_source(f"nlvr2:{tmp_path}/dev.json")
    assert (source.split, len(source), source.provides) == ("all", 4, {"pair"})
    assert (source[0].image, "right" in source[0].extra) == (None, False)
    assert not is_present(f"nlvr2:{tmp_path}")
    report = check_source(source)
    assert (report.n_bad, report.classes) == (0, {"False": 2, "True": 2})


def test_nlvr2_reads_the_real_annotations(real_data):
    folder = real_data / "nlvr2"
    if not (folder / "dev_head400.jsonl").is_file():
        pytest.skip(f"no real NLVR2 annotations in {folder}")
    assert list_splits(f"nlvr2:{folder}") == ("dev_head400",)
    source = open_source(f"nlvr2:{folder}", "dev_head400")
    raw = [json.loads(text) for text in (folder / "dev_head400.jsonl").read_text("utf-8").splitlines()]
    assert source.ids() == [item["identifier"] for item in raw]
    assert len(set(source.ids())) == len(source) == 400
    assert [source.classes[label] for label in source.labels()] == [item["label"] for item in raw]
    assert [source[i].texts["en"][0] for i in range(400)] == [item["sentence"].strip() for item in raw]
    sentences: dict[str, set[str]] = {}
    for example in (source[i] for i in range(400)):
        sentences.setdefault(example.extra["group"], set()).add(example.texts["en"][0])
    assert Counter(map(len, sentences.values())) == {1: len(sentences)}, "a group is one sentence"


def test_nlvr2_names_images_that_do_not_exist_or_cannot_be_decoded(tmp_path):
    images = {name: data for name, data in IMAGES.items() if "851-0-img1" not in name}
    images["dev/dev-850-0-img1.png"] = b"no image"
    source = open_source(f"nlvr2:{nlvr2(tmp_path, images=images)}")
    with pytest.raises(BadExample, match=r"dev-851-0-img1\.png: missing file"):
        source[3]
    report = check_source(source)
    assert (report.n, report.n_bad) == (4, 2)
    assert report.bad["not an image"].examples[0].startswith("dev-850-0-0 (right): ")


def test_nlvr2_check_looks_at_both_images_once(tmp_path):
    images = {**IMAGES, "dev/dev-851-0-img1.png": png(0)}
    report = check_source(open_source(f"nlvr2:{nlvr2(tmp_path, images=images)}"))
    assert report.duplicate_examples == ["dev-851-0-0 (right) = dev-850-0-0"]
    assert report.formats == {"PNG": 6}, "the pair with two sentences is no duplicate"


def test_nlvr2_fingerprint_covers_both_images_and_the_label(tmp_path):
    ways = {
        "a": {},
        "same": {"lines": LINES[::-1]},
        "right": {"images": {**IMAGES, "dev/dev-850-0-img1.png": png(99)}},
        "label": {"lines": [line(IDS[0], "False"), *LINES[1:]]},
        "none": {"images": {}},
    }
    prints = {source_fingerprint(open_source(f"nlvr2:{nlvr2(tmp_path / name, **how)}")) for name, how in ways.items()}
    assert len(prints) == 4


BROKEN = {
    "broken JSON": ('{"identifier": "dev-1-0-0"', r"dev\.json, line 2: not valid JSON: "),
    "no object": ("[1]", r"line 2: expected an object, got \[1\]"),
    "another identifier": (line("dev-1-0"), r"line 2: identifier 'dev-1-0' is not SPLIT-SET-PAIR-SENTENCE"),
    "no identifier": ({"sentence": "x", "label": "True"}, r"line 2: 'identifier' is missing"),
    "an identifier twice": (line(IDS[0]), r"line 2: identifier 'dev-850-0-0' was given before, in line 1"),
    "no sentence": (
        {"identifier": "dev-1-0-0", "label": "True"},
        r"line 2 \(dev-1-0-0\): 'sentence' is missing",
    ),
    "an empty sentence": (line("dev-1-0-0", sentence=" "), r"line 2 \(dev-1-0-0\): 'sentence' is empty"),
    "no label": ({"identifier": "dev-1-0-0", "sentence": "x"}, r"line 2 \(dev-1-0-0\): 'label' is missing"),
    "another label": (line("dev-1-0-0", "maybe"), r"line 2 \(dev-1-0-0\): 'label' must be True or False, not 'maybe'"),
    "an escaping folder": (
        line("dev-1-0-0", directory="../../etc"),
        r"line 2 \(dev-1-0-0\): 'directory' '../../etc' is not a plain name",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_nlvr2_names_file_and_line_of_what_is_broken(tmp_path, name):
    broken, message = BROKEN[name]
    text = broken if isinstance(broken, str) else json.dumps(broken)
    write_files(tmp_path, {"dev.json": f"{json.dumps(LINES[0])}\n{text}\n"})
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"nlvr2:{tmp_path}")
    assert "\n" not in str(caught.value)
    assert f"{tmp_path}/dev.json, line 2" in str(caught.value)


def test_nlvr2_refuses_empty_files_and_absent_folders(tmp_path):
    write_files(tmp_path, {"dev.json": "\n\n"})
    with pytest.raises(UserError, match=r"dev\.json: it has no lines"):
        open_source(f"nlvr2:{tmp_path}")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"there is no train\.json, dev\.json or test1\.json"):
        list_splits(f"nlvr2:{tmp_path}/nothing")
