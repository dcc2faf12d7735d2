"""``benchmarks/blocked_loss.py``: what it says where both ways fit, where one does not, and where they differ."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "blocked_loss.py"
SMALL = ("--batch", "2048", "--dim", "16", "--block", "64")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("blocked_loss", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_ways_are_measured_and_their_gradients_compared(
    script: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    large = torch.ones(512 << 20, dtype=torch.uint8)  # the size of the process that starts both is not theirs
    assert script.main([*SMALL, "--loss", "align"]) == 0
    del large
    out, err = capfd.readouterr()
    blocked, plain = (out.index(f"  {way}: peak ") for way in ("blocked (64 rows a block)", "plain (whole matrix)"))
    assert blocked < plain
    ratio = float(re.search(r"blocked / plain: memory ([\d.]+), time [\d.]+\n", out).group(1))  # type: ignore[union-attr]
    assert ratio < 0.5
    found = re.search(r"value (\S+), images (\S+), texts (\S+), logit scale (\S+)\n", out)
    assert found is not None
    assert all(float(number) <= 1e-5 for number in found.groups())
    assert max(map(float, found.groups())) > 0, "two ways round differently"
    assert err == ""


def test_a_whole_matrix_that_does_not_fit_leaves_the_blocked_loss_measured(
    script: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    """2,048 x 2,048 logits are 16 MiB; 4 are refused by the system, as where memory ends."""
    assert script.main([*SMALL, "--max-plain-gib", str(4 / 1024)]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert re.fullmatch(
        r"  blocked \(64 rows a block\): peak \d+ MiB, [\d.]+ s of processor time, [\d.]+ us a pair", lines[1]
    )
    assert lines[2].startswith("  plain (whole matrix): does not fit: can't allocate memory: you tried to allocate ")
    assert "not compared" in lines[3]
    assert len(lines) == 4
    assert err == ""


def test_another_failure_is_no_matter_of_memory(script: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert script.main([*SMALL, "--device", "abacus"]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("blocked: failed with 1: RuntimeError: ")
    assert out.count("\n") == 1
    assert err == ""


GRADIENTS = {"value": torch.tensor(2.0), "images": torch.tensor([[3.0, -4.0], [1e-9, 2.0]])}


def run_with(script: ModuleType, monkeypatch: pytest.MonkeyPatch, images: torch.Tensor, failing: Any = None) -> int:
    """The benchmark where the blocked loss gives ``images`` as its gradients."""

    def in_process(way: str, given: Any, folder: Path) -> dict[str, Any]:
        if failing is not None and way == "plain":
            raise failing
        torch.save(GRADIENTS | ({"images": images} if way == "blocked" else {}), folder / way)
        return {"peak": 1 if way == "blocked" else 4, "seconds": 1.0, "device": "none"}

    monkeypatch.setattr(script, "in_process", in_process)
    return script.main(SMALL)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ([[0.0, 2e-5], [0.0, 0.0]], 0),  # half of 1e-5 of the largest
        ([[0.0, 0.0], [1e-6, 0.0]], 0),  # much of a small entry, nothing of the whole
        ([[0.0, 0.0], [0.0, 1e-3]], 1),
        ([[7.0, 0.0], [0.0, 0.0]], 1),
        ([[-6.0, 8.0], [0.0, -4.0]], 1),  # every sign turned: the norm is the same
        ([[float("nan"), 0.0], [0.0, 0.0]], 1),
    ],
)
def test_gradients_themselves_decide(
    change: list[list[float]],
    status: int,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_with(script, monkeypatch, GRADIENTS["images"] + torch.tensor(change)) == status
    assert ("they are not the same" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("killed", [True, False])
def test_a_whole_matrix_that_is_killed_does_not_fit_and_one_that_fails_is_said_to(
    killed: bool, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = script.DoesNotFit("its process was killed") if killed else RuntimeError("failed with 1: x")
    assert run_with(script, monkeypatch, GRADIENTS["images"], failing) == (0 if killed else 1)
    out = capsys.readouterr().out
    assert ("does not fit: its process was killed" in out) == killed
    assert "blocked (64 rows a block): peak 0 MiB" in out
