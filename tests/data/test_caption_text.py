from __future__ import annotations

import pytest

from vlbench.data.caption_text import normalise_caption, swap_sides


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A Man  on\ta HORSE\n", "a man on a horse"),
        ("Café, naïve Åland", "cafe, naive aland"),
        ("ﬁve ½ Ⅷ", "five 1⁄2 viii"),  # NFKD takes ligatures and fractions apart
        ("İstanbul", "istanbul"),
        ("", ""),
        (" \u0301 ", ""),
    ],
)
def test_normalise_caption_lowers_and_strips_accents(text: str, expected: str) -> None:
    assert normalise_caption(text) == expected
    assert normalise_caption(expected) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a dog left of a cat", "a dog right of a cat"),
        ("on the right, not the left.", "on the left, not the right."),
        ("a left-hand drive", "a right-hand drive"),
        ("left left right", "right right left"),
        ("a bright upright lamp by leftover cleft copyright", "a bright upright lamp by leftover cleft copyright"),
    ],
)
def test_swap_sides_changes_whole_words_and_is_its_own_inverse(text: str, expected: str) -> None:
    assert swap_sides(text) == expected
    assert swap_sides(expected) == text


def test_swap_sides_by_substrings_is_the_released_rule() -> None:
    assert swap_sides("bright upright leftover right", rule="substrings") == "bleft upleft rightover left"
    assert swap_sides("left right", rule="substrings") == "right left"
