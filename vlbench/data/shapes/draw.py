"""Pixels of a scene, with the visible mask of every object.

Shapes are drawn four times as large and averaged down, which is their anti-aliasing; everything else is arithmetic on
the small image. H, W are the image's sides, N its objects in the scene's order.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from vlbench.data.shapes.scene import Background, Scene, SceneObject

_OVERSAMPLE = 4


@dataclass(frozen=True, slots=True)
class Rendering:
    """``image_HWC`` as uint8 RGB, and ``masks_NHW``: the pixels that belong, more than half, to each object."""

    image_HWC: np.ndarray
    masks_NHW: np.ndarray

    def boxes_xywh(self) -> list[tuple[int, int, int, int]]:
        """The tight box of each visible mask in whole pixels, as COCO writes boxes."""
        return [_box(mask) for mask in self.masks_NHW]

    def png(self) -> bytes:
        """The image as PNG, with settings that never change. Stored, not compressed: noise hardly compresses."""
        buffer = BytesIO()
        Image.fromarray(self.image_HWC).save(buffer, format="PNG", compress_level=0)
        return buffer.getvalue()


def render(scene: Scene, *, size: int = 64) -> Rendering:
    """The picture of a scene, ``size`` pixels square."""
    rng = np.random.default_rng([scene.key, 1])
    y_HW, x_HW = _grid(size)
    canvas = _background(scene.background, x_HW, y_HW)
    if scene.strokes:
        canvas = _with_strokes(canvas, scene, size)
    alphas = [_alpha(item, size) for item in scene.objects]
    for place in sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].depth):
        item, alpha = scene.objects[place], alphas[place]
        shade = _shading(item, scene, x_HW, y_HW)[..., None]
        canvas += alpha[..., None] * (np.asarray(item.rgb, np.float32) * shade - canvas)
    slope = math.cos(scene.light_angle) * (x_HW - 0.5) + math.sin(scene.light_angle) * (y_HW - 0.5)
    canvas *= (scene.light * (1 + scene.light_slope * slope))[..., None]
    canvas += _noise(rng, scene.noise, size)
    image = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
    return Rendering(image, _visible(scene, alphas))


def rle(mask_HW: np.ndarray) -> dict[str, list[int]]:
    """A mask as COCO's uncompressed run lengths: column by column, runs of 0 and 1 in turn, beginning with 0."""
    flat = mask_HW.T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = [0, *edges.tolist(), flat.size]
    counts = [end - start for start, end in itertools.pairwise(bounds)]
    return {"size": list(mask_HW.shape), "counts": [0, *counts] if flat[0] else counts}


def outline(shape: str) -> np.ndarray:
    """The corners of a shape inside the unit circle, ``(K, 2)``, unrotated. Curves are polygons of many corners."""
    if shape in _SIDES:
        return _ring(_SIDES[shape], 1.0, turn=math.pi / 4 if shape == "square" else 0.0)
    if shape == "star":
        points = np.empty((10, 2))
        points[0::2], points[1::2] = _ring(5, 1.0), _ring(5, 0.46, turn=math.pi / 5)
        return points
    if shape == "cross":
        a = 0.36
        quarter = np.array([[a, -0.94], [a, -a], [0.94, -a]])
        return np.concatenate([quarter @ np.linalg.matrix_power(_QUARTER_TURN, k) for k in range(4)])
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x, y - 2.0], axis=1) / 16.5
    assert shape == "crescent", f"no outline for {shape!r}"
    # An outer arc and, back again, the arc of a smaller circle that is shifted towards the opening.
    outer, inner = np.linspace(0.62, 2 * math.pi - 0.62, 28), np.linspace(2 * math.pi - 0.95, 0.95, 22)
    tip = np.array([math.cos(0.62), math.sin(0.62)])
    radius = tip[1] / math.sin(0.95)
    centre = tip[0] - radius * math.cos(0.95)
    return np.concatenate(
        [
            np.stack([np.cos(outer), np.sin(outer)], axis=1),
            np.stack([centre + radius * np.cos(inner), radius * np.sin(inner)], axis=1)[1:-1],
        ]
    ) + np.array([0.1, 0.0])


