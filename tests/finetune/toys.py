"""A fine-tuning that is small enough to be looked through: a linear classifier on points, from fixed arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from vlbench.data.stream import BadTally
from vlbench.finetune.config import FinetuneConfig
from vlbench.finetune.recipe import FineTuner
from vlbench.train.distributed import Ranks, mean_over_ranks
from vlbench.train.losses import cross_entropy

CLASSES = ("a", "b", "c")


class ToyConfig(FinetuneConfig):
    """Half a second of training."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 12,
            "batch_size": 8,
            "optim": {"lr": 0.05, "weight_decay": 0.01},
            "schedule": {"kind": "cosine", "warmup": 2},
            "judge_every": 4,
            "checkpoint_every": 3,
            "log_every": 4,
        },
        "paper": {"steps": 1000, "optim": {"lr": 1e-3, "lr_factors": {"^head": 2.0}}},
    }
    dropout: float = 0.2


class Points:
    """N points of three clouds; a step's batch is drawn from its number."""

    def __init__(self, n: int = 60, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        rng = np.random.default_rng(seed)
        self.labels_N = rng.integers(3, size=n)
        points_ND = rng.normal(size=(n, 4)) + 1.5 * np.eye(3, 4)[self.labels_N]
        self.points_ND = torch.tensor(points_ND, dtype=dtype)
        self.classes = CLASSES
        self.tally = BadTally()
        self.data = self
        self.seed = seed
        self.spec = "points"

    def __len__(self) -> int:
        return len(self.labels_N)

    def identity(self) -> list[dict[str, Any]]:
        return [{"spec": self.spec, "examples": len(self), "seed": self.seed}]

    def batches(
        self, recipe: Any, config: Any, *, start: int, here: Ranks, pin: bool
    ) -> Iterator[dict[str, torch.Tensor]]:
        part_size = config.batch_size // config.loads
        share = part_size // here.world
        for step in range(start, config.steps):
            drawn = np.random.default_rng([config.seed, step]).integers(len(self), size=config.batch_size)
            for part in range(config.loads):
                first = part * part_size + here.rank * share
                mine = drawn[first : first + share]
                self.tally.record([], drawn=share)
                yield {"points_BD": self.points_ND[mine], "labels_B": torch.tensor(self.labels_N[mine])}


class Tower(nn.Module):
    """Stands where a backbone would."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, points_BD: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(points_BD))


class Net(nn.Module):
    """``visual`` and a head, with dropout between."""

    def __init__(self, dropout: float, classes: int) -> None:
        super().__init__()
        self.visual = Tower()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, classes)

    def forward(self, points_BD: torch.Tensor) -> torch.Tensor:
        logits_BC: torch.Tensor = self.head(self.dropout(self.visual(points_BD)))
        return logits_BC


class Toy(FineTuner):
    """The recipe."""

    name = "toy-tuning"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
        return {"names": "\n".join(data.classes).encode()}

    def build(self, config: Any, classes: Sequence[str]) -> nn.Module:
        return Net(config.dropout, len(classes)).to(self.dtype)

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        logits_BC, labels_B = model(batch["points_BD"]), batch["labels_B"]
        return {
            "loss": cross_entropy(logits_BC, labels_B),
            "train_accuracy": mean_over_ranks((logits_BC.argmax(1) == labels_B).float().mean()),
        }


def accuracy(module: nn.Module, held_out: Points) -> float:
    """What the toy is judged by."""
    found = module(held_out.points_ND).argmax(1).numpy() == held_out.labels_N
    return float(found.mean())
