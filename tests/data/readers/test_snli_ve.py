from __future__ import annotations

import json
import pickle

import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.data.check import check_source
from vlbench.data.digests import source_fingerprint
from vlbench.data.sources import is_present, list_splits, open_source

IMAGES = {"flickr30k-images/100.jpg": png(1), "flickr30k-images/200.jpg": png(2)}


def pair(name: str, image: object = "100", label: str = "entailment", **changes) -> dict:
    whole = {"pairID": name, "Flickr30K_ID": image, "gold_label": label, "sentence1": "A premise."}
    return whole | {"sentence2": f"Hypothesis {name} .", "annotator_labels": [label]} | changes


LINES = [
    pair("100.jpg#0r1e"),
    pair("100.jpg#0r1n", label="neutral"),
    pair("200.jpg#1r1-", "200", "-"),
    pair("200.jpg#1r1c", "200", "contradiction"),
]


def snli(root, *, name="snli_ve_test.jsonl", lines=LINES, images=IMAGES):
    return write_files(root, {name: "".join(f"{json.dumps(item)}\n" for item in lines), **images})


def test_snli_ve_reads_pairs_and_leaves_out_the_undecided(tmp_path):
    snli(tmp_path)
    assert list_splits(f"snli_ve:{tmp_path}") == ("test",)
    assert is_present(f"snli_ve:{tmp_path}")
    source = open_source(f"snli_ve:{tmp_path}", "test")
    assert source.ids() == ["100.jpg#0r1e", "100.jpg#0r1n", "200.jpg#1r1c"]
    assert source.undecided == 1
    assert source.classes == ("contradiction", "neutral", "entailment")
    assert source.labels() == [2, 1, 0]
    assert source.provides == {"image", "hypothesis"}, "a hypothesis is no caption, its label no class of an image"
    example = source[2]
    assert (example.id, example.image, example.label) == ("200.jpg#1r1c", png(2), 0)
    assert example.texts == {"en": ("Hypothesis 200.jpg#1r1c .",)}
    assert example.extra == {"image_key": "200", "premise": "A premise."}


def test_snli_ve_knows_its_splits(tmp_path):
    for name in ("snli_ve_train.jsonl", "snli_ve_dev.jsonl", "snli_ve_test.jsonl"):
        snli(tmp_path, name=name)
    write_files(tmp_path, {"notes.jsonl": "{}"})
    assert list_splits(f"snli_ve:{tmp_path}") == ("train", "val", "test")
    assert open_source(f"snli_ve:{tmp_path}", "dev").split == "val"


def test_snli_ve_source_goes_to_loader_processes(tmp_path):
    source = pickle.loads(pickle.dumps(open_source(f"snli_ve:{snli(tmp_path)}")))
    assert source[0].image == png(1)


@pytest.mark.parametrize("key", ["Flickr30K_ID", "Flickr30kID", "Flikr30kID"])
@pytest.mark.parametrize("value", ["100", "100.jpg", 100])
def test_snli_ve_knows_every_spelling_of_the_image(tmp_path, key, value):
    line = pair("p") | {key: value}
    if key != "Flickr30K_ID":
        del line["Flickr30K_ID"]
    source = open_source(f"snli_ve:{snli(tmp_path, lines=[line])}")
    assert (source[0].image, source[0].extra["image_key"]) == (png(1), "100")


@pytest.mark.parametrize("folder", ["flickr30k_images", "images", "flickr30k/flickr30k-images", "../flickr30k-images"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_snli_ve_finds_the_images(tmp_path, folder, suffix):
    images = {f"{folder}/{name}.{suffix}": png(seed) for name, seed in (("100", 1), ("200", 2))}
    source = open_source(f"snli_ve:{snli(tmp_path / 've', images=images)}")
    assert [source[i].image for i in range(3)] == [png(1), png(1), png(2)]


def test_snli_ve_takes_the_images_from_the_option_or_has_none(tmp_path):
    root = snli(tmp_path / "ve", images={"../elsewhere/100.jpg": png(1)})
    assert open_source(f"snli_ve:{root}").provides == {"hypothesis"}
    assert not is_present(f"snli_ve:{root}")
    assert open_source(f"snli_ve:{root}?images={tmp_path}/elsewhere")[0].image == png(1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the images are not there, for instance 100\.jpg or 100\.png"):
        open_source(f"snli_ve:{root}?images={tmp_path}/empty")


def test_snli_ve_check_names_missing_images_and_counts_classes(tmp_path):
    source = open_source(f"snli_ve:{snli(tmp_path, lines=[*LINES, pair('300.jpg#0r1e', '300')])}")
    with pytest.raises(BadExample, match=r"300\.jpg: missing file"):
        source[3]
    report = check_source(source)
    assert (report.n, report.n_bad, report.duplicates) == (4, 1, 0)
    assert report.classes == {"contradiction": 1, "entailment": 1, "neutral": 1}
    assert report.formats == {"PNG": 2}


def test_snli_ve_fingerprint_covers_sentence_label_and_image(tmp_path):
    ways = {
        "a": {},
        "same": {"lines": LINES[::-1]},
        "sentence": {"lines": [pair("100.jpg#0r1e", sentence2="Another."), *LINES[1:]]},
        "label": {"lines": [pair("100.jpg#0r1e", label="neutral"), *LINES[1:]]},
        "image": {"images": {**IMAGES, "flickr30k-images/200.jpg": png(3)}},
    }
    prints = {source_fingerprint(open_source(f"snli_ve:{snli(tmp_path / name, **how)}")) for name, how in ways.items()}
    assert len(prints) == 4


BROKEN = {
    "broken JSON": ('{"pairID"', r"not valid JSON: "),
    "no object": ("3", r"expected an object, got 3"),
    "another label": (pair("p", label="entailed"), r"line 2 \(p\): .*gold_label 'entailed'.*did you mean 'entailment'"),
    "no label": ({"pairID": "p"}, r"line 2 \(p\): 'gold_label' is missing"),
    "no id": ({"gold_label": "neutral"}, r"line 2: 'pairID' is missing"),
    "an id twice": (LINES[0], r"line 2: pairID '100.jpg#0r1e' was given before, in line 1"),
    "no sentence": (pair("p", sentence2=""), r"line 2 \(p\): 'sentence2' is empty"),
    "no image": (
        {"pairID": "p", "gold_label": "neutral", "sentence2": "x"},
        r"line 2 \(p\): 'Flickr30K_ID' is missing",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_snli_ve_names_file_and_line_of_what_is_broken(tmp_path, name):
    broken, message = BROKEN[name]
    text = broken if isinstance(broken, str) else json.dumps(broken)
    write_files(tmp_path, {"snli_ve_test.jsonl": f"{json.dumps(LINES[0])}\n{text}\n"})
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"snli_ve:{tmp_path}")
    assert "\n" not in str(caught.value)
    assert f"{tmp_path}/snli_ve_test.jsonl, line 2" in str(caught.value)


def test_snli_ve_refuses_files_without_a_decided_pair(tmp_path):
    with pytest.raises(UserError, match="it has no line with a gold label"):
        open_source(f"snli_ve:{snli(tmp_path, lines=[LINES[2]])}")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"there is no snli_ve_train\.jsonl"):
        list_splits(f"snli_ve:{tmp_path}/nothing")
