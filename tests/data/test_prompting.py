from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlbench.core.errors import UserError
from vlbench.core.types import Example
from vlbench.data.prompting import clean_classname, draw_text, render


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
