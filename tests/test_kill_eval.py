"""``vlbench eval`` killed between two tasks: what was finished is on disk, and the next call does only the rest."""

from __future__ import annotations

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
