from __future__ import annotations

import pytest

from vlbench.data.filters.words import ngrams, words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A red CAR, on sand.", ["a", "red", "car", "on", "sand"]),
        ("don't stop—the dogs' ball", ["don't", "stop", "the", "dogs", "ball"]),
        ("see https://a.b/c?d=e-f and www.shop.example!", ["see", "https://a.b/c?d=e-f", "and", "www.shop.example!"]),
        ("IMG_0042.JPG 1920x1080", ["img_0042", "jpg", "1920x1080"]),
        ("Ein Ａｐｆｅｌ im Café", ["ein", "apfel", "im", "café"]),
        ("cafe\u0301", ["caf\u00e9"]),  # composed, so that both spellings are one word
        ("हिन्दी में", ["हिन्दी", "में"]),  # combining vowels and the virama are parts of a word
        ("... !? 🙂", []),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_and_digits(text, expected):
    assert words(text) == expected


def test_ngrams_are_words_then_neighbours():
    assert ngrams(["a", "red", "car"]) == ["a", "red", "car", "a red", "red car"]
    assert ngrams(["alone"]) == ["alone"]
    assert ngrams([]) == []
