"""One broken thing in the files that the embedded world writes: one line that names the file and the id."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlbench.core.errors import BadExample, UserError
from vlbench.data.check import check_source
from vlbench.data.shapes.world import GROUPS, TINY
from vlbench.data.shapes.write import write_world
from vlbench.data.sources import open_source

QUESTIONS = "vqa/v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "vqa/v2_mscoco_train2014_annotations.json"
REFS = "refcoco/refs(unc).json"
INSTANCES = "refcoco/instances.json"
SIZES = replace(TINY, pixels=16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four parts as they are written, unbroken."""
    return write_world(tmp_path_factory.mktemp("whole") / "world", sizes=SIZES, workers=1, parts=GROUPS["finetune"])


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Callable[[str, Callable[[Any], Any]], Path]:
    """Copies a part and changes one of its files."""

    def make(name: str, change: Callable[[Any], Any]) -> Path:
        part = name.partition("/")[0]
        shutil.copytree(whole / part, tmp_path / part)
        file = tmp_path / name
        lines = file.suffix == ".jsonl" or part == "nlvr2"
        text = file.read_text()
        content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        change(content)
        file.write_text("".join(f"{json.dumps(line)}\n" for line in content) if lines else json.dumps(content))
        return tmp_path / part

    return make


def put(place: int, key: str, value: Any, within: str | None = None) -> Callable[[Any], None]:
    """Sets a key of one entry of the file, or of its list ``within``."""

    def change(content: Any) -> None:
        (content if within is None else content[within])[place][key] = value

    return change


def again(place: int, within: str | None = None) -> Callable[[Any], None]:
    """Repeats an entry at the end."""

    def change(content: Any) -> None:
        entries = content if within is None else content[within]
        entries.append(entries[place])

    return change


def three_answers(content: Any) -> None:
    del content["annotations"][4]["answers"][3:]


