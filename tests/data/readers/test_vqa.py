from __future__ import annotations

import json
import pickle

import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.data.check import check_source
from vlbench.data.digests import source_fingerprint
from vlbench.data.sources import is_present, list_splits, open_source

IMAGES = {"train2014/COCO_train2014_000000000009.jpg": png(1), "train2014/COCO_train2014_000000000025.jpg": png(2)}
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"


def question(number: int, image: int, text: str = "What is it?") -> dict:
    return {"question_id": number, "image_id": image, "question": text}


def annotation(number: int, image: int, **changes) -> dict:
    answers = [{"answer": f"a{n % 3}", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)]
    whole = {"question_id": number, "image_id": image, "answers": answers, "answer_type": "other"}
    return whole | {"question_type": "what is", "multiple_choice_answer": "a0"} | changes


ASKED = [question(9001, 9), question(9000, 9, "How many?"), question(25000, 25)]
TOLD = [annotation(25000, 25), annotation(9000, 9, answer_type="number"), annotation(9001, 9)]


def vqa(root, *, split="train2014", asked=ASKED, told=TOLD, images=IMAGES, place=""):
    files = {place + QUESTIONS.format(split): json.dumps({"info": {}, "questions": asked})}
    if told is not None:
        files[place + ANNOTATIONS.format(split)] = json.dumps({"info": {}, "annotations": told})
    return write_files(root, {**files, **images})


def test_vqa_reads_questions_with_their_answers(tmp_path):
    vqa(tmp_path)
    assert list_splits(f"vqa:{tmp_path}") == ("train",)
    assert is_present(f"vqa:{tmp_path}")
    source = open_source(f"vqa:{tmp_path}", "train")
    assert source.ids() == ["9001", "9000", "25000"], "in the order of the questions' file"
    assert source.provides == {"image", "question"}, "no captions and no labels"
    assert (source.classes, source.labels()) == (None, None)
    assert source[1].image == png(1)
    assert source[1].extra == {
        "question_id": 9000,
        "image_id": 9,
        "image_key": "9",
        "question": "How many?",
        "answers": ("a0", "a1", "a2", "a0", "a1", "a2", "a0", "a1", "a2", "a0"),
        "answer_type": "number",
        "question_type": "what is",
        "multiple_choice_answer": "a0",
    }
    assert (source[2].image, source[2].texts, source[2].label) == (png(2), {}, None)
    assert list(source.leading_answers()) == ["a0"] * 3


def test_vqa_source_goes_to_loader_processes(tmp_path):
    source = pickle.loads(pickle.dumps(open_source(f"vqa:{vqa(tmp_path)}")))
    assert source[0].extra["question"] == "What is it?"


def test_vqa_test_dev_has_no_annotations_and_the_images_of_test(tmp_path):
    images = {"test2015/COCO_test2015_000000000009.jpg": png(1), "test2015/COCO_test2015_000000000025.jpg": png(2)}
    vqa(tmp_path, split="test-dev2015", told=None, images=images)
    vqa(tmp_path, split="test2015", told=None, images={})
    vqa(tmp_path)
    assert list_splits(f"vqa:{tmp_path}") == ("train", "test", "test-dev")
    source = open_source(f"vqa:{tmp_path}", "test-dev")
    assert source[0].image == png(1)
    assert set(source[0].extra) == {"question_id", "image_id", "image_key", "question"}
    assert list(source.leading_answers()) == []


@pytest.mark.parametrize("place", ["", "questions/"])
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("train2014", "COCO_train2014_{:012d}.jpg"),
        ("images/train2014", "COCO_train2014_{:012d}.jpg"),
        ("train", "{:012d}.jpg"),
        ("images", "{}.jpg"),
        ("images", "{}.png"),
        ("../train2014", "COCO_train2014_{:012d}.jpg"),
    ],
)
def test_vqa_finds_the_images(tmp_path, folder, name, place):
    images = {f"{folder}/{name.format(n)}": png(seed) for n, seed in ((9, 1), (25, 2))}
    root = vqa(tmp_path / "vqa", images=images, told=None, place=place)
    source = open_source(f"vqa:{root}")
    assert (source[0].image, source[2].image) == (png(1), png(2))


