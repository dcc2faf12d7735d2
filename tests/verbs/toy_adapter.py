"""An adapter without a model: its rows say which examples were right."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlbench.core.config import Config as BaseConfig
from vlbench.core.registry import Registry
from vlbench.core.types import Outcomes, Result, Rows
from vlbench.stats.intervals import estimate
from vlbench.store.results import NO_EXAMPLES, ResultStore


class ToyAdapter:
    name = "toy"

    class Config(BaseConfig):
        threshold: float = 0.5

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        right = (rows["score"] > config.threshold).astype(float)
        return {"acc1": Outcomes(rows["id"], right, rows["id"], binary=True)}


ADAPTER = ToyAdapter()
TOYS = Registry("adapter", {"toy": "tests.verbs.toy_adapter:ADAPTER"}, group="vlbench.none")


def store_toy(store: ResultStore, name: str, task: str, right: int, n: int = 200, **changes: Any) -> Result:
    """A stored result of a model that is right on the first ``right`` of ``n`` examples."""
    rows = Rows({"id": [f"img{i}" for i in range(n)], "score": (np.arange(n) < right).astype(np.float32)})
    words = {
        "model": {"name": name, "spec": name, "weights_hash": "w", "backbone_fingerprint": "b" + name},
        "task": task,
        "task_version": 1,
        "task_fingerprint": "t",
        "adapter": "toy",
        "config": {"threshold": 0.5},
        "metric": "acc1",
        "estimates": {"acc1": estimate(ADAPTER.outcomes(rows, ADAPTER.Config())["acc1"])},
        "data": {"spec": "x", "split": "test", "n": n, "fingerprint": "d"},
        "examples": NO_EXAMPLES,
        "settings": {},
        "versions": {},
        "seconds": {},
        "created": "2026-01-01T00:00:00Z",
    }
    return store.save(Result.model_validate(words | changes), rows)
