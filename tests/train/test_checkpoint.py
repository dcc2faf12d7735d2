from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.train.conftest import in_process
from vlbench.core.errors import UserError
from vlbench.models.weights import read_checkpoint
from vlbench.train import checkpoint
from vlbench.train.config import PretrainConfig

PLAIN = {"recipe": "r", "config": {}, "classes": [], "card": {}, "step": 1, "samples_seen": 2}


def test_save_is_read_back_without_pickle(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "ckpt.pt", model={"w": torch.arange(3.0)}, **PLAIN)
    assert torch.equal(read_checkpoint(tmp_path / "ckpt.pt")["model"]["w"], torch.arange(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_process_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path, big = tmp_path / "ckpt.pt", torch.zeros(4_000_000)
    checkpoint.save(path, model={"w": big}, **PLAIN)

    def write_for_ever() -> None:
        for step in range(2, 10_000):
            checkpoint.save(path, model={"w": big + step}, **{**PLAIN, "step": step})

    process = in_process(write_for_ever)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".ckpt.pt.*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found = read_checkpoint(path)
    assert torch.equal(found["model"]["w"], big + found["step"] if found["step"] > 1 else big)


def test_half_a_checkpoint_of_a_killed_process_is_removed_by_the_resume(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "ckpt.pt", model={}, **PLAIN)
    (tmp_path / ".ckpt.pt.k3j2h1.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="not of other"):
        checkpoint.load(tmp_path, recipe="other", config=PretrainConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_log_drops_what_comes_after_the_checkpoint_and_half_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 0.5}\n{"step": 6, "lo')
    log = checkpoint.Log(path, step=2)
    log.write({"step": 4, "loss": 0.75})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 0.75},
    ]


def test_settings_that_are_damaged_are_named(tmp_path: Path) -> None:
    assert checkpoint.read_settings(tmp_path) is None
    checkpoint.write_settings(tmp_path, recipe="clip", preset="tiny", config=PretrainConfig())
    assert checkpoint.read_settings(tmp_path)["config"]["steps"] == 500  # type: ignore[index]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        checkpoint.read_settings(tmp_path)


def test_a_setting_that_came_later_is_no_change(tmp_path: Path) -> None:
    config = PretrainConfig(steps=7)
    older = {key: value for key, value in config.model_dump(mode="json").items() if key != "grad_cache"}
    checkpoint.save(tmp_path / "ckpt.pt", model={}, **{**PLAIN, "config": older})
    assert checkpoint.load(tmp_path, recipe="r", config=config) is not None
    changed = config.model_copy(update={"grad_cache": True, "accumulate": 2})
    with pytest.raises(UserError, match="grad_cache: false, now true"):
        checkpoint.load(tmp_path, recipe="r", config=changed)
    gone = {**PLAIN, "config": {**older, "no_longer": 1}}
    checkpoint.save(tmp_path / "ckpt.pt", model={}, **gone)
    with pytest.raises(UserError, match="no_longer: 1, now null"):
        checkpoint.load(tmp_path, recipe="r", config=config)
