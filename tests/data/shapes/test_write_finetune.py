"""The parts for fine-tuning, through the files and the readers that a user would read them with."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.shapes import oracle
from vlbench.core.errors import UserError
from vlbench.data.refer_convert import convert
from vlbench.data.shapes import hypotheses, questions
from vlbench.data.shapes.draw import render
from vlbench.data.shapes.pairs import SENTENCES_PER_SET
from vlbench.data.shapes.scene import Scene, sample_scene
from vlbench.data.shapes.world import GROUPS, STREAMS, TINY, Sizes
from vlbench.data.shapes.write import read_manifest, write_world
from vlbench.data.sources import list_splits, open_source
from vlbench.stats.consistency import image_set
from vlbench.stats.vqa import accuracy

PARTS = GROUPS["finetune"]
SIZES = replace(
    TINY,
    vqa_train=300,
    vqa_val=12,
    vqa_test=90,
    nlvr2_train=40,
    nlvr2_dev=3,
    nlvr2_test1=12,
    snli_ve_train=240,
    snli_ve_dev=12,
    snli_ve_test=90,
    refcoco_train=120,
    refcoco_val=40,
    refcoco_testA=40,
    refcoco_testB=40,
    pixels=16,
)
SPLITS = {
    "vqa": ("train", "val", "test"),
    "nlvr2": ("train", "val", "test"),
    "snli_ve": ("train", "val", "test"),
    "refcoco": ("train", "val", "testA", "testB"),
}
OWN = {("nlvr2", "val"): "dev", ("nlvr2", "test"): "test1", ("snli_ve", "val"): "dev"}
PROVIDES = {
    "vqa": {"image", "question"},
    "nlvr2": {"image", "pair"},
    "snli_ve": {"image", "hypothesis"},
    "refcoco": {"image", "regions", "expression"},
}
EVERY = [(part, split) for part in PARTS for split in SPLITS[part]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough questions to count, in pictures too small to see anything in."""
    return write_world(tmp_path_factory.mktemp("asked") / "world", sizes=SIZES, workers=1, parts=PARTS)


def opened(world: Path, part: str, split: str):
    return open_source(f"shapes:{part}?root={world}", split)


def scene_of(part: str, split: str, index: int) -> Scene:
    return sample_scene(0, f"{part}/{OWN.get((part, split), split)}", index)


def numbered(number: int) -> int:
    """The scene's index behind an image's number; numbers of Flickr start at 0, of COCO at 1."""
    return number % 1_000_000


def sentences(part: str, example) -> tuple[str, ...]:
    return (example.extra["question"],) if part == "vqa" else example.texts["en"]


@pytest.mark.parametrize("part", PARTS)
def test_real_reader_opens_every_split(world, part):
    assert list_splits(f"shapes:{part}?root={world}") == SPLITS[part]
    for split in SPLITS[part]:
        source = opened(world, part, split)
        assert source.provides == PROVIDES[part]
        assert len(set(source.ids())) == len(source) > 0
        assert source[len(source) - 1].image.startswith(b"\x89PNG")


@pytest.mark.parametrize("split", SPLITS["vqa"])
def test_every_answer_follows_from_the_picture(world, split):
    source = opened(world, "vqa", split)
    for example in (source[i] for i in range(len(source))):
        scene = scene_of("vqa", split, numbered(example.extra["image_id"]) - 1)
        truth = oracle.answer(example.extra["question"], scene)
        assert truth == example.extra["multiple_choice_answer"], example.extra["question"]
        assert example.image == render(scene, size=SIZES.pixels).png()


@pytest.mark.parametrize("split", SPLITS["nlvr2"])
def test_every_sentence_is_true_or_false_as_labelled(world, split):
    source = opened(world, "nlvr2", split)
    for example in (source[i] for i in range(len(source))):
        _, number, pair, _ = example.id.split("-")
        left, right = (scene_of("nlvr2", split, 8 * int(number) + 2 * int(pair) + side) for side in (0, 1))
        assert oracle.holds(example.texts["en"][0], left, right) == bool(example.label), example.texts
        assert example.image == render(left, size=SIZES.pixels).png()
        assert example.extra["right"] == render(right, size=SIZES.pixels).png()


@pytest.mark.parametrize("split", SPLITS["snli_ve"])
def test_every_hypothesis_has_its_label(world, split):
    source = opened(world, "snli_ve", split)
    for example in (source[i] for i in range(len(source))):
        scene = scene_of("snli_ve", split, numbered(int(example.extra["image_key"])))
        assert oracle.label(example.texts["en"][0], scene) == source.classes[example.label], example.texts
        assert example.image == render(scene, size=SIZES.pixels).png()


