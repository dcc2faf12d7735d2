import pytest

from vlbench.core.errors import UserError
from vlbench.data.shapes.draw import render
from vlbench.data.shapes.scene import sample_scene
from vlbench.data.shapes.world import CLASS_NAMES, HELD_OUT, LANGUAGES, SEEN, TEMPLATES, TINY
from vlbench.data.sources import list_splits, open_source


def test_pairs_read_back_as_written(tiny_world):
    source = open_source(f"shapes:pairs?root={tiny_world}")
    assert len(source) == TINY.pairs
    assert {"image", "text"} <= source.provides
    example = source[7]
    assert set(example.texts) == set(LANGUAGES)
    assert example.texts["en"][0] == f"a {sample_scene(0, 'pairs', 7).main.name}"
    assert example.image.startswith(b"\x89PNG")


def test_shapes_alone_is_its_pairs(tiny_world):
    assert len(open_source(f"shapes?root={tiny_world}")) == TINY.pairs


def test_labels_read_back_as_class_folders(tiny_world):
    source = open_source(f"shapes:labels?root={tiny_world}", "train")
    assert source.classes == tuple(sorted(combo.name for combo in SEEN))
    assert len(source) == TINY.labels


@pytest.mark.parametrize(
    "split,count", [("train", TINY.classes_train), ("val", TINY.classes_val), ("test", TINY.classes_test)]
)
def test_classes_read_back_with_names_and_templates(tiny_world, split, count):
    source = open_source(f"shapes:classes?root={tiny_world}", split)
    assert len(source) == count
    assert source.classes == CLASS_NAMES
    assert source.templates == tuple(template.replace("{c}", "{}") for template in TEMPLATES)
    mains = [sample_scene(0, f"classes/{split}", index).main.name for index in range(count)]
    assert [CLASS_NAMES[label] for label in source.labels()] == mains


def test_heldout_reads_back_among_all_classes(tiny_world):
    source = open_source(f"shapes:heldout?root={tiny_world}", "test")
    assert source.classes == CLASS_NAMES
    assert {CLASS_NAMES[label] for label in source.labels()} == {combo.name for combo in HELD_OUT}
    assert list_splits(f"shapes:heldout?root={tiny_world}") == ("test",)


def test_retrieval_reads_back_with_three_captions_a_language(tiny_world):
    source = open_source(f"shapes:retrieval?root={tiny_world}", "test")
    assert len(source) == TINY.retrieval
    assert {language: len(texts) for language, texts in source[0].texts.items()} == dict.fromkeys(LANGUAGES, 3)


def test_coco_reads_back_with_boxes_and_captions(tiny_world):
    source = open_source(f"shapes:coco?root={tiny_world}", "val")
    assert len(source) == TINY.coco_val
    assert {"image", "text", "regions"} <= source.provides
    for index in range(len(source)):
        example, scene = source[index], sample_scene(0, "coco/val", index)
        assert [region.category for region in example.regions] == [item.name for item in scene.objects]
        assert len(example.texts["en"]) == 5
        for region, (x, y, w, h) in zip(example.regions, render(scene).boxes_xywh(), strict=True):
            assert region.box_xyxy == (x, y, x + w, y + h)
            assert region.segmentation["size"] == [64, 64]


@pytest.mark.parametrize(
    "spec,message",
    [
        ("shapes:pears", "did you mean 'pairs'"),
        ("shapes:pairs?sead=1", "did you mean 'seed'"),
        ("shapes:pairs?seed=one", "whole number"),
    ],
)
def test_mistakes_in_the_spec_are_said(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_seed_that_the_root_does_not_have_is_refused(tiny_world):
    with pytest.raises(UserError, match="seed 0"):
        open_source(f"shapes:pairs?root={tiny_world}&seed=3")
