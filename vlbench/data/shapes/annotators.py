"""Ten simulated people answer a question, as VQA had ten people answer each.

At least six of the ten mean the true answer. They write it as people do ("Two", "a star", "red."), which the official
normalisation undoes; the rest use another word for it, which it does not undo, or are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PEOPLE = 10
_DISSENT = (0.40, 0.26, 0.17, 0.11, 0.06)
"""The probability that 0, 1, 2, 3 and 4 people do not give the true answer in any spelling of it."""
_WRONG = 0.35  # of those, how many are wrong rather than using a word of their own
_SPELT = 0.25  # of the others, how many write it in a way that the normalisation undoes
_UNSURE = 0.1

_OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "yes": ("yeah", "it is", "yes it is"),
    "no": ("nope", "it isnt", "not really"),
    "red": ("dark red", "crimson"),
    "yellow": ("gold",),
    "green": ("dark green",),
    "blue": ("dark blue", "navy"),
    "purple": ("violet", "violet", "lavender"),
    "brown": ("tan", "dark orange"),
    "circle": ("round", "disc", "ball"),
    "square": ("rectangle", "box"),
    "triangle": ("pyramid",),
    "hexagon": ("6 sided shape", "octagon"),
    "cross": ("plus", "plus sign"),
    "star": ("5-pointed star",),
    "heart": ("love heart",),
    "crescent": ("moon", "crescent moon"),
    "large": ("big", "very large"),
    "medium": ("average", "not very big"),
    "small": ("little", "not big"),
    "tiny": ("very small", "little"),
    "plain": ("solid", "none", "there isnt one"),
    "striped": ("stripes", "lines"),
    "checkered": ("checks", "checkerboard"),
    "spotted": ("dots", "polka dots"),
    "dark": ("black",),
    "light": ("white", "bright"),
}
_NUMBER_WORDS = ("none", "one", "two", "three", "four")
_NOUNS = frozenset({"circle", "square", "triangle", "hexagon", "cross", "star", "heart", "crescent"})


def ten_answers(truth: str, among: Sequence[str], rng: np.random.Generator) -> list[dict[str, object]]:
    """``answers`` of one VQA annotation.

    Args:
        truth: the answer, as the official normalisation leaves it.
        among: what could have been the answer, ``truth`` among it: errors are of these.
        rng: draws all of it.
    """
    dissent = int(rng.choice(len(_DISSENT), p=_DISSENT))
    dissenters = set(rng.choice(PEOPLE, dissent, replace=False).tolist())
    wrong = [answer for answer in among if answer != truth]
    texts = []
    for person in range(PEOPLE):
        words = _OTHER_WORDS.get(truth, ())
        if person not in dissenters:
            texts.append(_spelt(truth, rng) if rng.random() < _SPELT else truth)
        elif words and rng.random() >= _WRONG:
            texts.append(words[int(rng.integers(len(words)))])
        else:
            texts.append(wrong[int(rng.integers(len(wrong)))])
    if len(set(texts)) == 1:  # the official rule normalises nothing where all ten wrote the same
        texts = [truth] * PEOPLE
    sure = rng.random(PEOPLE) >= _UNSURE
    return [
        {"answer": text, "answer_confidence": "yes" if sure[person] else "maybe", "answer_id": person + 1}
        for person, text in enumerate(texts)
    ]


def _spelt(truth: str, rng: np.random.Generator) -> str:
    """The answer with what the normalisation takes off again: articles, capitals, punctuation, numbers as words."""
    ways = [f"{truth}.", truth.capitalize(), f"{truth}!"]
    if truth.isdecimal():
        ways = [_NUMBER_WORDS[int(truth)], _NUMBER_WORDS[int(truth)], f"{truth}."]
    elif truth in _NOUNS:
        ways += [f"a {truth}", f"a {truth}.", f"the {truth}"]
    return ways[int(rng.integers(len(ways)))]
