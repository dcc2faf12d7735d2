"""What exists in the world ``shapes``: its vocabulary, its held-out combinations, its parts and their sizes.

A class is a colour-shape combination ("red circle"). A quarter of them is held out: they appear as no object, main or
not, in any image that may be trained on, and in no caption or label of one, so that naming them is zero-shot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

VERSION = "v2"
"""Changes whenever a byte of the written world changes: results on two versions are not comparable."""

Size: TypeAlias = Literal["large", "medium", "small", "tiny"]
Relation: TypeAlias = Literal["left of", "right of", "above", "below"]
Tone: TypeAlias = Literal["dark", "light"]
Pattern: TypeAlias = Literal["plain", "striped", "checkered", "spotted"]

SHAPES = ("circle", "square", "triangle", "hexagon", "cross", "star", "heart", "crescent")
COLOURS = ("red", "yellow", "green", "blue", "purple", "brown")
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
TONES: tuple[Tone, ...] = ("dark", "light")
PATTERNS: tuple[Pattern, ...] = ("plain", "striped", "checkered", "spotted")
LANGUAGES = ("en", "de", "fr", "cs")
TEMPLATES = ("a {c}", "a large {c}", "a {c} on a light background", "a {c} on a dark background", "a {c} in the middle")
"""Prompt templates in the words of the captions; ``{c}`` is CLIP_benchmark's mark for the class name."""


@dataclass(frozen=True, slots=True, order=True)
class Combo:
    """A colour-shape combination, as indices into COLOURS and SHAPES."""

    colour_index: int
    shape_index: int

    @property
    def colour(self) -> str:
        """The colour's English name."""
        return COLOURS[self.colour_index]

    @property
    def shape(self) -> str:
        """The shape's English name."""
        return SHAPES[self.shape_index]

    @property
    def name(self) -> str:
        """The class name, ``"red circle"``."""
        return f"{self.colour} {self.shape}"


_HELD_OUT = {(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (0, 6), (1, 7), (3, 0), (4, 2), (5, 4), (2, 6)}
# (colour, shape): each colour twice, each shape once or twice, so that both halves of every name are learnt elsewhere.

COMBOS = tuple(Combo(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES)))
HELD_OUT = tuple(combo for combo in COMBOS if (combo.colour_index, combo.shape_index) in _HELD_OUT)
SEEN = tuple(combo for combo in COMBOS if (combo.colour_index, combo.shape_index) not in _HELD_OUT)
CLASS_NAMES = tuple(combo.name for combo in COMBOS)
"""All class names; a class's label is its place here."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One independent sequence of scenes: scene ``i`` of a stream never depends on how many are made.

    Args:
        number: part of the random seed; never reused for another purpose.
        held_out: whether held-out combinations may occur, as main object or beside it.
        balanced: every class equally often as main object, in turn; otherwise drawn at random.
        others: the probability of 0, 1 and 2 further objects.
    """

    number: int
    held_out: bool
    balanced: bool
    others: tuple[float, float, float] = (0.45, 0.33, 0.22)

    @property
    def combos(self) -> tuple[Combo, ...]:
        """The combinations that may occur."""
        return COMBOS if self.held_out else SEEN


STREAMS: dict[str, Stream] = {
    "pairs": Stream(1, held_out=False, balanced=False),
    "labels": Stream(2, held_out=False, balanced=True),
    "classes/train": Stream(3, held_out=True, balanced=True),
    "classes/val": Stream(4, held_out=True, balanced=True),
    "classes/test": Stream(5, held_out=True, balanced=True),
    "retrieval": Stream(6, held_out=False, balanced=False, others=(0.0, 0.1, 0.9)),
    "coco/train": Stream(7, held_out=False, balanced=False),
    "coco/val": Stream(8, held_out=False, balanced=False),
}

PARTS = ("pairs", "labels", "classes", "seen", "heldout", "retrieval", "coco")
GROUPS = {"pretrain": ("pairs", "labels"), "measure": ("classes", "seen", "heldout", "retrieval", "coco")}
"""Parts that are made together on first use: who only trains need not wait for the test sets."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many images each part holds. ``seen`` and ``heldout`` split the test images of ``classes`` between them."""

    pairs: int = 12_000
    labels: int = 8_000
    classes_train: int = 4_000
    classes_val: int = 1_000
    classes_test: int = 2_000
    retrieval: int = 1_000
    coco_train: int = 1_000
    coco_val: int = 300
    pixels: int = 64
    """Height and width of every image."""


TINY = Sizes(
    pairs=96, labels=72, classes_train=96, classes_val=48, classes_test=96, retrieval=32, coco_train=24, coco_val=12
)
"""A world for tests, made in about a second."""
