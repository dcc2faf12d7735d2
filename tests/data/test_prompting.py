from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlbench.core.cards import prompt_lines
from vlbench.core.errors import UserError
from vlbench.core.types import Example
from vlbench.data.prompting import are_numbers, class_names, clean_classname, draw_text, render


def test_clean_classname_follows_unicl():
    assert clean_classname("crane, bird") == "crane bird"
    assert clean_classname("sewing+machine") == "sewing machine"
    assert clean_classname("golden_retriever") == "golden retriever"
    assert clean_classname("t-shirt") == "t-shirt"


def test_render_fills_either_placeholder():
    assert render("a photo of a {}.", "cat") == "a photo of a cat."
    assert render("a photo of a {c}.", "cat") == "a photo of a cat."
    assert render("{} or {0}", "a {x}") == "a {x} or {0}"
    with pytest.raises(UserError, match="where the class name goes"):
        render("a photo", "cat")


def test_draw_text_draws_captions_uniformly():
    example = Example(id="x", texts={"en": ("one", "two"), "de": ("drei",)})
    rng = np.random.default_rng(0)
    counts = Counter(draw_text(example, "cat", ["a {}"], rng) for _ in range(2000))
    assert counts.keys() == {"one", "two"}
    assert abs(counts["one"] - 1000) < 120
    both = Counter(draw_text(example, None, [], rng, languages=("en", "de")) for _ in range(300))
    assert both.keys() == {"one", "two", "drei"}


def test_draw_text_makes_a_prompt_of_the_label():
    rng = np.random.default_rng(0)
    drawn = Counter(draw_text(Example(id="x"), "a,b", ["a {}.", "the {}."], rng) for _ in range(200))
    assert drawn.keys() == {"a ab.", "the ab."}
    only_german = Example(id="x", texts={"de": ("eine Katze",)})
    assert draw_text(only_german, "cat", ["a {}"], rng) == "a cat"
    assert draw_text(Example(id="x"), None, ["a {}"], rng) is None


TABLE = ("n02084071\tdog", "n02121808\tcat", "n01503061\tbird")


def test_class_names_by_label():
    assert class_names(("a", "b"), ("x", "y"), where="") == ("a", "b")
    with pytest.raises(UserError, match="2 class names were given for 3 classes"):
        class_names(("a", "b"), ("x", "y", "z"), where="")


def test_class_names_by_own_name_follow_the_data_s_order_and_subset():
    assert class_names(TABLE, ("n01503061", "n02084071"), where="") == ("bird", "dog")
    several = ("0\t00000\tstop", "1\t00001\tgo")
    assert class_names(several, ("1", "0"), where="") == class_names(several, ("00001", "00000"), where="")


def test_class_names_of_data_that_are_named_in_words_stay():
    assert class_names(TABLE, ("hound", "tabby"), where="") == ("hound", "tabby")


def test_class_names_that_are_the_table_s_own_already_stay_beside_others():
    fear = ("2\tfear\tfearful", "3\thappy\thappy", "1\tdisgust\tdisgusted")
    assert class_names(fear, ("fearful", "happy", "disgust"), where="") == ("fearful", "happy", "disgusted")
    with pytest.raises(UserError, match="for instance 'bored'"):
        class_names(fear, ("fearful", "happy", "bored"), where="")
    assert class_names(("0\t1", "1\t0"), ("0", "1"), where="") == ("1", "0"), "an own name comes before a class name"


def test_class_names_take_the_table_that_has_every_class():
    lines = (*TABLE, "---", "bird, birdie\tbird", "cat\tpet cat", "hound, dog\tdog")
    assert class_names(lines, ("n01503061", "n02084071"), where="") == ("bird", "dog")
    assert class_names(lines, ("cat", "hound, dog"), where="") == ("pet cat", "dog")
    assert class_names(lines, ("cat", "tabby"), where="") == ("cat", "tabby"), "words of neither stay as they are"
    with pytest.raises(UserError, match="for instance 'n99999999'"):
        class_names(lines, ("n99999999",), where="")


SHARDS = ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")
FOLDERS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
NOUNS = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")


@pytest.mark.parametrize("own", [SHARDS, FOLDERS, NOUNS])
def test_class_names_of_fer2013_are_clip_s_whoever_made_the_data(own):
    """CLIP_benchmark's shards, the folders of the usual archive, the emotions as nouns."""
    names = class_names(prompt_lines("fer2013_classnames"), own, where="wds:fer2013")
    assert names == ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")


def test_numbers_are_told_from_names():
    assert are_numbers(("0", "10"))
    assert not any(map(are_numbers, [(), ("0", "one"), ("n01440764",), ("1.5",)]))


@pytest.mark.parametrize("own", [("n02084071", "n99999999"), ("n99999999",), ("0", "1"), ("n02084071", "tabby")])
def test_class_names_refuse_a_class_that_the_table_lacks(own):
    with pytest.raises(UserError, match=r"wds:x.*classes are not in the task's table of class names") as caught:
        class_names(TABLE, own, where="wds:x")
    assert "\n" not in str(caught.value)


def test_class_names_refuse_a_table_that_contradicts_itself():
    with pytest.raises(UserError, match="'0' stands for both 'a' and 'b'"):
        class_names(("0\ta", "0\tb"), ("0",), where="")
