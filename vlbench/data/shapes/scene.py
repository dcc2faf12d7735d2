"""What is in a picture: objects, how they stand to each other, and what lies behind them.

A scene says everything that later supervision needs (attributes, positions, depth, relations, background), and draws
all its randomness from ``(seed, stream, index)``. Coordinates are fractions of the image side, y downwards.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, field

import numpy as np

from vlbench.data.shapes.world import (
    OPPOSITE,
    PATTERNS,
    RELATIONS,
    STREAMS,
    TONES,
    Combo,
    Pattern,
    Relation,
    Size,
    Stream,
    Tone,
)

# Hue in degrees, saturation, value: bands wide enough to vary and far enough apart to name, lighting included.
_COLOUR_BANDS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-9, 7), (0.70, 1.0), (0.62, 0.97)),
    "yellow": ((47, 61), (0.65, 1.0), (0.80, 1.0)),
    "green": ((95, 148), (0.45, 0.95), (0.40, 0.85)),
    "blue": ((204, 236), (0.55, 1.0), (0.55, 0.97)),
    "purple": ((272, 302), (0.42, 0.85), (0.45, 0.82)),
    "brown": ((18, 30), (0.50, 0.80), (0.34, 0.56)),
}
_RADII: dict[Size, tuple[float, float]] = {
    "large": (0.295, 0.350),
    "medium": (0.235, 0.280),
    "small": (0.110, 0.135),
    "tiny": (0.085, 0.100),
}
_OTHER_SIZES: tuple[Size, ...] = ("small", "tiny")
_DIRECTION: dict[Relation, float] = {
    "right of": 0.0,
    "below": 0.5 * math.pi,
    "left of": math.pi,
    "above": 1.5 * math.pi,
}
_SPREAD = math.radians(27)  # how far a neighbour may stray from the axis that names its relation
_TILT = math.radians(15)  # how far an object leans: shapes have an upright
_TRIES = 60


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object.

    ``radius`` is that of the circle around the shape; ``rotation`` is in radians, clockwise; ``stretch`` multiplies the
    shape's own x axis and divides its y axis; ``depth`` orders drawing, the highest last and in front.
    """

    combo: Combo
    size: Size
    x: float
    y: float
    radius: float
    rotation: float
    stretch: float
    depth: int
    rgb: tuple[float, float, float]

    @property
    def name(self) -> str:
        """The class name, ``"red circle"``."""
        return self.combo.name


@dataclass(frozen=True, slots=True)
class Background:
    """What lies behind: a tone and pattern that captions name, and the numbers that they do not."""

    tone: Tone
    pattern: Pattern
    rgb: tuple[float, float, float]
    second_rgb: tuple[float, float, float]
    angle: float
    period: float


@dataclass(frozen=True, slots=True)
class Stroke:
    """A thin meaningless line, behind all objects."""

    points: tuple[tuple[float, float], ...]
    width: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture's meaning. ``objects[0]`` is the main object: the largest, in front, the one that gives the class."""

    stream: str
    index: int
    objects: tuple[SceneObject, ...]
    background: Background
    strokes: tuple[Stroke, ...] = ()
    light_angle: float = 0.0
    light: float = 1.0
    light_slope: float = 0.0
    noise: float = 0.0
    """Standard deviation of the pixel noise, of 1."""
    key: int = field(default=0, repr=False)
    """Seeds what is derived from the scene: pixel noise and the choice of captions."""

    @property
    def main(self) -> SceneObject:
        """The object that gives the picture its class."""
        return self.objects[0]

    @property
    def others(self) -> tuple[SceneObject, ...]:
        """The further objects, nearest relation to the main object first as captions tell them."""
        return self.objects[1:]

    def relation(self, first: int, second: int) -> Relation:
        """How object ``first`` stands to object ``second``, along the axis on which they are further apart."""
        return relation(self.objects[first], self.objects[second])

    def relations(self) -> dict[tuple[int, int], Relation]:
        """The relation of every ordered pair of objects."""
        pairs = range(len(self.objects))
        return {(i, j): self.relation(i, j) for i in pairs for j in pairs if i != j}

    def place(self) -> tuple[int, int]:
        """Row and column of the main object on a grid of three by three."""
        return _third(self.main.y), _third(self.main.x)


