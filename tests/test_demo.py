"""``vlbench demo`` from nothing, and again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_demo_runs_the_whole_loop_and_then_reuses_it(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vlbench", "demo", "--steps", "20"]
    first = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    board = (tmp_path / "demo" / "results" / "LEADERBOARD.md").read_bytes()
    for name in ("supervised", "clip", "unicl", "random"):
        assert f"| {name} ".encode() in board
    second = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (tmp_path / "demo" / "results" / "LEADERBOARD.md").read_bytes() == board
    assert "step 20/20" in first.stdout + first.stderr
    assert "step 20/20" not in second.stdout + second.stderr
    assert second.stdout.count("this run is finished") + second.stderr.count("this run is finished") == 3
