"""Sentences about two pictures as NLVR2 has them: true of some pairs of a set and false of as many others.

A statement judges a pair, or says None where people would hesitate; then it is not made of that set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlbench.data.shapes.facts import WHERE, clear_relation, values
from vlbench.data.shapes.scene import Scene
from vlbench.data.shapes.world import COLOURS, PATTERNS, SHAPES, TONES, Relation

IMAGES_PER_SET = 8  # four pairs
SENTENCES_PER_SET = 8
_SIDES = ("left", "right")
_NUMBERS = {3: "three", 4: "four", 5: "five", 6: "six"}

Judge = Callable[[Scene, Scene], bool | None]


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence and what it says of a left and a right picture."""

    text: str
    judge: Judge


@dataclass(frozen=True, slots=True)
class Judged:
    """A sentence with the pairs of its set that it is judged on, by place, as many true as false."""

    text: str
    labels: dict[int, bool]


class Sentences:
    """Chooses the sentences of one split, set after set, of the kind that is most behind its share."""

    def __init__(self) -> None:
        self._made: Counter[str] = Counter()

    def choose(self, pairs: Sequence[tuple[Scene, Scene]], rng: np.random.Generator) -> list[Judged]:
        """The different sentences of a set."""
        chosen: dict[str, Judged] = {}
        spent: set[str] = set()
        while len(chosen) < SENTENCES_PER_SET and len(spent) < len(STATEMENTS):
            kind = min(
                (kind for kind in STATEMENTS if kind not in spent),
                key=lambda kind: (self._made[kind] + 1) / SHARES[kind],
            )
            new = [statement for statement in STATEMENTS[kind] if statement.text not in chosen]
            judged = _balanced(new, pairs, rng)
            if judged is None:
                spent.add(kind)
            else:
                self._made[kind] += 1
                chosen[judged.text] = judged
        return list(chosen.values())


def _balanced(
    statements: Sequence[Statement], pairs: Sequence[tuple[Scene, Scene]], rng: np.random.Generator
) -> Judged | None:
    """A statement that is true of half of the pairs, else one that is true of some, with as many false ones."""
    second_best = None
    for place in rng.permutation(len(statements)).tolist():
        truths = [statements[place].judge(left, right) for left, right in pairs]
        if None in truths:
            continue
        sides = [[pair for pair, truth in enumerate(truths) if truth == wanted] for wanted in (True, False)]
        fewer = min(map(len, sides))
        if fewer == 0:
            continue
        kept = sorted(pair for side in sides for pair in rng.permutation(side)[:fewer].tolist())
        judged = Judged(statements[place].text, {pair: bool(truths[pair]) for pair in kept})
        if 2 * fewer == len(pairs):
            return judged
        second_best = second_best or judged
    return second_best


# ------------------------------------------------------------------------------------------- statements


def _has(scene: Scene, what: str) -> bool:
    """Whether a picture shows what a noun phrase names: ``"red shape"``, ``"star"``, ``"red star"``."""
    colour, _, shape = what.rpartition(" ")
    return any(
        (not colour or item.combo.colour == colour) and shape in ("shape", item.combo.shape) for item in scene.objects
    )


_THINGS = (*(f"{colour} shape" for colour in COLOURS), *SHAPES)


def _quantified() -> list[Statement]:
    """About both pictures and one colour or one shape."""
    found = []
    for what in _THINGS:
        found += [
            Statement(f"Both images show a {what}.", _shown(what, lambda left, right: left and right)),
            Statement(f"Exactly one image contains a {what}.", _shown(what, lambda left, right: left != right)),
            Statement(
                f"At least one of the images contains a {what}.", _shown(what, lambda left, right: left or right)
            ),
            Statement(f"Neither image shows a {what}.", _shown(what, lambda left, right: not (left or right))),
        ]
    return found


def _present() -> list[Statement]:
    """About what is in one of the two pictures."""
    found = []
    for what in _THINGS:
        found += [
            Statement(f"There is a {what} in the left image.", _shown(what, lambda left, right: left)),
            Statement(f"There is a {what} in the right image.", _shown(what, lambda left, right: right)),
        ]
    return found


def _shown(what: str, judge: Callable[[bool, bool], bool]) -> Judge:
    """Judges by whether the left and the right picture show it."""
    return lambda left, right: judge(_has(left, what), _has(right, what))


def _of_side(side: str, judge: Callable[[Scene], bool | None]) -> Judge:
    return lambda left, right: judge(left if side == "left" else right)


