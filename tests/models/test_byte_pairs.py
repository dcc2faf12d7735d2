"""Word by word or all at once: the ids are open_clip's."""

from __future__ import annotations

import random

import pytest
from open_clip.tokenizer import SimpleTokenizer

from vlbench.models.byte_pairs import BytePairs

ODD = [
    "",
    "   ",
    "A  Red\tcircle\n on a\u00a0dark background.",
    "it's we've they'll I'm he'd don't 'tis O'Neill's",
    "Q&A &amp; &lt;b&gt; &amp;amp; AT&T",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u010desk\u00fd",
    "\u4e00\u53ea\u732b \u3053\u3093\u306b\u3061\u306f",
    "\U0001f600 smile\u200d\u2764\ufe0f",
    "\u00c3\u00a9 broken \u00e2\u20ac\u2122 quotes",
    "\u201ccurly\u201d \u2018quotes\u2019 \u2014 dash \u2026",
    "<start_of_text> a <end_of_text> b",
    "line\u2028separator \x1f unit \x0b tab \x1b[31mred\x1b[0m",
    "100,000.50 3x4 a1b2 __init__ --flag #tag @user http://x.y/z?a=b",
    "\ufb01ne liga\u017fures \u216f \u00bd",
    "x" * 300,
]


@pytest.fixture(scope="module")
def theirs() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_have_open_clips_ids(theirs: SimpleTokenizer, text: str) -> None:
    ours = BytePairs(theirs)
    for _ in range(2):  # the second time from what is kept
        assert ours(text) == theirs.encode(text)


def test_random_texts_have_open_clips_ids(theirs: SimpleTokenizer) -> None:
    rng = random.Random(0)
    plain = [chr(code) for code in range(32, 127)]
    other = ["\u00e9", "\u2019", "\n", "\t", "\u00a0", "\u3042", "\u0301", "\U0001f680", "\x7f", "\u0130"]
    ours = BytePairs(theirs)
    for number in range(4000):
        letters = plain if number % 2 else plain + other * 3
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(30)))
        assert ours(text) == theirs.encode(text), repr(text)


def test_another_tokenizer_does_its_own_work() -> None:
    cased = SimpleTokenizer(clean="whitespace")
    assert (
        BytePairs(cased)("A Red  CIRCLE") == cased.encode("A Red  CIRCLE") != SimpleTokenizer().encode("a red circle")
    )
