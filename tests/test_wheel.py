"""The wheel, alone in an environment, from another directory: what a stranger gets from ``pip install``."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = out.glob("*.whl")
    return built


def test_wheel_carries_the_cards(wheel: Path) -> None:
    inside = zipfile.ZipFile(wheel).namelist()
    for kind in ("tasks", "reference_models"):
        cards = sorted(path.relative_to(ROOT / kind).as_posix() for path in (ROOT / kind).rglob("*") if path.is_file())
        assert cards
        for card in cards:
            assert f"vlbench/_cards/{kind}/{card}" in inside
    assert not [name for name in inside if name.startswith(("tests/", "results/", "benchmarks/"))]


def test_wheel_runs_alone_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    (site,) = (home / "lib").glob("python*/site-packages")
    # Our package comes from the wheel alone; its dependencies, which no network can fetch here, from this environment.
    # A path in a .pth file is not searched for .pth files, so this environment's editable vlbench stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(program: str, *words: str) -> str:
        done = subprocess.run(
            [str(home / "bin" / program), *words],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert str(home) in run("python", "-c", "import vlbench; print(vlbench.__file__)")
    assert "linear/shapes" in run("vlbench", "list", "tasks")
    assert "fingerprint:" in run("vlbench", "show", "task", "zeroshot/shapes")
    assert "unicl" in run("vlbench", "list", "recipes")
