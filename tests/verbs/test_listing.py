from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.making import png, write_files
from vlbench.core.cards import dataset_cards, task_cards
from vlbench.core.errors import UserError
from vlbench.verbs.listing import run_list, run_show


def _list(what: str, root: Path) -> argparse.Namespace:
    return argparse.Namespace(what=what, data_root=str(root))


def test_list_tasks_says_which_data_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path, {"clothing/test/hat/1.png": png()})
    assert run_list(_list("tasks", tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(task_cards())
    by_name = {line.split()[0]: line for line in lines}
    assert "ready" in by_name["linear/clothing"]
    assert "ready" in by_name["svm/shapes"]
    assert "no data" in by_name["zeroshot/imagenet1k"]


def test_list_datasets_says_sizes_and_where_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path, {"clothing/test/hat/1.png": png()})
    assert run_list(_list("datasets", tmp_path)) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == dataset_cards().keys()
    assert f"imagefolder:{tmp_path}/clothing" in lines["clothing"]
    assert "20 classes" in lines["voc2007"]
    assert "train 2,501 / val 2,510 / test 4,952" in lines["voc2007"]


def test_show_dataset_gives_prompts_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    run_show(argparse.Namespace(what="dataset", name="imagenet_a"))
    out = capsys.readouterr().out
    assert "# 80 templates in prompts/imagenet80.txt" in out
    assert "n01440764 = tench" in out
    assert "# 3 tasks: knn/imagenet_a, linear/imagenet_a, zeroshot/imagenet_a" in out
    with pytest.raises(UserError, match="unknown dataset 'objectne'; did you mean 'objectnet'"):
        run_show(argparse.Namespace(what="dataset", name="objectne"))


def test_listing_data_sets_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, argparse; from vlbench.verbs.listing import run_list; "
        f"[run_list(argparse.Namespace(what=w, data_root={str(tmp_path)!r})) for w in ('tasks', 'datasets')]; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)
