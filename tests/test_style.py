"""Lint, format and types are part of the tests: what they would say later, they say now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "vlbench", "tests", "benchmarks"),
        ("ruff", "format", "--check", "vlbench", "tests", "benchmarks"),
        ("mypy", "--no-error-summary", "--cache-dir", "{cache}"),
    ],
    ids=["lint", "format", "types"],
)
def test_style(command: tuple[str, ...], tmp_path: Path) -> None:
    words = [word.format(cache=tmp_path) for word in command]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
