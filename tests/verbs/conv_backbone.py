"""Two towers with random weights and real convolutions, for ``--model tests.verbs.conv_backbone:build``.

``build_slow`` is the same model, takes a while for each batch and has shards of eight rows; ``build_dying`` is one that
ends the second process of ``torchrun`` with SIGKILL after its first batch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

import torch
from torch import nn

from vlbench.adapters import encoder
from vlbench.core.cards import Preprocess
from vlbench.core.types import Backbone, Features
from vlbench.models.backbone import wrap

PREPROCESS = Preprocess(image_size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(32, 12)

    def forward(self, images_BCHW: torch.Tensor) -> Features:
        pooled_BD = self.body(images_BCHW).mean(dim=(2, 3))
        return Features(pooled_BD=pooled_BD, embed_BE=self.head(pooled_BD))


class Slow(Towers):
    def forward(self, images_BCHW: torch.Tensor) -> Features:
        time.sleep(0.1)
        return super().forward(images_BCHW)


class Dying(Towers):
    batches = 0

    def forward(self, images_BCHW: torch.Tensor) -> Features:
        Dying.batches += 1
        if os.environ.get("RANK") == "1" and Dying.batches > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images_BCHW)


def embed(texts: Sequence[str]) -> torch.Tensor:
    """Letters, counted and mixed by a fixed random matrix."""
    counts = torch.tensor([[float(text.count(chr(97 + letter))) for letter in range(26)] for text in texts])
    mixing = torch.randn(26, 12, generator=torch.Generator().manual_seed(1))
    return counts @ mixing


def _wrapped(kind: type[Towers]) -> Backbone:
    torch.manual_seed(0)
    return wrap(kind(), preprocess=PREPROCESS, name="towers", text=embed)


def build() -> Backbone:
    return _wrapped(Towers)


def build_slow() -> Backbone:
    encoder.SHARD_ROWS = 8
    return _wrapped(Slow)


def build_dying() -> Backbone:
    return _wrapped(Dying)
