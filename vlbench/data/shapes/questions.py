"""Questions about a scene as VQA asks them, with the answer that the picture gives."""

from __future__ import annotations

from collections.abc import Iterator

from vlbench.data.shapes.balance import Asked, Family
from vlbench.data.shapes.facts import (
    COLOURS_SEEN_ON,
    SHAPES_SEEN_IN,
    WHERE,
    clear_relation,
    is_bigger,
    neighbour,
    only_ones,
    plural,
    values,
)
from vlbench.data.shapes.scene import Scene
from vlbench.data.shapes.world import COLOURS, OPPOSITE, PATTERNS, SEEN, SHAPES, TONES, Relation, Size

YES_NO = ("yes", "no")
SIZES: tuple[Size, ...] = ("large", "medium", "small", "tiny")
QUESTIONS_PER_IMAGE = 3
_TOTALS = ("1", "2", "3", "4")
_FEW = ("0", "1", "2")
_BACKGROUND_PATTERN = "What pattern does the background have?"
_TYPES = (
    "what color is the",
    "what is the",
    "what is",
    "what",
    "how many",
    "how",
    "is there a",
    "are there any",
    "is the",
)


def question_type(text: str) -> str:
    """The longest of VQA's leading phrases that the question begins with: by it accuracy is broken down."""
    lower = text.lower()
    return next(kind for kind in sorted(_TYPES, key=len, reverse=True) if lower.startswith(f"{kind} "))


def answer_type(answer: str) -> str:
    """``yes/no``, ``number`` or ``other``."""
    return "yes/no" if answer in YES_NO else "number" if answer.isdecimal() else "other"


def _yes_no(wording: str, text: str, truth: bool) -> Asked:
    return Asked(wording, text, YES_NO[not truth], YES_NO)


def _exists(scene: Scene) -> list[Asked]:
    found, shapes, colours = ({item.combo for item in scene.objects}, *_attributes(scene))
    asked = [
        _yes_no("is there a color shape", f"Is there a {combo.name}?", combo in found)
        for combo in SEEN
        # What is not there is nearly there: a bag of attributes does not answer it.
        if combo in found or (combo.shape in shapes and combo.colour in colours)
    ]
    asked += [_yes_no("is there a shape", f"Is there a {shape}?", shape in shapes) for shape in SHAPES]
    asked += [_yes_no("are there any", f"Are there any {colour} shapes?", colour in colours) for colour in COLOURS]
    return asked


def _coloured(scene: Scene) -> list[Asked]:
    return [
        _yes_no("is the shape color", f"Is the {shape} {colour}?", colour == item.combo.colour)
        for shape, item in only_ones(scene, "shape").items()
        for colour in COLOURS_SEEN_ON[shape]
    ] + [
        _yes_no("is the color one a shape", f"Is the {colour} object a {shape}?", shape == item.combo.shape)
        for colour, item in only_ones(scene, "colour").items()
        for shape in SHAPES_SEEN_IN[colour]
    ]


def _stands(scene: Scene) -> list[Asked]:
    asked = []
    for first, second, where in _clear_pairs(scene):
        for said in (where, OPPOSITE[where]):
            asked.append(_yes_no(f"is the {said}", f"Is the {first} {WHERE[said]} the {second}?", said == where))
    return asked


def _compares(scene: Scene) -> list[Asked]:
    singles = only_ones(scene, "shape")
    asked = []
    for first, item in singles.items():
        for second, other in singles.items():
            bigger = is_bigger(item, other)
            if first != second and bigger is not None:
                asked.append(_yes_no("is the bigger", f"Is the {first} bigger than the {second}?", bigger))
    return asked


def _behind(scene: Scene) -> list[Asked]:
    ground = scene.background
    return [_yes_no("is the background", f"Is the background {tone}?", tone == ground.tone) for tone in TONES] + [
        _yes_no("is the background", f"Is the background {pattern}?", pattern == ground.pattern) for pattern in PATTERNS
    ]


