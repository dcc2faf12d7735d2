"""A little image folder, a small model with dropout, and two ways to run things in other processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLASSES = ("blue", "green", "grey", "red")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 12 noisy one-colour images."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for index, name in enumerate(CLASSES):
        colour = np.array([(20, 30, 220), (30, 200, 40), (128, 128, 128), (220, 30, 30)][index])
        (root / name).mkdir()
        for number in range(12):
            pixels = np.clip(colour + rng.normal(0, 30, size=(24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def settings(folder: Path) -> Callable[..., Any]:
    """Settings of a small supervised run with every source of randomness: dropout, stochastic depth, augmentation."""
    from vlbench.core.config import override
    from vlbench.data.transforms import Augment
    from vlbench.models.vision import VisualConfig
    from vlbench.recipes.supervised import SupervisedConfig
    from vlbench.train.config import OptimConfig

    base = SupervisedConfig(
        data=(f"imagefolder:{folder}",),
        steps=12,
        batch_size=8,
        optim=OptimConfig(lr=1e-3, clip_norm=1.0),
        visual=VisualConfig(arch="timm:test_vit", image_size=32, kwargs={"proj_drop_rate": 0.1, "drop_path_rate": 0.1}),
        augment=Augment(flip=True, color_jitter=(0.2, 0.2, 0.2, 0.05)),
        checkpoint_every=4,
        log_every=2,
        workers=0,
    )
    return lambda *assignments: override(base, assignments) if assignments else base


def in_process(function: Callable[..., None], *args: Any, env: dict[str, str] | None = None) -> Any:
    """Start ``function`` in a forked process (no second import of torch) and return the process."""

    def body() -> None:
        os.environ.update(env or {})
        function(*args)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def ranks_of(function: Callable[..., None], *args: Any, world: int = 2) -> list[Any]:
    """Start ``function`` as torchrun would, in ``world`` processes, and return them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return [
        in_process(function, *args, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)
    ]


def on_ranks(function: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Run ``function`` as torchrun would, in ``world`` processes."""
    processes = ranks_of(function, *args, world=world)
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * world


def stopped_and_resumed(config: Any, out: Path, *, stop: int, recipe: Any = None) -> dict[str, Any]:
    """Run ``config`` once whole and once stopped after ``stop`` steps and resumed; the same weights, to the bit.

    The recipe is ``supervised`` where none is given.
    """
    import torch

    from tests.train.stopping import Stop, StopAt
    from vlbench.models.weights import read_checkpoint
    from vlbench.recipes.supervised import RECIPE
    from vlbench.train.loop import fit

    recipe = recipe or RECIPE
    whole = read_checkpoint(fit(recipe, config, out=out / "whole"))["model"]
    with pytest.raises(Stop):
        fit(recipe, config, out=out / "stopped", watcher=StopAt(stop))
    saved = read_checkpoint(out / "stopped" / "ckpt.pt")["step"]
    assert 0 < saved <= stop
    torch.manual_seed(99)  # whatever the process did in between
    resumed = read_checkpoint(fit(recipe, config, out=out / "stopped", resume=True))["model"]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    return whole