def relation(first: SceneObject, second: SceneObject) -> Relation:
    """How ``first`` stands to ``second``."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def sample_scene(seed: int, stream: str, index: int) -> Scene:
    """Scene ``index`` of a stream of the world ``seed``: a pure function of its three arguments."""
    rules = STREAMS[stream]
    rng = np.random.default_rng([seed, rules.number, index])
    objects = _sample_objects(rng, rules, index)
    background = _sample_background(rng)
    return Scene(
        stream=stream,
        index=index,
        objects=objects,
        background=background,
        strokes=_sample_strokes(rng, background),
        light_angle=_between(rng, 0, 2 * math.pi),
        light=_between(rng, 0.84, 1.08),
        light_slope=_between(rng, 0.0, 0.22),
        noise=_between(rng, 0.005, 0.015),
        key=int(rng.integers(2**32)),
    )


def _third(value: float) -> int:
    return 0 if value < 0.42 else 2 if value > 0.58 else 1


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _sample_objects(rng: np.random.Generator, rules: Stream, index: int) -> tuple[SceneObject, ...]:
    combos = rules.combos
    draw = int(rng.integers(len(combos)))  # drawn even where it is not used, so that streams differ in one number only
    main_combo = combos[index % len(combos)] if rules.balanced else combos[draw]
    wanted = int(np.searchsorted(np.cumsum(rules.others), rng.random() * sum(rules.others)))
    chosen = [main_combo]
    while len(chosen) < 1 + wanted:
        candidate = combos[int(rng.integers(len(combos)))]
        if rules.alike and rng.random() < rules.alike and not any(_alike(candidate, one) for one in chosen):
            continue
        if candidate not in chosen:  # no two alike in one picture: every name refers to one object
            chosen.append(candidate)
    main = _sample_object(rng, main_combo, rules.mains[int(rng.integers(len(rules.mains)))], depth=wanted)
    others = [
        _sample_object(rng, combo, _OTHER_SIZES[int(rng.integers(2))], depth=depth)
        for depth, combo in enumerate(chosen[1:])
    ]
    return _arrange(rng, main, others, rules.apart)


def _alike(first: Combo, second: Combo) -> bool:
    return first.colour_index == second.colour_index or first.shape_index == second.shape_index


def _sample_object(rng: np.random.Generator, combo: Combo, size: Size, *, depth: int) -> SceneObject:
    (h0, h1), (s0, s1), (v0, v1) = _COLOUR_BANDS[combo.colour]
    rgb = colorsys.hsv_to_rgb(_between(rng, h0, h1) / 360 % 1, _between(rng, s0, s1), _between(rng, v0, v1))
    return SceneObject(
        combo=combo,
        size=size,
        x=0.5,
        y=0.5,
        radius=_between(rng, *_RADII[size]),
        rotation=_between(rng, -_TILT, _TILT),
        stretch=math.exp(_between(rng, -0.08, 0.08)),
        depth=depth,
        rgb=rgb,
    )


def _arrange(
    rng: np.random.Generator, main: SceneObject, others: list[SceneObject], apart: float
) -> tuple[SceneObject, ...]:
    """Positions such that all lies inside, neighbours keep to their axis, and small objects hide each other a bit.

    How far those overlap is limited by ``apart``, in sums of their radii.

    Where there is no room for all, the last object is left out and the rest tried again.
    """
    while True:
        for _ in range(_TRIES):
            placed = _try_arrange(rng, main, others, apart)
            if placed is not None:
                return placed
        assert others, "a single object always fits"
        others = others[:-1]


def _try_arrange(
    rng: np.random.Generator, main: SceneObject, others: list[SceneObject], apart: float
) -> tuple[SceneObject, ...] | None:
    margin = main.radius + 0.015
    main = _moved(main, _between(rng, margin, 1 - margin), _between(rng, margin, 1 - margin))
    placed = [main]
    sides = rng.permutation(len(RELATIONS))
    for other, side in zip(others, sides):
        angle = _DIRECTION[RELATIONS[side]] + _between(rng, -_SPREAD, _SPREAD)
        distance = (main.radius + other.radius) * _between(rng, 0.98, 1.5)
        x, y = main.x + distance * math.cos(angle), main.y + distance * math.sin(angle)
        if not (other.radius <= x <= 1 - other.radius and other.radius <= y <= 1 - other.radius):
            return None
        moved = _moved(other, x, y)
        if any(math.hypot(x - o.x, y - o.y) < apart * (other.radius + o.radius) for o in placed[1:]):
            return None
        assert relation(main, moved) == OPPOSITE[RELATIONS[side]], "a neighbour lies on its own side"
        placed.append(moved)
    return tuple(placed)


def _moved(item: SceneObject, x: float, y: float) -> SceneObject:
    return SceneObject(item.combo, item.size, x, y, item.radius, item.rotation, item.stretch, item.depth, item.rgb)


def _sample_background(rng: np.random.Generator) -> Background:
    tone = TONES[int(rng.integers(len(TONES)))]
    pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
    value = _between(rng, 0.12, 0.34) if tone == "dark" else _between(rng, 0.70, 0.95)
    step = _between(rng, 0.04, 0.09) * (1 if rng.random() < 0.5 else -1)
    return Background(
        tone=tone,
        pattern=pattern,
        rgb=_muted(rng, value),
        second_rgb=_muted(rng, min(1.0, max(0.04, value + step))),
        angle=_between(rng, 0, math.pi),
        period=_between(rng, 0.10, 0.24),
    )


def _muted(rng: np.random.Generator, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(float(rng.random()), _between(rng, 0.0, 0.22), value)


def _sample_strokes(rng: np.random.Generator, background: Background) -> tuple[Stroke, ...]:
    strokes = []
    for _ in range(int(rng.integers(0, 2))):
        points = tuple((float(x), float(y)) for x, y in rng.random((int(rng.integers(2, 4)), 2)) * 1.2 - 0.1)
        base = max(background.rgb)
        value = min(1.0, max(0.0, base + _between(rng, 0.12, 0.3) * (1 if base < 0.5 else -1)))
        strokes.append(Stroke(points, _between(rng, 0.010, 0.028), _muted(rng, value)))
    return tuple(strokes)
