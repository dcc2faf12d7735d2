"""A worker dies; torchrun starts all of them again, and with ``--resume`` the run is the one that nobody disturbed."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train.conftest import in_process, on_ranks
from vlbench.core.errors import UserError
from vlbench.models.weights import read_checkpoint
from vlbench.verbs import pretrain

DEADLINE = 240


def words(folder: Path, out: Path) -> list[str]:
    settings = {
        "batch_size": 8,
        "visual.image_size": 32,
        "visual.kwargs": "{drop_path_rate: 0.1}",
        "workers": 1,
        "log_every": 2,
        "order": "shards",
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    call = ["pretrain", "supervised", "--data", f"imagefolder:{folder}", "--device", "cpu", "--out", str(out)]
    return [*call, "--steps", "30", "--checkpoint-every", "2", "--resume", *sets]


def in_session(call: list[str]) -> None:
    from vlbench.cli import main

    assert main(call) == 0


def ranks_of(torchrun: subprocess.Popen[str]) -> dict[int, int]:
    """Rank → process id of torchrun's workers."""
    found = {}
    for children in Path(f"/proc/{torchrun.pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): child for word in environment if word.startswith(b"RANK=")}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_run_that_lost_a_worker_ends_as_the_undisturbed_run(victim: int, folder: Path, tmp_path: Path) -> None:
    on_ranks(in_session, words(folder, tmp_path / "whole"))
    out = tmp_path / "killed"
    call = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    with (tmp_path / "output.txt").open("w+") as output:
        call += ["-m", "vlbench", *words(folder, out)]
        torchrun = subprocess.Popen(call, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            deadline = time.monotonic() + DEADLINE
            while not (out / "ckpt.pt").exists():
                assert torchrun.poll() is None, (tmp_path / "output.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(ranks_of(torchrun)[victim], signal.SIGKILL)
            status = torchrun.wait(DEADLINE)
        finally:
            torchrun.terminate()  # which ends its workers; it has ended where all went well
    said = (tmp_path / "output.txt").read_text()
    assert status == 0, said
    assert "exitcode: -9" in said
    assert "resuming from step" in said
    whole, killed = (read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "killed"))
    assert killed["step"] == 30
    assert all(torch.equal(whole["model"][name], killed["model"][name]) for name in whole["model"])


def hold(folder: Path, seconds: float) -> None:
    with (folder / pretrain.LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / "held").touch()
        time.sleep(seconds)


def test_restarted_run_waits_for_what_the_dead_one_left_and_another_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(out=str(tmp_path), resume=True)
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        holder = in_process(hold, tmp_path, 1.0)
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        if count == "0":
            with pytest.raises(UserError, match="in use by another"), pretrain._held(args, 0):
                pass
        else:
            with pretrain._held(args, 0) as found:
                assert found == tmp_path
                holder.join(0.5)
                assert not holder.is_alive()
        holder.join()
        (tmp_path / "held").unlink()