def _biggest() -> list[Statement]:
    """About the biggest shape of one of the two pictures."""
    found = []
    for side in _SIDES:
        for colour in COLOURS:
            text = f"The biggest shape in the {side} image is {colour}."
            found.append(Statement(text, _of_side(side, _main_is("colour", colour))))
        for shape in SHAPES:
            text = f"The biggest shape in the {side} image is a {shape}."
            found.append(Statement(text, _of_side(side, _main_is("shape", shape))))
    return found


def _around() -> list[Statement]:
    """About what lies around the biggest shape of one of the two pictures."""
    found = []
    for side in _SIDES:
        for where, words in WHERE.items():
            text = f"In the {side} image a shape is {words} the biggest one."
            found.append(Statement(text, _of_side(side, _placed(where))))
            text = f"In the {side} image the biggest shape is {words} a small one."
            found.append(Statement(text, _of_side(side, _placing(where))))
    return found


def _placed(where: Relation) -> Callable[[Scene], bool | None]:
    def judge(scene: Scene) -> bool | None:
        told = [clear_relation(other, scene.main) for other in scene.others]
        return None if None in told else where in told

    return judge


def _placing(where: Relation) -> Callable[[Scene], bool | None]:
    def judge(scene: Scene) -> bool | None:
        told = [clear_relation(scene.main, other) for other in scene.others]
        return None if None in told else where in told

    return judge


def _main_is(attribute: str, value: str) -> Callable[[Scene], bool]:
    return lambda scene: getattr(scene.main.combo, attribute) == value


def _compared() -> list[Statement]:
    def same(attribute: str) -> Judge:
        return lambda left, right: getattr(left.main.combo, attribute) == getattr(right.main.combo, attribute)

    def shared(attribute: str) -> Judge:
        return lambda left, right: bool({*values(left, attribute)} & {*values(right, attribute)})

    return [
        Statement(
            "The left image has more shapes than the right image.",
            lambda left, right: len(left.objects) > len(right.objects),
        ),
        Statement(
            "The right image has more shapes than the left image.",
            lambda left, right: len(left.objects) < len(right.objects),
        ),
        Statement(
            "The two images have the same number of shapes.",
            lambda left, right: len(left.objects) == len(right.objects),
        ),
        Statement("The biggest shapes of the two images have the same color.", same("colour")),
        Statement("The biggest shapes of the two images are of the same kind.", same("shape")),
        Statement("Some color is found on a shape in both images.", shared("colour")),
        Statement("Some kind of shape is found in both images.", shared("shape")),
    ]


def _counted() -> list[Statement]:
    def total(number: int) -> Judge:
        return lambda left, right: len(left.objects) + len(right.objects) == number

    def holds(side: str, number: int) -> Judge:
        return _of_side(side, lambda scene: len(scene.objects) == number)

    found = [
        Statement(f"There are {word} shapes in the two images together.", total(number))
        for number, word in _NUMBERS.items()
    ]
    for side in _SIDES:
        found.append(Statement(f"There is a single shape in the {side} image.", holds(side, 1)))
        found += [
            Statement(f"There are {word} shapes in the {side} image.", holds(side, number))
            for number, word in ((2, "two"), (3, "three"))
        ]
    return found


def _grounded() -> list[Statement]:
    found = []
    for word in (*TONES, *PATTERNS):
        found += [
            Statement(f"Both images have a {word} background.", _on(word, lambda left, right: left and right)),
            Statement(f"Exactly one image has a {word} background.", _on(word, lambda left, right: left != right)),
            Statement(f"The left image has a {word} background.", _on(word, lambda left, right: left)),
            Statement(f"The right image has a {word} background.", _on(word, lambda left, right: right)),
        ]
    return found


def _on(word: str, judge: Callable[[bool, bool], bool]) -> Judge:
    """Judges by whether the left and the right background are what ``word`` says."""

    def is_on(scene: Scene) -> bool:
        return word in (scene.background.tone, scene.background.pattern)

    return lambda left, right: judge(is_on(left), is_on(right))


STATEMENTS = {
    "present": _present(),
    "biggest": _biggest(),
    "grounded": _grounded(),
    "counted": _counted(),
    "compared": _compared(),
    "quantified": _quantified(),
    "around": _around(),
}
"""By kind."""
SHARES = {
    "biggest": 88,
    "present": 4,
    "grounded": 3,
    "quantified": 2,
    "counted": 1,
    "compared": 1,
    "around": 1,
}
"""In percent. Whether a sentence is true shows in neither words nor pictures alone; a model that begins with nothing
finds that out from a few kinds of sentences first: where six in ten of them were of the first kind, sixteen thousand
examples taught a small one nothing at all."""
