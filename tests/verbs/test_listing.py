from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.data.making import png, write_files
from vlbench.core.cards import dataset_cards, task_cards
from vlbench.core.catalog import RECIPES
from vlbench.core.config import flatten
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


def _show(name: str, preset: str | None = None) -> argparse.Namespace:
    return argparse.Namespace(what="recipe", name=name, preset=preset)


@pytest.mark.parametrize("name", ["align", "clip", "muvla", "supervised", "unicl", "virtex"])
def test_show_recipe_gives_every_setting_with_what_it_does_and_its_source(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES.get(name)
    run_show(_show(name))
    out = capsys.readouterr().out
    assert all(len(line) <= 120 for line in out.splitlines())
    words = " ".join(out.split())
    _, first, *others = (" ".join(part.split()) + " " for part in out.split("\npreset "))
    assert first.startswith("paper: ")
    for key in flatten(recipe.presets["paper"].model_dump(mode="json")):
        assert f" {key} = " in first
    for source in recipe.described["paper"].sources.values():
        assert source in first
    for field, info in type(recipe.presets["paper"]).model_fields.items():
        assert field == "variant" or info.description is None or info.description in first, field
    assert [other.split(",")[0] for other in others] == [preset for preset in recipe.presets if preset != "paper"]
    for preset, described in recipe.described.items():
        assert described.about in words, preset


def test_show_recipe_says_where_paper_and_code_differ(capsys: pytest.CaptureFixture[str]) -> None:
    for name, facts in {
        "align": ["virtual_batch_size=16"],
        "unicl": ["directions = 'mean'", "the paper's equation: twice the loss", "mixup and cutmix"],
        "virtex": ["multilabel_regions = 'view'", "as the released code does it, of which the published 86.2", "bleft"],
        "muvla": ["one task a step", "rows = 'released'", "mrfr_target = 'seen'", "region_mean = 'slots'", "weigh_itm"],
    }.items():
        run_show(_show(name))
        words = " ".join(capsys.readouterr().out.split())
        for fact in facts:
            assert fact in words, f"{name}: {fact}"


def test_show_recipe_gives_other_presets_by_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    run_show(_show("align"))
    out = capsys.readouterr().out
    b7 = out.split("preset b7_base, where it differs from paper:\n")[1].split("\npreset ")[0]
    settings = [line.strip() for line in b7.splitlines() if " = " in line]
    assert settings == [
        "visual.arch = 'timm:tf_efficientnet_b7'",
        "text.width = 768",
        "text.layers = 12",
        "embed_dim = 640",
    ]
    assert "source: EfficientNet-B7's width: no further layer [N-ALIGN]" in b7
    # A factor that paper has and tiny has not is told too, under the name it has there.
    run_show(_show("virtex"))
    tiny = capsys.readouterr().out.split("preset tiny,")[1].split("\npreset ")[0]
    assert "optim.lr_factors.^textual\\. = 0.5" in tiny
    assert "optim.lr_factors.^visual\\.: left out" in tiny
    assert "visual.kwargs = {}" in tiny
    assert "visual.kwargs.zero_init_residual" not in tiny


def test_show_recipe_of_one_preset_is_all_of_it_and_of_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    run_show(_show("muvla", "paper_code_bc"))
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("preset ")] == ["preset paper_code_bc:"]
    words = " ".join(out.split())
    for key in flatten(RECIPES.get("muvla").presets["paper_code_bc"].model_dump(mode="json")):
        assert f" {key} = " in words
    assert out.count("source of task_weights") == 1
    assert "source: X152-C4" in words, "what it has of another preset has its source too"
    with pytest.raises(UserError, match="recipe muvla: unknown preset 'papr'; did you mean 'paper'"):
        run_show(_show("muvla", "papr"))
    with pytest.raises(UserError, match="--preset is of recipes; leave it out of vlbench show task linear/clothing"):
        run_show(argparse.Namespace(what="task", name="linear/clothing", preset="paper"))


def test_show_recipe_without_sources_shows_its_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe of another package has presets, and may have neither a paper's nor sources."""
    from vlbench.recipes.clip import Clip

    class Plain(Clip):
        presets: Mapping[str, Any] = {"tiny": RECIPES.get("clip").presets["tiny"]}
        described: Mapping[str, Any] = {}

    monkeypatch.setattr(RECIPES, "get", lambda name: Plain())
    run_show(_show("plain"))
    out = capsys.readouterr().out
    assert "preset tiny:\n  steps = 600\n      optimizer steps\n" in out
    assert "source" not in out.split("preset tiny:")[1]
    assert "--preset NAME" not in out
