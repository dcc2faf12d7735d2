"""What is certain of a scene: facts that all who see the picture would tell alike.

Sentences for fine-tuning are made from these alone, so that every answer follows from the picture. Where people would
hesitate (an object both left of and above another, two of nearly one size) the fact is None, and nothing is asked.
"""

from __future__ import annotations

from collections import Counter

from vlbench.data.shapes.scene import Scene, SceneObject, relation
from vlbench.data.shapes.world import COLOURS, SEEN, SHAPES, Relation

_CLEARLY_ALONG = 1.7  # neighbours of the main object keep to their axis by nearly 2 to 1
_CLEARLY_LARGER = 1.2
_BIG = frozenset({"large", "medium"})

SHAPES_SEEN_IN: dict[str, tuple[str, ...]] = {
    colour: tuple(combo.shape for combo in SEEN if combo.colour == colour) for colour in COLOURS
}
"""By colour, the shapes that it is seen with."""
COLOURS_SEEN_ON: dict[str, tuple[str, ...]] = {
    shape: tuple(combo.colour for combo in SEEN if combo.shape == shape) for shape in SHAPES
}
"""By shape, the colours that it is seen in."""
WHERE: dict[Relation, str] = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
"""Relations as sentences word them."""


def clear_relation(first: SceneObject, second: SceneObject) -> Relation | None:
    """How ``first`` stands to ``second``, or None where it lies near a diagonal."""
    across, down = abs(first.x - second.x), abs(first.y - second.y)
    return relation(first, second) if max(across, down) >= _CLEARLY_ALONG * min(across, down) else None


def is_bigger(first: SceneObject, second: SceneObject) -> bool | None:
    """Whether ``first`` is the bigger of the two, or None where they are nearly of a size."""
    if first.radius >= _CLEARLY_LARGER * second.radius:
        return True
    return False if second.radius >= _CLEARLY_LARGER * first.radius else None


def is_big(item: SceneObject) -> bool:
    """Whether people would call it big: main objects are, and are twice as wide as what people would call small."""
    return item.size in _BIG


def only_ones(scene: Scene, attribute: str) -> dict[str, SceneObject]:
    """The objects that their ``"shape"`` or ``"colour"`` alone picks out, by it."""
    values = [getattr(item.combo, attribute) for item in scene.objects]
    counts = Counter(values)
    return {value: item for value, item in zip(values, scene.objects, strict=True) if counts[value] == 1}


def values(scene: Scene, attribute: str) -> tuple[str, ...]:
    """The ``"shape"`` or ``"colour"`` of each object, in the scene's order."""
    return tuple(getattr(item.combo, attribute) for item in scene.objects)


def neighbour(scene: Scene, item: SceneObject, where: Relation) -> SceneObject | None:
    """The one object that stands ``where`` to ``item``; None where there is none, several, or one that may do so."""
    found = [other for other in scene.objects if other is not item and relation(other, item) == where]
    unclear = any(other is not item and clear_relation(other, item) is None for other in scene.objects)
    return found[0] if len(found) == 1 and not unclear else None


def plural(noun: str) -> str:
    """``crosses``, ``stars``."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"