_SIDES = {"circle": 48, "triangle": 3, "square": 4, "hexagon": 6}
_QUARTER_TURN = np.array([[0, 1], [-1, 0]])


def _ring(count: int, radius: float, turn: float = 0.0) -> np.ndarray:
    angles = np.arange(count) * (2 * math.pi / count) - math.pi / 2 + turn
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


@functools.cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    y_HW, x_HW = np.meshgrid(axis, axis, indexing="ij")
    return y_HW, x_HW


@functools.cache
def _outline(shape: str) -> np.ndarray:
    return outline(shape)


def corners(item: SceneObject) -> np.ndarray:
    """The object's outline in the picture, ``(K, 2)`` as fractions of the side."""
    points = _outline(item.combo.shape) * np.array([item.stretch, 1 / item.stretch])
    cos, sin = math.cos(item.rotation), math.sin(item.rotation)
    turned = points @ np.array([[cos, sin], [-sin, cos]])
    return turned * item.radius + np.array([item.x, item.y])


def _alpha(item: SceneObject, size: int) -> np.ndarray:
    """How much of each pixel the object covers, 0 to 1."""
    large = Image.new("L", (size * _OVERSAMPLE, size * _OVERSAMPLE))
    points = corners(item) * (size * _OVERSAMPLE) - 0.5
    ImageDraw.Draw(large).polygon(points.reshape(-1).tolist(), fill=255)
    return np.asarray(large.reduce(_OVERSAMPLE), np.float32) / 255


def _background(ground: Background, x_HW: np.ndarray, y_HW: np.ndarray) -> np.ndarray:
    u = (math.cos(ground.angle) * x_HW + math.sin(ground.angle) * y_HW) / ground.period
    v = (math.cos(ground.angle) * y_HW - math.sin(ground.angle) * x_HW) / ground.period
    if ground.pattern == "plain":
        mix = np.zeros_like(x_HW)
    elif ground.pattern == "striped":
        mix = _edge(np.cos(2 * math.pi * u))
    elif ground.pattern == "checkered":
        mix = _edge(np.sin(math.pi * u) * np.sin(math.pi * v))
    else:
        mix = _edge(np.cos(2 * math.pi * u) + np.cos(2 * math.pi * v) - 0.8)
    first, second = np.asarray(ground.rgb, np.float32), np.asarray(ground.second_rgb, np.float32)
    return first + mix[..., None].astype(np.float32) * (second - first)


def _edge(wave_HW: np.ndarray) -> np.ndarray:
    return np.clip(wave_HW * 2.5 + 0.5, 0, 1)


def _with_strokes(canvas: np.ndarray, scene: Scene, size: int) -> np.ndarray:
    side = size * 2
    for stroke in scene.strokes:
        large = Image.new("L", (side, side))
        points = [(x * side, y * side) for x, y in stroke.points]
        ImageDraw.Draw(large).line(points, fill=255, width=max(1, round(stroke.width * side)))
        alpha = np.asarray(large.reduce(2), np.float32)[..., None] / 255
        canvas = canvas + alpha * (np.asarray(stroke.rgb, np.float32) - canvas)
    return canvas


def _shading(item: SceneObject, scene: Scene, x_HW: np.ndarray, y_HW: np.ndarray) -> np.ndarray:
    """Brighter towards the light, darker away from it."""
    along = math.cos(scene.light_angle) * (x_HW - item.x) + math.sin(scene.light_angle) * (y_HW - item.y)
    return 1 + np.clip(along / item.radius, -1, 1) * 0.14


def _noise(rng: np.random.Generator, deviation: float, size: int) -> np.ndarray:
    return rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(deviation)


def _visible(scene: Scene, alphas: list[np.ndarray]) -> np.ndarray:
    clear = np.ones_like(alphas[0])
    masks = np.zeros((len(alphas), *clear.shape), bool)
    for place in sorted(range(len(alphas)), key=lambda i: -scene.objects[i].depth):
        masks[place] = alphas[place] * clear > 0.5
        clear = clear * (1 - alphas[place])
    return masks


def _box(mask_HW: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    assert rows.size, "every object shows"
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top