def _totals(scene: Scene) -> list[Asked]:
    total = str(len(scene.objects))
    return [Asked("how many", "How many shapes are there?", total, _TOTALS)] if total in _TOTALS else []


def _counts(scene: Scene) -> list[Asked]:
    colours, shapes = values(scene, "colour"), values(scene, "shape")
    texts = {f"How many {colour} shapes are there?": colours.count(colour) for colour in COLOURS}
    texts |= {f"How many {plural(shape)} are there?": shapes.count(shape) for shape in SHAPES}
    return [Asked("how many of a kind", text, str(count), _FEW) for text, count in texts.items() if str(count) in _FEW]


def _colours(scene: Scene) -> list[Asked]:
    asked = [
        Asked("what color", f"What color is the {shape}?", item.combo.colour, COLOURS_SEEN_ON[shape])
        for shape, item in only_ones(scene, "shape").items()
    ]
    if scene.others:
        asked.append(
            Asked("what color is the biggest", "What color is the biggest shape?", scene.main.combo.colour, COLOURS)
        )
    return asked


def _shapes(scene: Scene) -> list[Asked]:
    asked = [
        Asked("what is the", f"What is the {colour} object?", item.combo.shape, SHAPES_SEEN_IN[colour])
        for colour, item in only_ones(scene, "colour").items()
    ]
    if scene.others:
        asked.append(Asked("what is the biggest", "What is the biggest object?", scene.main.combo.shape, SHAPES))
    return asked


def _neighbours(scene: Scene) -> list[Asked]:
    asked = []
    for shape, item in only_ones(scene, "shape").items():
        for where, words in WHERE.items():
            other = neighbour(scene, item, where)
            if other is None:
                continue
            rest = tuple(name for name in SHAPES if name != shape)
            asked.append(Asked(f"what is {where}", f"What is {words} the {shape}?", other.combo.shape, rest))
            text = f"What color is the object {words} the {shape}?"
            asked.append(Asked(f"what color is {where}", text, other.combo.colour, COLOURS))
    return asked


def _sizes(scene: Scene) -> list[Asked]:
    return [
        Asked("how big", f"How big is the {shape}?", item.size, SIZES)
        for shape, item in only_ones(scene, "shape").items()
    ]


def _backdrop(scene: Scene) -> list[Asked]:
    return [
        Asked("dark or light", "Is the background dark or light?", scene.background.tone, TONES),
        Asked("what pattern", _BACKGROUND_PATTERN, scene.background.pattern, PATTERNS),
    ]


FAMILIES: dict[str, Family] = {
    "exists": _exists,
    "coloured": _coloured,
    "stands": _stands,
    "compares": _compares,
    "behind": _behind,
    "totals": _totals,
    "counts": _counts,
    "colours": _colours,
    "shapes": _shapes,
    "neighbours": _neighbours,
    "sizes": _sizes,
    "backdrop": _backdrop,
}
SHARES = {
    "exists": 10,
    "coloured": 9,
    "stands": 8,
    "compares": 6,
    "behind": 5,
    "totals": 5,
    "counts": 9,
    "colours": 13,
    "shapes": 11,
    "neighbours": 12,
    "sizes": 6,
    "backdrop": 6,
}
"""In percent: of VQA v2's answers 38% are yes or no, 12% numbers."""


def _attributes(scene: Scene) -> tuple[set[str], set[str]]:
    return set(values(scene, "shape")), set(values(scene, "colour"))


def _clear_pairs(scene: Scene) -> Iterator[tuple[str, str, Relation]]:
    """Two shapes that are there once each, and how the first clearly stands to the second."""
    singles = only_ones(scene, "shape")
    for first, item in singles.items():
        for second, other in singles.items():
            where = clear_relation(item, other) if first != second else None
            if where is not None:
                yield first, second, where
