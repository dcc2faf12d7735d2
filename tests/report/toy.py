"""Results made up for the tests, each with the outcomes behind its number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlbench.core.types import Outcomes, Result
from vlbench.stats.intervals import estimate

N = 400


class Toy:
    """A handful of results and their outcomes; ``add`` makes one, ``outcomes_of`` answers for it."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self._outcomes: dict[tuple[str, str, int, str], dict[str, Outcomes]] = {}

    def add(
        self,
        name: str,
        task: str = "linear/cifar10",
        *,
        right: int | np.ndarray = 240,
        captions: int = 1,
        model: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Result:
        """A model right on the first ``right`` of N images, or as the array says; ``captions`` values an image."""
        values = (np.arange(N) < right).astype(float) if isinstance(right, int) else np.asarray(right, dtype=float)
        ids = [f"img{i // captions:04d}/{i % captions}" for i in range(len(values))]
        images = [name.partition("/")[0] for name in ids]
        outcomes = {"acc1": Outcomes(ids, values, images, binary=True)}
        words: dict[str, Any] = {
            "model": {
                "name": name,
                "spec": name,
                "weights_hash": "w" + name,
                "backbone_fingerprint": "b" + name,
                "recipe": "clip",
                "arch": "timm:test_resnet",
                "params": 412_345,
                "pretrain_data": ("shapes:pairs",),
                "images_seen": 960_000,
            }
            | dict(model or {}),
            "task": task,
            "task_version": 1,
            "task_fingerprint": "t",
            "adapter": "linear",
            "config": {"c": 1.0},
            "metric": "acc1",
            "chance": 0.1,
            "estimates": {metric: estimate(each) for metric, each in outcomes.items()},
            "data": {"spec": "hf:x", "split": "test", "n": len(values), "fingerprint": "d"},
            "examples": {"file": "", "sha256": "", "rows": 0},
            "settings": {"precision": "fp32", "device": "cpu"},
            "versions": {},
            "seconds": {},
            "created": "2026-01-01T00:00:00Z",
        } | changes
        result = Result.model_validate(words)
        self.results.append(result)
        self._outcomes[self._key(result)] = outcomes
        return result

    def outcomes_of(self, result: Result) -> dict[str, Outcomes]:
        return self._outcomes[self._key(result)]

    @staticmethod
    def _key(result: Result) -> tuple[str, str, int, str]:
        return (result.model.name, result.task, result.task_version, result.data.fingerprint)


def overlapping(right: int, wrong_among: int, seed: int) -> np.ndarray:
    """N values, ``right`` of them 1, the wrong ones drawn from the last ``wrong_among``: correlated models."""
    values = np.ones(N)
    rng = np.random.default_rng(seed)
    values[N - wrong_among + rng.permutation(wrong_among)[: N - right]] = 0
    return values
