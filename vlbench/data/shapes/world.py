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
        others: the probability of 0, 1, 2 ... further objects, at most four; fewer where there is no room.
        alike: the probability that a further object must share its colour or its shape with one before it.
        apart: the least distance between two further objects, in sums of their radii; below 1 they may touch.
        mains: the sizes that the main object may have.
    """

    number: int
    held_out: bool
    balanced: bool
    others: tuple[float, ...] = (0.45, 0.33, 0.22)
    alike: float = 0.0
    apart: float = 0.8
    mains: tuple[Size, ...] = ("large", "medium")

    @property
    def combos(self) -> tuple[Combo, ...]:
        """The combinations that may occur."""
        return COMBOS if self.held_out else SEEN


def _asked_about(number: int) -> Stream:
    """Pictures for sentences: one to four objects, nothing hidden, and often something that is nearly what is named."""
    return Stream(number, held_out=False, balanced=False, others=(0.2, 0.25, 0.25, 0.3), alike=0.5, apart=1.05)


def _pointed_at(number: int) -> Stream:
    """Pictures for phrases that pick one object: as many objects as there is room for, most of them alike."""
    return Stream(
        number, held_out=False, balanced=False, others=(0, 0.1, 0.3, 0.6), alike=0.8, apart=1.05, mains=("medium",)
    )


STREAMS: dict[str, Stream] = {
    "pairs": Stream(1, held_out=False, balanced=False),
    "labels": Stream(2, held_out=False, balanced=True),
    "classes/train": Stream(3, held_out=True, balanced=True),
    "classes/val": Stream(4, held_out=True, balanced=True),
    "classes/test": Stream(5, held_out=True, balanced=True),
    "retrieval": Stream(6, held_out=False, balanced=False, others=(0.0, 0.1, 0.9)),
    "coco/train": Stream(7, held_out=False, balanced=False),
    "coco/val": Stream(8, held_out=False, balanced=False),
    "vqa/train": _asked_about(9),
    "vqa/val": _asked_about(10),
    "vqa/test": _asked_about(11),
    "nlvr2/train": _asked_about(12),
    "nlvr2/dev": _asked_about(13),
    "nlvr2/test1": _asked_about(14),
    "snli_ve/train": _asked_about(15),
    "snli_ve/dev": _asked_about(16),
    "snli_ve/test": _asked_about(17),
    "refcoco/train": _pointed_at(18),
    "refcoco/val": _pointed_at(19),
    "refcoco/testA": _pointed_at(20),
    "refcoco/testB": _pointed_at(21),
}

GROUPS = {
    "pretrain": ("pairs", "labels"),
    "measure": ("classes", "seen", "heldout", "retrieval", "coco"),
    "finetune": ("vqa", "nlvr2", "snli_ve", "refcoco"),
}
"""Parts that are made together on first use: who only trains need not wait for the test sets."""
PARTS = tuple(part for parts in GROUPS.values() for part in parts)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many images each part holds. ``seen`` and ``heldout`` split the test images of ``classes`` between them.

    ``nlvr2`` alone counts sets: of four pairs, and so eight images, each.
    """

    pairs: int = 12_000
    labels: int = 8_000
    classes_train: int = 4_000
    classes_val: int = 1_000
    classes_test: int = 2_000
    retrieval: int = 1_000
    coco_train: int = 1_000
    coco_val: int = 300
    vqa_train: int = 3_000
    vqa_val: int = 600
    vqa_test: int = 1_200
    nlvr2_train: int = 520
    nlvr2_dev: int = 130
    nlvr2_test1: int = 130
    snli_ve_train: int = 3_000
    snli_ve_dev: int = 600
    snli_ve_test: int = 1_200
    refcoco_train: int = 3_000
    refcoco_val: int = 500
    refcoco_testA: int = 500
    refcoco_testB: int = 500
    pixels: int = 64
    """Height and width of every image."""


TINY = Sizes(
    pairs=96,
    labels=72,
    classes_train=96,
    classes_val=48,
    classes_test=96,
    retrieval=32,
    coco_train=24,
    coco_val=12,
    vqa_train=48,
    vqa_val=16,
    vqa_test=24,
    nlvr2_train=8,
    nlvr2_dev=3,
    nlvr2_test1=4,
    snli_ve_train=48,
    snli_ve_dev=16,
    snli_ve_test=24,
    refcoco_train=36,
    refcoco_val=12,
    refcoco_testA=12,
    refcoco_testB=12,
)
"""A world for tests, made in about a second."""
