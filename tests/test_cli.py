"""The command line as a person meets it: quick answers, near misses named, exit status by kind of trouble."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from vlbench.cli import build_parser, main


def run(*words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "vlbench", *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["list", "tasks"]], ids=["help", "list"])
def test_cli_answers_at_once_and_loads_no_torch(words: list[str]) -> None:
    code = (
        f"import sys; from vlbench.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    seconds = []
    for _ in range(5):  # the best of five: other tests share the cores
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
        assert done.stderr.strip() == "False"
    assert min(seconds) < 0.5


def test_blas_beside_torch_keeps_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second pool that spins beside torch's made a probe's fit seven times slower."""
    code = (
        "import vlbench.cli as cli, sys\nsys.argv = ['vlbench', '--version']\n"
        "try: cli.program()\nexcept SystemExit: pass\n"
        "import numpy, scipy.linalg, threadpoolctl\n"
        "print(*(pool['num_threads'] for pool in threadpoolctl.threadpool_info() if pool['user_api'] == 'blas'))"
    )
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout]
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    said += [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout]
    pools = [line.splitlines()[-1].split() for line in said]
    assert set(pools[0]) == {"1"}
    assert set(pools[1]) == {str(min(2, os.cpu_count() or 1))}


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["evl"], "'eval'"),
        (["pretrain", "unicll"], "'unicl'"),
        (["pretrain", "clip", "--chekpoint-every", "3"], "--checkpoint-every"),
        (["pretrain", "clip", "--preset", "tinny"], "'tiny'"),
        (["pretrain", "clip", "--set", "optim.rl=1"], "'lr'"),
        (["list", "task"], "'tasks'"),
        (["show", "task", "liner/shapes"], "'linear/shapes'"),
        (["show", "recipe", "unicle"], "'unicl'"),
        (["data", "check", "imagefoldr:x"], "'imagefolder'"),
        (["data", "mke", "shapes", "d"], "'make'"),
        (["verfy"], "'verify'"),
        (["verify", "clip-vit-b32-openai"], "'clip-vit-b-32-openai'"),
        (["explain", "a", "b", "--taks", "x"], "--task"),
        (["leaderboard", "--htm", "x.html"], "--html"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_cli_names_the_nearest_word(words: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "did you mean" in message
    assert meant in message
    assert len(message.strip().splitlines()) == 1


def test_cli_without_a_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "vlbench pretrain unicl" in capsys.readouterr().out


def test_cli_version() -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert out.startswith("vlbench 0.")


def test_cli_internal_error_is_called_a_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import vlbench.verbs.doctor

    def broken(_: object) -> int:
        raise RuntimeError("boom")

    monkeypatch.setattr(vlbench.verbs.doctor, "run", broken)
    assert main(["doctor"]) == 1
    assert "boom" in capsys.readouterr().err


def test_every_verb_resolves() -> None:
    import importlib

    _, by_name = build_parser()
    for name, parser in by_name.items():
        module, _, function = parser.get_default("run").partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name
