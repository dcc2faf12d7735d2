"""``vlbench eval`` killed: what was finished is on disk, and the next call does only the rest."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from vlbench.store.results import ResultStore

ROOT = Path(__file__).resolve().parent.parent


def test_eval_killed_between_tasks_loses_no_finished_task(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 20)):
        for label, name in enumerate(("dark", "light")):
            for number in range(count):
                path = tmp_path / "images" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 120, (16, 16, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    results = tmp_path / "results"
    words = [
        sys.executable,
        "-m",
        "vlbench",
        "eval",
        "--model",
        "tests.verbs.toy_backbone:build",
        "--results",
        str(results),
    ]
    words += ["--data", f"imagefolder:{tmp_path / 'images'}", "--workers", "0", "--tasks"]

    # Killed as soon as the first result appears: in the second task, or at the latest while its result is written.
    running = subprocess.Popen([*words, "knn,linear"], cwd=ROOT)
    first = results / "toy" / "knn" / "images@v1.json"
    deadline = time.monotonic() + 120
    while not first.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running.poll() is None, "it ended before it could be killed"
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert first.exists()

    kept = ResultStore(results).load("toy", "knn/images")
    assert len(ResultStore(results).rows(kept)) == 40
    again = subprocess.run([*words, "knn,linear"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "reused" in again.stdout or "already" in again.stdout
    assert ResultStore(results).load("toy", "knn/images") == kept
    assert ResultStore(results).load("toy", "linear/images").estimates["acc1"].value > 0.9


def test_eval_killed_while_encoding_does_not_encode_the_written_shards_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(90):
        path = tmp_path / "images" / ("train" if number < 60 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
    words = [sys.executable, "-m", "vlbench", "eval", "--model", "tests.verbs.conv_backbone:build_slow"]
    words += ["--tasks", "knn", "--data", f"imagefolder:{tmp_path / 'images'}", "--batch-size", "4", "--workers", "0"]
    words += ["--results", str(tmp_path / "results")]
    env = {**os.environ, "VLBENCH_CACHE": str(tmp_path / "cache")}

    running = subprocess.Popen(words, cwd=ROOT, env=env)
    deadline = time.monotonic() + 120
    while _rows_written(tmp_path) < 24 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running.poll() is None, "it ended before it could be killed"
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = _rows_written(tmp_path)
    assert 24 <= kept < 60
    assert not (tmp_path / "results" / "towers").exists()

    again = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    found = re.search(r"images: (\d+) encoded.*, (\d+) from the feature store", again.stdout)
    assert found is not None, again.stdout
    assert (int(found[1]), int(found[2])) == (90 - kept, kept)
    assert _rows_written(tmp_path) == 90


def _rows_written(folder: Path) -> int:
    """Features on disk: a shard is there as a whole or not at all."""
    return sum(len(np.load(path)["digests"]) for path in (folder / "cache").rglob("shard-*.npz"))