@pytest.mark.parametrize("split", SPLITS["refcoco"])
def test_every_phrase_picks_the_object_that_is_meant(world, split):
    source = opened(world, "refcoco", split)
    for example in (source[i] for i in range(len(source))):
        scene = scene_of("refcoco", split, numbered(example.extra["image_id"]) - 1)
        boxes = {
            (o.combo.colour, o.combo.shape): (x, y, x + w, y + h)
            for o, (x, y, w, h) in zip(scene.objects, render(scene, size=SIZES.pixels).boxes_xywh(), strict=True)
        }
        assert Counter(boxes.values()) == Counter(region.box_xyxy for region in example.regions)
        region = example.regions[example.extra["target"]]
        for phrase in example.texts["en"]:
            item = oracle.meant(phrase, scene)
            assert boxes[item["colour"], item["shape"]] == region.box_xyxy, phrase
            assert region.category == item["shape"]
            if split.startswith("test"):
                assert (item == oracle.biggest(scene)) == (split == "testA")
        assert len(set(example.texts["en"])) == 3


def test_oracle_can_say_no():
    scene = sample_scene(0, "vqa/train", 0)
    item = oracle.objects(scene)[0]
    other = next(c for c in oracle.COLOURS.split("|") if not oracle.such(scene, colour=c))
    assert oracle.answer(f"Are there any {item['colour']} shapes?", scene) == "yes"
    assert oracle.answer(f"Are there any {other} shapes?", scene) == "no"
    assert oracle.label(f"The {other} object is a star.", scene) == "neutral"
    assert oracle.names_held_out("a red circle")
    assert oracle.names_held_out("crescent that is yellow")
    assert oracle.names_held_out("Is the star brown?")
    assert not oracle.names_held_out("Is the star red?")
    with pytest.raises(AssertionError, match="no rule"):
        oracle.answer("What is the meaning of it all?", scene)


@pytest.mark.parametrize(("part", "split"), EVERY)
def test_nothing_held_out_is_drawn_or_named(world, part, split):
    source = opened(world, part, split)
    for text in {text for i in range(len(source)) for text in sentences(part, source[i])}:
        assert not oracle.names_held_out(text), text
    stream = f"{part}/{OWN.get((part, split), split)}"
    drawn = {(o["colour"], o["shape"]) for i in range(200) for o in oracle.objects(sample_scene(0, stream, i))}
    assert not drawn & oracle.HELD_OUT
    assert len(drawn) == 36


def test_phrases_name_no_place(world):
    for source in (opened(world, "refcoco", split) for split in SPLITS["refcoco"]):
        words = {word for i in range(len(source)) for text in source[i].texts["en"] for word in text.split()}
        assert not words & {"left", "right", "above", "below", "top", "bottom", "middle", "next"}


def test_splits_share_no_picture(world):
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in sorted(world.rglob("*.png"))]
    assert len(set(digests)) == len(digests)
    assert len({STREAMS[f"{part}/{OWN.get((part, split), split)}"].number for part, split in EVERY}) == len(EVERY)


def test_bytes_do_not_depend_on_processes(world, tmp_path):
    assert SIZES.vqa_train > 250, "more than one job, so that two processes do share the work"
    other = write_world(tmp_path / "two", sizes=SIZES, workers=2, parts=("vqa",))
    files = {name: file for name, file in read_manifest(world)["files"].items() if name.startswith("vqa/")}
    assert read_manifest(other)["files"] == files


def test_what_is_asked_depends_on_no_later_picture(world, tmp_path):
    fewer = replace(SIZES, vqa_train=20, nlvr2_train=3, snli_ve_train=20, refcoco_train=9, vqa_test=1, refcoco_testB=1)
    small = write_world(tmp_path / "few", sizes=fewer, workers=1, parts=PARTS)
    for part in PARTS:
        few, many = (opened(root, part, "train") for root in (small, world))
        assert 0 < len(few) < len(many)
        assert [few[i] for i in range(len(few))] == [many[i] for i in range(len(few))]


# ---------------------------------------------------------------------------------------------- balance


def test_questions_do_not_tell_their_answers(world):
    source = opened(world, "vqa", "train")
    extras = [source[i].extra for i in range(len(source))]
    told: dict[str, Counter[str]] = {}
    for extra in extras:
        told.setdefault(extra["question"], Counter())[extra["multiple_choice_answer"]] += 1
    for text, counts in told.items():
        if set(counts) <= {"yes", "no"}:
            assert abs(counts["yes"] - counts["no"]) <= 2, text
    kinds = Counter(extra["answer_type"] for extra in extras)
    assert kinds.keys() == {"yes/no", "number", "other"}
    assert 0.3 < kinds["yes/no"] / len(extras) < 0.46
    assert kinds["number"] > 0.1 * len(extras)
    totals = told["How many shapes are there?"]
    assert set(totals) == {"1", "2", "3", "4"}
    assert max(totals.values()) - min(totals.values()) <= 2
    assert len(extras) == 3 * SIZES.vqa_train


@pytest.mark.parametrize("split", SPLITS["nlvr2"])
def test_sentences_do_not_tell_their_truth(world, split):
    source = opened(world, "nlvr2", split)
    labels: dict[str, list[int]] = {}
    pairs: dict[str, set[str]] = {}
    for example in (source[i] for i in range(len(source))):
        labels.setdefault(example.extra["group"], []).append(example.label)
        pairs.setdefault(image_set(example.id), set()).add(example.extra["image_key"])
    assert all(sorted(group) in ([0, 1], [0, 0, 1, 1]) for group in labels.values())
    assert len(labels) == SENTENCES_PER_SET * len(pairs)
    assert max(map(len, pairs.values())) == 4


