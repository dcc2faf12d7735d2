from __future__ import annotations

import re
import sys

import pytest

from vlbench.core.errors import UserError
from vlbench.verbs import machine, progress
from vlbench.verbs.progress import EncodingProgress


def test_versions_name_what_computes_features() -> None:
    found = machine.versions()
    assert {"vlbench", "python", "torch", "timm", "numpy"} <= set(found)
    assert all(re.match(r"\d", version) for version in found.values())


def test_commit_is_of_this_checkout_or_none() -> None:
    found = machine.commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found)


def test_commit_of_an_installed_wheel_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A repository that merely holds the environment is not ours."""
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site-packages" / "vlbench" / "verbs" / "machine.py"))
    assert machine.commit() is None


def test_device() -> None:
    assert machine.choose_device("cpu") == "cpu"
    assert machine.choose_device(None) in ("cpu", "cuda")
    with pytest.raises(UserError, match="--device gpu"):
        machine.choose_device("gpu")
    assert machine.peak_memory_mib("cpu") > 10
    assert machine.describe("cpu")["device"] == "cpu"


def test_workers_are_divided_among_the_processes_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(12))
    assert [machine.choose_workers(None, sharing=count) for count in (1, 2, 4, 64)] == [8, 6, 3, 1]
    assert machine.choose_workers(0, sharing=4) == 0, "what was asked for is what is taken"


def test_progress_writes_plain_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    show = EncodingProgress()
    for done in (10, 40, 110, 120, 300):
        show(done, 300)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  encoding 110 of 300 images, 10/s, 19 s left",
        "  encoding 300 of 300 images, 10/s, 0 s left",
    ]
