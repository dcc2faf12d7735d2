from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.data.making import png, write_files
from vlbench.core.cards import dataset_cards
from vlbench.verbs.doctor import run


def test_doctor_says_in_one_line_how_many_data_sets_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    write_files(tmp_path, {"clothing/test/hat/1.png": png()})
    run(argparse.Namespace(data_root=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    made = [card for card in dataset_cards().values() if card.data[0].startswith("shapes")]
    wanted = f"{len(made) + 1} of {len(dataset_cards())} data sets present under {tmp_path} (vlbench list datasets)"
    assert [line for line in lines if "data sets" in line] == [f"  ok  {wanted}"]
    assert len(lines) < 60
    for package in ("transformers", "sentencepiece", "protobuf"):
        assert any(f"  {package} " in line for line in lines)
