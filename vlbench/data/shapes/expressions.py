"""Phrases that pick one object of a scene as RefCOCO+ has them: by colour, shape and size, never by place."""

from __future__ import annotations

import numpy as np

from vlbench.data.shapes.facts import is_big, is_bigger
from vlbench.data.shapes.scene import Scene, SceneObject
from vlbench.data.shapes.world import Combo

PHRASES = 3
_SIZED = 0.5  # the share of objects whose size is a kind to draw from: boxes alone tell size, without any picture

_COLOUR_WORDS = {"purple": ("purple", "violet")}
_SHAPE_WORDS = {"crescent": ("crescent", "moon"), "circle": ("circle", "disc")}


def phrases(scene: Scene, place: int, rng: np.random.Generator) -> list[str]:
    """``PHRASES`` different phrases that each are true of object ``place`` and of no other."""
    item = scene.objects[place]
    kinds = [kind for kind in _kinds(scene, item, rng) if kind]
    rng.shuffle(kinds)
    said: list[str] = []
    while len(said) < PHRASES:  # one of each kind, then a second of some; there are as many of the first kind alone
        for kind in kinds:
            if kind and len(said) < PHRASES:
                said.append(kind.pop(int(rng.integers(len(kind)))))
    return said


def _kinds(scene: Scene, item: SceneObject, rng: np.random.Generator) -> list[list[str]]:
    """What can be said, by what it goes by."""
    rest = [other for other in scene.objects if other is not item]
    colour, shape = _worded(item.combo, rng)
    own_colour = all(other.combo.colour != item.combo.colour for other in rest)
    own_shape = all(other.combo.shape != item.combo.shape for other in rest)
    return [
        [f"{colour} {shape}", f"the {colour} {shape}", f"{shape} that is {colour}"],
        [f"{colour} one", f"the {colour} shape", f"{colour} thing"] if own_colour else [],
        [shape, f"the {shape}"] if own_shape else [],
        [f"the one that is not {word}" for word in _what_the_rest_are(item, rest)],
        _sized(item, rest, colour, shape) if rng.random() < _SIZED else [],
    ]


def _sized(item: SceneObject, rest: list[SceneObject], colour: str, shape: str) -> list[str]:
    size = "big" if is_big(item) else "small"
    alike = [other for other in rest if is_big(other) == is_big(item)]
    said = _superlatives(item, rest)
    if not alike:
        said += [f"the {size} one", f"{size} shape"]
    if all(other.combo.colour != item.combo.colour for other in alike):
        said.append(f"{size} {colour} one")
    if all(other.combo.shape != item.combo.shape for other in alike):
        said.append(f"{size} {shape}")
    return said


def _worded(combo: Combo, rng: np.random.Generator) -> tuple[str, str]:
    """The colour and shape in a word that people use for them, mostly the first."""
    words = [_COLOUR_WORDS.get(combo.colour, (combo.colour,)), _SHAPE_WORDS.get(combo.shape, (combo.shape,))]
    colour, shape = (choice[int(rng.random() < 0.25) % len(choice)] for choice in words)
    return colour, shape


def _superlatives(item: SceneObject, rest: list[SceneObject]) -> list[str]:
    bigger = [is_bigger(item, other) for other in rest]
    if not rest or len(set(bigger)) > 1 or bigger[0] is None:
        return []
    return ["the biggest one", "largest shape"] if bigger[0] else ["the smallest one", "smallest shape"]


def _what_the_rest_are(item: SceneObject, rest: list[SceneObject]) -> list[str]:
    """The colour that all others have and this one has not, and the shape, with its article."""
    if len(rest) < 2:
        return []
    colours, shapes = {other.combo.colour for other in rest}, {other.combo.shape for other in rest}
    words = list(colours) if len(colours) == 1 and item.combo.colour not in colours else []
    return words + ([f"a {shape}" for shape in shapes] if len(shapes) == 1 and item.combo.shape not in shapes else [])