CASES = {
    "three answers": (
        ANNOTATIONS,
        three_answers,
        r"_annotations\.json, annotations 4 \(question_id 2001\): 10 answers expected, 3 found",
    ),
    "an answer that is a number": (
        ANNOTATIONS,
        lambda content: content["annotations"][0]["answers"][9].update(answer=2),
        r"annotations 0 \(question_id 1000\): answer 9 has no 'answer' text",
    ),
    "a question twice": (
        QUESTIONS,
        again(1, "questions"),
        r"_questions\.json, questions \d+ \(question_id 1001\): question_id 1001 was given before, in questions 1",
    ),
    "an annotation twice": (
        ANNOTATIONS,
        again(1, "annotations"),
        r"annotations \d+ \(question_id 1001\): question_id 1001 was given before, in annotations 1",
    ),
    "a question about another image": (
        QUESTIONS,
        put(5, "image_id", 77_777, "questions"),
        r"questions 5 \(question_id 2002\): it is about image 77777, its annotation in .*annotations\.json about 2",
    ),
    "a question that is not annotated": (
        QUESTIONS,
        put(5, "question_id", 5, "questions"),
        r"questions 5 \(question_id 5\): it has no annotation in .*_annotations\.json",
    ),
    "an identifier without its sentence": (
        "nlvr2/train.json",
        put(2, "identifier", "train-0-2"),
        r"train\.json, line 3: identifier 'train-0-2' is not SPLIT-SET-PAIR-SENTENCE \(dev-850-2-0\)",
    ),
    "an identifier twice": (
        "nlvr2/train.json",
        again(0),
        r"train\.json, line \d+: identifier 'train-0-\d-0' was given before, in line 1",
    ),
    "neither True nor False": (
        "nlvr2/train.json",
        put(0, "label", "unsure"),
        r"train\.json, line 1 \(train-0-\d-0\): 'label' must be True or False, not 'unsure'",
    ),
    "a gold label that does not exist": (
        "snli_ve/snli_ve_train.jsonl",
        put(3, "gold_label", "contradicts"),
        r"train\.jsonl, line 4 \(10000\d+\.jpg#\dr1\w\): .*gold_label 'contradicts'.*did you mean 'contradiction'",
    ),
    "a pair twice": (
        "snli_ve/snli_ve_train.jsonl",
        again(0),
        r"train\.jsonl, line \d+: pairID '1000000000\.jpg#0r1\w' was given before, in line 1",
    ),
    "a pair without an image": (
        "snli_ve/snli_ve_train.jsonl",
        put(1, "Flickr30K_ID", None),
        r"train\.jsonl, line 2 \(1000000000\.jpg#1r1\w\): 'Flickr30K_ID' must be text, not None",
    ),
    "a ref to an unknown annotation": (
        REFS,
        put(7, "ann_id", 999_999),
        r"refs\(unc\)\.json, refs 7 \(ref_id 7\): ann_id 999999 is not among the annotations of instances\.json",
    ),
    "a ref to an unknown image": (
        REFS,
        put(7, "image_id", 999_999),
        r"refs 7 \(ref_id 7\): image_id 999999 is not among the images of instances\.json",
    ),
    "a ref to another image's annotation": (
        REFS,
        put(0, "ann_id", 50),
        r"refs 0 \(ref_id 0\): ann_id 50 belongs to image 5, the reference to image 1",
    ),
    "a ref twice": (REFS, again(3), r"refs \d+ \(ref_id 3\): ref_id 3 was given before, in refs 3"),
    "a ref without sentences": (REFS, put(3, "sentences", []), r"refs 3 \(ref_id 3\): it has no sentences"),
    "a box outside its image": (
        INSTANCES,
        put(2, "bbox", [3, 4, 5, 60], "annotations"),
        r"annotations 2 \(id \d+\): bbox \[3, 4, 5, 60\] reaches outside its image of 16 x 16 pixels",
    ),
    "a box of three numbers": (
        INSTANCES,
        put(2, "bbox", [3, 4, 5], "annotations"),
        r"annotations 2 \(id \d+\): bbox \[3, 4, 5\] is not \[left, top, width, height\]",
    ),
    "an annotation twice in instances": (
        INSTANCES,
        again(0, "annotations"),
        r"annotations \d+ \(id 10\): annotation id 10 was given before, in annotations 0",
    ),
    "an image twice": (INSTANCES, again(0, "images"), r"images \d+ \(id 1\): image id 1 was given before, in images 0"),
    "a category twice": (
        INSTANCES,
        again(6, "categories"),
        r"categories 8 \(id 7\): category id 7 was given before, in categories 6",
    ),
    "an annotation of an unknown category": (
        INSTANCES,
        put(0, "category_id", 99, "annotations"),
        r"annotations 0 \(id 10\): category_id 99 is not among the categories of the file",
    ),
    "an annotation of an unknown image": (
        INSTANCES,
        put(0, "image_id", 5_000, "annotations"),
        r"annotations 0 \(id 10\): image_id 5000 is not among the images of the file",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_broken_annotation_is_one_line_with_file_and_id(broken, case):
    name, change, message = CASES[case]
    root = broken(name, change)
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"{root.name}:{root}", "train")
    assert "\n" not in str(caught.value)
    assert f"{root.parent / name}" in str(caught.value)


def test_the_files_are_whole_before(whole):
    for part in GROUPS["finetune"]:
        assert check_source(open_source(f"{part}:{whole}/{part}", "train")).n_bad == 0


MISSING = {
    "vqa": ("train2014/000000000002.png", r"question_id 200\d"),
    "nlvr2": ("images/train/0/train-1-0-img1.png", r"train-1-0-\d"),
    "snli_ve": ("flickr30k-images/1000000001.png", r"pairID 1000000001\.jpg#\dr1\w"),
    "refcoco": ("train2014/000000000002.png", r"ref_id [23]"),
}


@pytest.mark.parametrize("part", MISSING)
def test_missing_image_is_one_line_with_file_and_id(whole, tmp_path, part):
    name, who = MISSING[part]
    root = shutil.copytree(whole / part, tmp_path / part)
    (root / name).unlink()
    source = open_source(f"{part}:{root}", "train")
    lines = []
    for index in range(len(source)):
        try:
            source[index]
        except BadExample as error:
            lines.append(str(error))
    assert 0 < len(lines) < len(source)
    for line in lines:
        assert re.fullmatch(rf"{re.escape(str(root / name))}: missing file: .*; it is the image of {who}", line), line
    assert check_source(source).n_bad == len(lines)


def test_image_id_that_does_not_exist_is_named_with_its_question(broken, tmp_path):
    def elsewhere(content: Any) -> None:
        content["questions"][5]["image_id"] = 77_777

    root = broken(QUESTIONS, elsewhere)
    file = tmp_path / ANNOTATIONS
    content = json.loads(file.read_text())
    content["annotations"][5]["image_id"] = 77_777
    file.write_text(json.dumps(content))
    with pytest.raises(BadExample, match=r"/000000077777\.png: missing file: .* image of question_id 2002$"):
        open_source(f"vqa:{root}", "train")[5]
