"""An adapter that trains: a linear classifier on frozen features, tuned with the trainer of pretraining.

``protocol`` cannot be given for a user's own data, so a test says by the environment what is to go wrong:
``TUNED_FAILS=judge`` fails where the first judges, ``all`` in every process, ``1`` in that process alone, in training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from tests.finetune.toys import Points
from vlbench.adapters.common.classification import classification_outcomes, estimates, labels_of, prediction_rows
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Rows
from vlbench.finetune.config import FinetuneConfig
from vlbench.finetune.folder import work_folder
from vlbench.finetune.recipe import FineTuner
from vlbench.finetune.run import finetune
from vlbench.train.losses import cross_entropy


class Config(FinetuneConfig):
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 30,
            "batch_size": 8,
            "judge_every": 10,
            "log_every": 10,
            "optim": {"lr": 0.003, "weight_decay": 0.0},
        },
        "paper": {},
    }


class Head(FineTuner):
    name = "tuned"

    def __init__(self, width: int) -> None:
        self.width = width

    def build(self, config: Any, classes: Sequence[str]) -> nn.Module:
        return nn.Linear(self.width, len(classes), dtype=torch.float64)

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        if os.environ.get("TUNED_FAILS") == os.environ.get("RANK", "0"):
            raise UserError("a drop of water in the machine")
        return {"loss": cross_entropy(model(batch["points_BD"]), batch["labels_B"])}


class Tuned:
    name = "tuned"
    Config = Config
    metric = "acc1"
    needs = frozenset({"image", "label"})
    requires = frozenset({"pooled"})
    splits = ("train", "test")
    trains = True

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        train, test = data.split("train"), data.split("test")
        known, features = encoder.images(train), encoder.images(test)
        if os.environ.get("TUNED_FAILS") == "all":
            raise UserError("the same trouble everywhere")
        feed = Points()
        feed.labels_N = np.asarray(labels_of(train))
        mean, std = known.pooled_ND.mean(0), known.pooled_ND.std(0) + 1e-6
        feed.points_ND = torch.tensor((known.pooled_ND - mean) / std, dtype=torch.float64)
        feed.classes = tuple(train.classes)
        labels_N = torch.tensor(feed.labels_N)

        def judge(module: nn.Module) -> float:
            if os.environ.get("TUNED_FAILS") == "judge":
                raise UserError("the judge is asleep")
            return float((module(feed.points_ND).argmax(1) == labels_N).double().mean())

        settings = {"backbone": encoder.fingerprint, "adapter": "tuned", "data_key": "toy"}
        tuned = finetune(
            Head(known.pooled_ND.shape[1]),
            config,
            feed=feed,
            judge=judge,
            folder=work_folder(encoder.backbone.card.id, config=config, **settings),
            device=encoder.device,
        )
        with torch.no_grad():
            asked_ND = torch.tensor((features.pooled_ND - mean) / std, dtype=torch.float64)
            logits_NC = tuned.module(asked_ND).numpy()
        chosen = {"learning_rate": tuned.learning_rate, "step": tuned.step, "held_out": tuned.value}
        meta = {"classes": list(test.classes), "chance": {"acc1": 1 / 3}, "chosen": chosen}
        return prediction_rows(features, np.asarray(labels_of(test)), [logits_NC], meta=meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        return classification_outcomes(rows, top5=False)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        return estimates(self.outcomes(rows, config))


ADAPTER = Tuned()