def test_hypotheses_do_not_tell_their_label(world):
    source = opened(world, "snli_ve", "train")
    told: dict[str, Counter[int]] = {}
    for example in (source[i] for i in range(len(source))):
        told.setdefault(example.texts["en"][0], Counter())[example.label] += 1
    for text, counts in told.items():
        assert max(counts.values()) - min(counts[label] for label in range(3)) <= 2, text
    totals = sum(told.values(), Counter())
    assert max(totals.values()) < 1.15 * min(totals.values())


def test_order_of_regions_does_not_tell_the_one_that_is_meant(world):
    source = opened(world, "refcoco", "testA")
    places = Counter(source[i].extra["target"] for i in range(len(source)))
    assert places[0] < 0.6 * len(source)
    assert len(places) >= 3


def test_question_types_are_vqas(world):
    source = opened(world, "vqa", "train")
    extras = [source[i].extra for i in range(len(source))]
    for extra in extras:
        assert extra["question"].lower().startswith(f"{extra['question_type']} ")
    assert len({extra["question_type"] for extra in extras}) == 9
    assert {questions.question_type(f"{text} x") for text in ("What color is the", "How many", "How")} == {
        "what color is the",
        "how many",
        "how",
    }


def test_people_mostly_agree_and_write_as_people_do(world):
    source = opened(world, "vqa", "train")
    extras = [source[i].extra for i in range(len(source))]
    alike = np.array([extra["answers"].count(extra["multiple_choice_answer"]) for extra in extras])
    assert 5 < alike.mean() < 9.5
    assert alike.max() == 10
    written = {answer for extra in extras for answer in extra["answers"]}
    assert {"two", "violet", "a star", "Yes", "red.", "no!"} <= written
    for extra in extras:
        assert accuracy(extra["multiple_choice_answer"], extra["answers"]) == 1
    violet = [accuracy("violet", extra["answers"]) for extra in extras if "violet" in extra["answers"]]
    assert {0.3, 0.6} <= {round(share, 6) for share in violet}, "another word for it is worth a part of a point"


@pytest.mark.parametrize("module", [questions, hypotheses])
def test_shares_are_percent_of_all_families(module):
    assert module.SHARES.keys() == module.FAMILIES.keys()
    assert sum(module.SHARES.values()) == 100


# ---------------------------------------------------------------------------------------------- formats


def test_refs_survive_refers_pickle(world, tmp_path):
    refs = json.loads((world / "refcoco" / "refs(unc).json").read_text())
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    (tmp_path / "instances.json").write_bytes((world / "refcoco" / "instances.json").read_bytes())
    convert(tmp_path / "refs(unc).p")
    ours = opened(world, "refcoco", "testB")
    theirs = open_source(f"refcoco:{tmp_path}?images={world}/refcoco/train2014", "testB")
    assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))]


def test_instances_have_the_area_of_their_masks(world):
    content = json.loads((world / "refcoco" / "instances.json").read_text())
    for note in content["annotations"]:
        counts, (height, width) = note["segmentation"]["counts"], note["segmentation"]["size"]
        mask = np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T
        rows, columns = np.nonzero(mask)
        x, y, w, h = note["bbox"]
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + w, y + h)
        assert note["area"] == mask.sum()


def test_annotations_have_vqas_fields(world):
    asked = json.loads((world / "vqa" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    told = json.loads((world / "vqa" / "v2_mscoco_val2014_annotations.json").read_text())
    assert (asked["task_type"], asked["data_type"], asked["data_subtype"]) == ("Open-Ended", "mscoco", "val2014")
    assert (told["data_type"], told["data_subtype"]) == ("mscoco", "val2014")
    for note in told["annotations"]:
        assert [answer["answer_id"] for answer in note["answers"]] == list(range(1, 11))
        assert {answer["answer_confidence"] for answer in note["answers"]} <= {"yes", "maybe", "no"}


# ------------------------------------------------------------------------------------- worlds on the disk


def test_world_of_before_these_parts_is_still_itself(tmp_path):
    sizes = replace(TINY, pairs=4, labels=4)
    root = write_world(tmp_path / "world", sizes=sizes, workers=1, parts=GROUPS["pretrain"])
    manifest = read_manifest(root)
    manifest["sizes"] = {name: n for name, n in manifest["sizes"].items() if not name.startswith(PARTS)}
    (root / "MANIFEST.json").write_text(json.dumps(manifest))
    assert write_world(root, sizes=sizes, workers=1) == root
    assert write_world(root) == root
    with pytest.raises(UserError, match="other sizes"):
        write_world(root, sizes=Sizes())
    with pytest.raises(UserError, match="a world without 'vqa'; name a new folder"):
        open_source(f"shapes:vqa?root={root}", "train")


def test_sizes_are_kept(world):
    assert read_manifest(world)["sizes"] == asdict(SIZES)
    assert read_manifest(world)["parts"] == list(PARTS)
