"""Little worlds and a little network for the tasks on an image and a sentence, end to end in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlbench.adapters.encoder import Encoder
from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.catalog import ADAPTERS
from vlbench.core.fingerprint import digest_all, fingerprint
from vlbench.core.types import Example, Rows, Source
from vlbench.data.digests import content_digests
from vlbench.data.shapes.world import GROUPS, TINY
from vlbench.data.shapes.write import write_world
from vlbench.data.sources import BaseSource, open_source
from vlbench.models.backbone import TorchBackbone
from vlbench.models.load import load_backbone
from vlbench.models.towers import VisualTower, grid_tokens

SIZES = replace(
    TINY,
    vqa_train=40,
    vqa_val=12,
    vqa_test=60,
    nlvr2_train=6,
    nlvr2_dev=4,
    nlvr2_test1=8,
    snli_ve_train=40,
    snli_ve_dev=12,
    snli_ve_test=60,
    refcoco_train=30,
    refcoco_val=30,
    refcoco_testA=12,
    refcoco_testB=12,
    pixels=32,
)
PART = {"vqa": "vqa", "nlvr2": "nlvr2", "entailment": "snli_ve", "grounding": "refcoco"}

QUICK: dict[str, Any] = {
    "steps": 160,
    "batch_size": 32,
    "judge_every": 80,
    "checkpoint_every": 160,
    "log_every": 80,
    "grid": 3,
    "levels": 2,
    "stream": {"width": 48, "layers": 2, "heads": 4, "hidden": 192, "positions": 48, "init_std": 0.08},
    "optim": {"lr": 4e-3, "weight_decay": 0.0},
}
"""Over the tiny preset: enough to learn some hundred examples by heart."""
BRIEF = QUICK | {"steps": 24, "judge_every": 12}


def make_world(root: Path) -> Path:
    """The four parts in pictures of 32 pixels."""
    return write_world(root, sizes=SIZES, workers=1, parts=GROUPS["finetune"])


class Roles:
    """What adapters use of a ``TaskData``: sources by role, whatever they are."""

    def __init__(self, splits: Mapping[str, Source]) -> None:
        self.splits = dict(splits)
        self.spec, self.notes, self.told_apart = "world", (), None

    def has(self, role: str) -> bool:
        return role in self.splits

    def split(self, role: str) -> Source:
        return self.splits[role]

    def fingerprint(self, roles: Any) -> str:
        return fingerprint({role: digest_all(content_digests(self.splits[role]).examples) for role in roles})


def opened(root: Path, task: str, split: str) -> Source:
    return open_source(f"shapes:{PART[task]}?root={root}", split)


def world_roles(root: Path, task: str) -> Roles:
    """The roles that the cards give: RefCOCO+ reports val, testA and testB."""
    names = {"train": "train", "val": "val", "test": "test"}
    if task == "grounding":
        names = {"train": "train", "test": "val", "testA": "testA", "testB": "testB"}
    return Roles({role: opened(root, task, name) for role, name in names.items()})


def learnt_by_heart(root: Path, task: str) -> Roles:
    """One little set in every role."""
    train = opened(root, task, "train")
    return Roles(dict.fromkeys(("train", "val", "test"), train))


class Relabelled(BaseSource):
    """A source whose right answers are those of other examples, drawn at random."""

    def __init__(self, source: Source, seed: int = 0) -> None:
        super().__init__(source.spec, source.split, provides=source.provides, classes=source.classes)
        self._source = source
        self._draw = np.random.default_rng(seed)
        self._other = self._draw.permutation(len(source)).tolist()
        self._examples = [self._made(index) for index in range(len(source))]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def ids(self) -> Any:
        return self._source.ids()

    def labels(self) -> Any:
        labels = self._source.labels()
        return None if labels is None else [labels[place] for place in self._other]

    def _made(self, index: int) -> Example:
        example, other = self._source[index], self._source[self._other[index]]
        extra = dict(example.extra)
        for key in ("answers", "multiple_choice_answer"):
            if key in extra:
                extra[key] = other.extra[key]
        if "target" in extra:
            extra["target"] = int(self._draw.integers(len(example.regions)))
        return replace(example, label=other.label, extra=extra)


class Eye(VisualTower):
    """Two strided convolutions."""

    width = 24
    parts = frozenset({"pooled", "tokens", "maps"})

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, 24, 8, stride=4, padding=2), "eye")
        self.deeper = nn.Conv2d(24, 24, 3, stride=2, padding=1)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self._dense(images_BCHW)[0]

    def _dense(self, images_BCHW: torch.Tensor) -> Any:
        fine = torch.relu(self.net(images_BCHW))
        coarse = torch.relu(self.deeper(fine))
        return coarse.mean((2, 3)), grid_tokens(coarse), {4: fine, 8: coarse}


def eye(seed: int = 0) -> TorchBackbone:
    """A small network with random weights, as a backbone."""
    tower = Eye(seed)
    card = ModelCard(
        id="eye",
        loader="test",
        arch="eye",
        preprocess=Preprocess(image_size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        provides=tower.parts,
    )
    return TorchBackbone(card, tower)


def predict(task: str, data: Roles, *, backbone: Any = None, encode_at: int = 64, **settings: Any) -> Rows:
    """Rows of one task under the tiny preset with ``QUICK`` and ``settings`` over it."""
    adapter = ADAPTERS.get(task)
    encoder = Encoder(backbone or eye(), None, batch_size=encode_at)
    rows: Rows = adapter.predict(encoder, data, adapter.Config(**{"preset": "tiny", **QUICK, **settings}))
    return rows


def scores(task: str, rows: Rows) -> dict[str, Any]:
    """Every metric of ``rows``."""
    adapter = ADAPTERS.get(task)
    found: dict[str, Any] = adapter.score(rows, adapter.Config())
    return found


def baseline(name: str) -> Any:
    return load_backbone(f"baseline:{name}")
