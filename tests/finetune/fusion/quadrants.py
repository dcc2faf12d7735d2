"""A world small enough to be known by heart: images of four coloured quadrants, and questions about their colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from tests.adapters.fakes import FakeSource
from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.types import Features, Region
from vlbench.finetune.fusion.config import FusionConfig
from vlbench.finetune.fusion.questions import Questions
from vlbench.models.backbone import TorchBackbone
from vlbench.models.towers import VisualTower

SIDE = 32
COLOURS = {"red": (220, 30, 30), "green": (40, 190, 60), "blue": (40, 60, 230), "white": (240, 240, 240)}
NAMES = tuple(COLOURS)
PLACES = ("top left", "top right", "bottom left", "bottom right")


def picture(colours: Sequence[int], seed: int, *, width: int = SIDE, height: int = SIDE) -> bytes:
    """A PNG of four quadrants with a little noise."""
    array = np.zeros((height, width, 3), dtype=np.int16)
    for place, colour in enumerate(colours):
        rows = slice(0, height // 2) if place < 2 else slice(height // 2, height)
        columns = slice(0, width // 2) if place % 2 == 0 else slice(width // 2, width)
        array[rows, columns] = COLOURS[NAMES[colour]]
    array += np.random.default_rng(seed).integers(-12, 12, size=array.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def boxes(width: int = SIDE, height: int = SIDE) -> list[tuple[float, float, float, float]]:
    """The quadrants, in pixels."""
    x, y = width / 2, height / 2
    return [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]


def colours_of(n: int, seed: int) -> np.ndarray:
    """``(n, 4)``: four different colours of each image."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(4) for _ in range(n)])


def source(colours_N4: np.ndarray, seed: int, split: str = "train", **more: Any) -> FakeSource:
    """The images, with their quadrants as regions."""
    images = [picture(colours, 1000 * seed + number) for number, colours in enumerate(colours_N4)]
    regions = [tuple(Region(NAMES[c], box) for c, box in zip(row, boxes())) for row in colours_N4]
    return FakeSource(images, split=split, regions=regions, **more)


def which_colour(n: int, seed: int = 0) -> Questions:
    """What colour is at a place? Answered by a class."""
    colours_N4 = colours_of(n, seed)
    place_N = np.random.default_rng(seed + 1).integers(4, size=n)
    texts = tuple(f"what colour is {PLACES[place]}?" for place in place_N)
    return Questions((source(colours_N4, seed),), texts, colours_N4[np.arange(n), place_N].tolist())


def soft_colour(n: int, seed: int = 0) -> Questions:
    """The same, answered as VQA is: the colour 1, its successor 0.3."""
    whole = which_colour(n, seed)
    return Questions(whole.views, whole.texts, [{c: 1.0, (c + 1) % 4: 0.3} for c in whole.targets])


def which_place(n: int, seed: int = 0) -> Questions:
    """Where is a colour? Answered by a region."""
    colours_N4 = colours_of(n, seed)
    colour_N = np.random.default_rng(seed + 2).integers(4, size=n)
    places = [int(np.flatnonzero(row == colour)[0]) for row, colour in zip(colours_N4, colour_N)]
    return Questions((source(colours_N4, seed),), tuple(f"the {NAMES[c]} one" for c in colour_N), places, regions=True)


def left_or_right(n: int, seed: int = 0) -> Questions:
    """Two images: is the first one's top left the colour that is named (1), or the second one's (0)?"""
    rng = np.random.default_rng(seed + 3)
    colours = [colours_of(n, seed), colours_of(n, seed + 50)]
    targets = rng.integers(2, size=n)
    texts = []
    for row in range(n):
        one, other = (int(colours[v][row, 0]) for v in (0, 1))
        if one == other:
            colours[1][row] = np.roll(colours[1][row], 1)
            other = int(colours[1][row, 0])
        texts.append(f"{NAMES[one if targets[row] else other]} first")
    views = tuple(source(part, seed + v) for v, part in enumerate(colours))
    return Questions(views, tuple(texts), targets.tolist())


class QuadrantTower(VisualTower):
    """Two strided convolutions with BatchNorm; a projection that nothing but an embedding reads."""

    arch = "quadrants"
    width = 10
    parts = frozenset({"pooled", "maps", "embed"})
    embed_dim = 3

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU()), "quadrants")
        self.deep = nn.Conv2d(8, 10, 2, 2)
        self.joint = nn.Linear(10, 3)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self._dense(images_BCHW)[0]

    def project(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        return self.joint(pooled_BD)

    def _dense(self, images_BCHW: torch.Tensor) -> Any:
        first = self.net(images_BCHW)
        second = self.deep(first)
        return second.mean((2, 3)), None, {4: first, 8: second}


def backbone(seed: int = 0, *, name: str = "quadrants") -> TorchBackbone:
    """A random tower as a backbone."""
    torch.manual_seed(seed)
    tower = QuadrantTower()
    card = ModelCard(
        id=name,
        loader="native",
        arch="quadrants",
        preprocess=Preprocess(image_size=(SIDE, SIDE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        provides=tower.parts,
    )
    return TorchBackbone(card, tower)


class Maps(nn.Module):
    """Images as their own map."""

    def forward(self, images_BCHW: torch.Tensor) -> Features:
        return Features(pooled_BD=images_BCHW.mean((2, 3)))


def settings(**values: Any) -> FusionConfig:
    """A few seconds of training."""
    small: dict[str, Any] = {
        "steps": 150,
        "batch_size": 32,
        "grid": 2,
        "levels": 2,
        "stream": {
            "width": 32,
            "layers": 2,
            "heads": 2,
            "hidden": None,
            "dropout": 0.0,
            "positions": 32,
            "init_std": 0.1,
        },
        "optim": {"lr": 4e-3},
        "max_words": 16,
        "words": 120,
        "judge_every": 50,
        "checkpoint_every": 150,
        "workers": 0,
    }
    return FusionConfig.model_validate(small | values)
