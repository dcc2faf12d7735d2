"""A backbone for ``--model tests.verbs.toy_backbone:build``: mean colours, and the colours that words name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vlbench.core.cards import Preprocess
from vlbench.core.types import Backbone, Features
from vlbench.models.backbone import wrap

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class MeanColour(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.calls = 0

    def forward(self, images_BCHW: torch.Tensor) -> Features:
        self.calls += len(images_BCHW)
        mean_BC = images_BCHW.mean(dim=(2, 3)) * self.gain
        return Features(pooled_BD=mean_BC, embed_BE=mean_BC - mean_BC.mean(dim=1, keepdim=True))


def embed_words(texts: Sequence[str]) -> torch.Tensor:
    rows = [next((rgb for word, rgb in COLOURS.items() if word in text), (0.1, 0.1, 0.1)) for text in texts]
    return torch.tensor(rows) - 1 / 3


PREPROCESS = Preprocess(image_size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def build() -> Backbone:
    return wrap(MeanColour(), preprocess=PREPROCESS, name="toy", text=embed_words)


def build_other() -> Backbone:
    return wrap(MeanColour(2.0), preprocess=PREPROCESS, name="toy", text=embed_words)


def build_vision_only() -> Backbone:
    class Pooled(MeanColour):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return super().forward(images_BCHW).pooled_BD

    return wrap(Pooled(), preprocess=PREPROCESS, name="toy-vision")


def build_broken() -> Backbone:
    return wrap(MeanColour(float("nan")), preprocess=PREPROCESS, name="toy-broken", text=embed_words)