def test_vqa_takes_the_images_from_the_option(tmp_path):
    root = vqa(tmp_path / "vqa", images={"../elsewhere/COCO_train2014_000000000009.jpg": png(1)})
    assert open_source(f"vqa:{root}?images={tmp_path}/elsewhere")[0].image == png(1)
    assert is_present(f"vqa:{root}?images={tmp_path}/elsewhere")
    with pytest.raises(UserError, match="no folder of images"):
        open_source(f"vqa:{root}?images={tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"images are not there, for instance COCO_train2014_000000000009\.jpg or "):
        open_source(f"vqa:{root}?images={tmp_path}/empty")


def test_vqa_without_images_has_its_questions(tmp_path):
    root = vqa(tmp_path, images={})
    source = open_source(f"vqa:{root}")
    assert source.provides == {"question"}
    assert source[0].image is None
    assert source[0].extra["question"] == "What is it?"
    assert not is_present(f"vqa:{root}")


def test_vqa_names_an_image_that_does_not_exist(tmp_path):
    vqa(tmp_path, asked=[*ASKED, question(77, 77)], told=None)
    source = open_source(f"vqa:{tmp_path}")
    with pytest.raises(BadExample, match=r"COCO_train2014_000000000077\.jpg: missing file"):
        source[3]
    report = check_source(source)
    assert (report.n, report.n_bad) == (4, 1)


def test_vqa_check_takes_questions_about_one_image_for_no_duplicates(tmp_path):
    images = {**IMAGES, "train2014/COCO_train2014_000000000030.jpg": png(1)}
    vqa(tmp_path, asked=[*ASKED, question(30000, 30)], told=None, images=images)
    report = check_source(open_source(f"vqa:{tmp_path}"))
    assert (report.n, report.n_bad) == (4, 0)
    assert (report.duplicates, report.duplicate_examples) == (1, ["30000 = 9001"])
    assert sum(report.formats.values()) == 3, "each image is looked at once"


def test_vqa_check_counts_every_question_about_a_broken_image(tmp_path):
    images = {**IMAGES, "train2014/COCO_train2014_000000000009.jpg": b"no image"}
    report = check_source(open_source(f"vqa:{vqa(tmp_path, images=images)}"))
    assert (report.n_bad, report.bad["not an image"].count) == (2, 2)


def test_vqa_fingerprint_covers_questions_and_answers(tmp_path):
    other = [annotation(25000, 25), annotation(9000, 9, answer_type="number"), annotation(9001, 9)]
    other[2]["answers"][0] = {"answer": "different", "answer_id": 1}
    prints = {
        source_fingerprint(open_source(f"vqa:{vqa(tmp_path / name, **how)}"))
        for name, how in {
            "a": {},
            "same": {"asked": ASKED[::-1]},
            "question": {"asked": [question(9001, 9, "Why?"), *ASKED[1:]]},
            "answer": {"told": other},
            "leading": {"told": [*TOLD[:2], annotation(9001, 9, multiple_choice_answer="a1")]},
            "untold": {"told": None},
        }.items()
    }
    assert len(prints) == 5


BROKEN = {
    "three answers": (
        {"told": [*TOLD[:2], annotation(9001, 9, answers=annotation(1, 1)["answers"][:3])]},
        r"annotations\.json, annotations 2 \(question_id 9001\): 10 answers expected, 3 found",
    ),
    "an answer without text": (
        {"told": [*TOLD[:2], annotation(9001, 9, answers=[{"answer": "x"}] * 9 + [{}])]},
        r"\(question_id 9001\): answer 9 has no 'answer' text",
    ),
    "a question without annotation": (
        {"told": TOLD[:2]},
        r"questions\.json, questions 0 \(question_id 9001\): it has no annotation in .*annotations\.json",
    ),
    "an annotation without question": (
        {"asked": ASKED[:2]},
        r"annotations\.json: question_id 25000 is annotated, and is not in .*questions\.json",
    ),
    "another image": (
        {"told": [annotation(25000, 9), *TOLD[1:]]},
        r"\(question_id 25000\): it is about image 25, its annotation in .*annotations\.json about 9",
    ),
    "a question twice": (
        {"asked": [*ASKED, ASKED[0]]},
        r"questions 3 \(question_id 9001\): question_id 9001 was given before, in questions 0 \(question_id 9001\)",
    ),
    "an annotation twice": (
        {"told": [*TOLD, TOLD[0]]},
        r"annotations 3 \(question_id 25000\): question_id 25000 was given before",
    ),
    "a missing field": (
        {"asked": [{"question_id": 1, "image_id": 9}]},
        r"questions 0 \(question_id 1\): 'question' is missing",
    ),
    "an empty question": ({"asked": [question(1, 9, " ")]}, r"\(question_id 1\): 'question' is empty"),
    "an id of the wrong kind": (
        {"asked": [question("x", 9)]},
        r"questions 0: 'question_id' must be a whole number, not 'x'",
    ),
    "no object": ({"asked": [3]}, r"questions 0: expected an object, got 3"),
    "no questions": ({"asked": []}, r"expected an object with a list 'questions'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_vqa_names_file_and_question_of_what_is_broken(tmp_path, name):
    how, message = BROKEN[name]
    vqa(tmp_path, **how)
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"vqa:{tmp_path}")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_vqa_names_the_line_of_broken_json(tmp_path):
    write_files(tmp_path, {QUESTIONS.format("val2014"): '{"questions": [\n{"question_id": 1,,}]}'})
    with pytest.raises(UserError, match=r"questions\.json: not valid JSON: .* line 2 column"):
        open_source(f"vqa:{tmp_path}")


def test_vqa_refuses_two_files_for_one_split_and_absent_folders(tmp_path):
    vqa(tmp_path / "two")
    write_files(tmp_path / "two", {"OpenEnded_mscoco_train2014_questions.json": "{}"})
    with pytest.raises(UserError, match="are one split; keep one"):
        list_splits(f"vqa:{tmp_path}/two")
    vqa(tmp_path / "years", told=None)
    vqa(tmp_path / "years", told=None, split="train2017")
    with pytest.raises(UserError, match="'train2014' and 'train2017' both mean the train split"):
        list_splits(f"vqa:{tmp_path}/years")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"there is no v2_OpenEnded_mscoco_SPLIT_questions\.json"):
        list_splits(f"vqa:{tmp_path}/nothing")
    with pytest.raises(UserError, match="did you mean 'years'"):
        list_splits(f"vqa:{tmp_path}/year")
