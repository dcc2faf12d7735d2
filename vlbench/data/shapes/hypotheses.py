"""Hypotheses about a scene as SNLI-VE has them: what follows from the picture, what contradicts it, what is open.

What is said of an object that is not in the picture is open: nothing there speaks for it or against it.
"""

from __future__ import annotations

from vlbench.data.shapes.balance import Asked, Family
from vlbench.data.shapes.facts import (
    COLOURS_SEEN_ON,
    SHAPES_SEEN_IN,
    WHERE,
    clear_relation,
    is_big,
    is_bigger,
    only_ones,
    values,
)
from vlbench.data.shapes.scene import Scene, SceneObject
from vlbench.data.shapes.world import COLOURS, OPPOSITE, PATTERNS, RELATIONS, SHAPES, TONES

LABELS = ("entailment", "contradiction", "neutral")


def _said(wording: str, text: str, truth: bool | None) -> Asked:
    return Asked(wording, text, "neutral" if truth is None else LABELS[not truth], LABELS)


def _coloured(scene: Scene) -> list[Asked]:
    return [
        _said("color", f"The {shape} is {colour}.", None if item is None else item.combo.colour == colour)
        for shape, item in _shapes_or_none(scene).items()
        for colour in COLOURS_SEEN_ON[shape]
    ]


def _shaped(scene: Scene) -> list[Asked]:
    singles = only_ones(scene, "colour")
    absent = set(COLOURS) - set(values(scene, "colour"))
    return [
        _said("shape", f"The {colour} object is a {shape}.", singles[colour].combo.shape == shape if present else None)
        for colour in COLOURS
        for present in [colour in singles]
        if present or colour in absent
        for shape in SHAPES_SEEN_IN[colour]
    ]


def _sized(scene: Scene) -> list[Asked]:
    return [
        _said("size", f"The {shape} is {size}.", None if item is None else is_big(item) == (size == "big"))
        for shape, item in _shapes_or_none(scene).items()
        for size in ("big", "small")
    ]


def _stands(scene: Scene) -> list[Asked]:
    asked = []
    for first, second, item, other in _pairs(scene):
        if item is None or other is None:
            told = dict.fromkeys(RELATIONS)
        else:
            where = clear_relation(item, other)
            told = {} if where is None else {where: True, OPPOSITE[where]: False}
        for said, truth in told.items():
            asked.append(_said(f"is {said}", f"The {first} is {WHERE[said]} the {second}.", truth))
    return asked


def _compares(scene: Scene) -> list[Asked]:
    asked = []
    for first, second, item, other in _pairs(scene):
        text = f"The {first} is bigger than the {second}."
        if item is None or other is None:
            asked.append(_said("bigger", text, None))
        elif (bigger := is_bigger(item, other)) is not None:
            asked.append(_said("bigger", text, bigger))
    return asked


def _alike(scene: Scene) -> list[Asked]:
    asked = []
    for first, second, item, other in _pairs(scene):
        if SHAPES.index(first) < SHAPES.index(second):
            truth = None if item is None or other is None else item.combo.colour == other.combo.colour
            asked.append(_said("same color", f"The {first} and the {second} have the same color.", truth))
    return asked


def _grounded(scene: Scene) -> list[Asked]:
    ground = scene.background
    asked = []
    for shape, item in _shapes_or_none(scene).items():
        for word in (*TONES, *PATTERNS):
            truth = None if item is None else word in (ground.tone, ground.pattern)
            asked.append(_said(f"on {word}", f"The {shape} is on a {word} background.", truth))
    return asked


FAMILIES: dict[str, Family] = {
    "coloured": _coloured,
    "shaped": _shaped,
    "sized": _sized,
    "stands": _stands,
    "compares": _compares,
    "alike": _alike,
    "grounded": _grounded,
}
SHARES = {
    "coloured": 45,
    "shaped": 30,
    "sized": 5,
    "stands": 5,
    "compares": 3,
    "alike": 4,
    "grounded": 8,
}
"""In percent. SNLI-VE publishes none."""


def _shapes_or_none(scene: Scene) -> dict[str, SceneObject | None]:
    """Each shape that is there once, with its object, and each that is not there, with None."""
    found: dict[str, SceneObject | None] = dict(only_ones(scene, "shape"))
    return found | {shape: None for shape in SHAPES if shape not in values(scene, "shape")}


def _pairs(scene: Scene) -> list[tuple[str, str, SceneObject | None, SceneObject | None]]:
    """Two shapes of which one at least is there once, and the other once or not at all."""
    items = _shapes_or_none(scene)
    return [
        (first, second, item, other)
        for first, item in items.items()
        for second, other in items.items()
        if first != second and not (item is None and other is None)
    ]
