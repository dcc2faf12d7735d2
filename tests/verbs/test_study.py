"""``vlbench study``: read with care, trained once, one table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from vlbench.core.errors import UserError
from vlbench.store.results import ResultStore
from vlbench.verbs.study import Study, _budgets, model_name, read_study, run

ROOT = Path(__file__).resolve().parents[2]
MINIMAL: dict[str, Any] = {"title": "t", "arms": [{"recipe": "clip"}, {"recipe": "unicl"}], "tasks": "knn"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(**changes: Any) -> Path:
    path = Path("recipes.yaml")
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return path


def arguments(path: Path) -> argparse.Namespace:
    return argparse.Namespace(file=str(path), out="out", results="results", table_only=False, check=False)


def test_study_that_is_not_there_names_the_nearest_file() -> None:
    written()
    with pytest.raises(UserError, match=r"there is no file recipe\.yaml; did you mean recipes\.yaml\?"):
        read_study(Path("recipe.yaml"))
    with pytest.raises(UserError, match=r"there is no file no/where\.yaml$"):
        read_study(Path("no/where.yaml"))


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"seed": [0]}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"arms": []}, "arms"),
        ({"random": ["clp"]}, "random: unknown arm 'clp'; did you mean 'clip'?"),
        (
            {"random": ["clip"], "arms": [{"recipe": "clip"}, {"recipe": "unicl", "name": "random-clip"}]},
            "as the random-",
        ),
        ({"arms": [{"recipe": "clip"}, {"recipe": "clip"}]}, "arm 2 is called 'clip', as arm 1 is; give it a `name`"),
        ({"arms": [{"recipe": "clip", "name": "a/b"}, {"recipe": "unicl", "name": "a b"}]}, "arm 2 is called 'a b'"),
        ({"arms": [{"recipe": "clip", "name": "random"}]}, "as the random-weight rows is"),
        ({"seeds": [0, 1, 0]}, "seeds: expected at least one, and none twice"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"models": {"random": "timm:a"}}, "models: 'random' is called as the random-weight rows is"),
        ({"models": {"clip": "timm:a"}}, "arm 1 is called 'clip', as model 'clip' is"),
        ({"backbones": ["timm:a", "timm:a"]}, "backbones: expected at least one, and none twice"),
    ],
)
def test_study_with_a_mistake_is_refused_when_read(changes: dict[str, Any], answer: str) -> None:
    with pytest.raises(UserError) as error:
        read_study(written(**changes))
    assert str(error.value).startswith("recipes.yaml: ")
    assert answer in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"arms": [{"recipe": "clip"}, {"recipe": "unicle"}]}, "arm unicle: unknown recipe 'unicle'; did you mean"),
        ({"preset": "tinny"}, "arm clip: recipe clip: unknown preset 'tinny'; did you mean 'tiny'"),
        ({"arms": [{"recipe": "clip"}, {"recipe": "unicl", "set": ["optim.rl=1"]}]}, "unknown setting 'rl'"),
        ({"arms": [{"recipe": "unicl", "variant": "sup"}]}, "arm unicl-sup: recipe unicl: unknown variant 'sup'; did"),
        ({"arms": [{"recipe": "clip", "variant": "x"}]}, "arm clip-x: recipe clip has no variants"),
        ({"tasks": "knn/shape"}, "unknown task 'knn/shape'; did you mean 'knn/shapes'?"),
    ],
)
def test_study_checks_every_arm_before_it_trains_one(changes: dict[str, Any], answer: str) -> None:
    with pytest.raises(UserError) as error:
        run(arguments(written(**changes)))
    assert answer in str(error.value)
    assert [path.name for path in Path().iterdir()] == ["recipes.yaml"]


def test_model_names_have_the_backbone_where_there_are_several() -> None:
    one = Study.model_validate({**MINIMAL, "backbones": ["timm:resnet18"]})
    two = Study.model_validate({**MINIMAL, "backbones": ["timm:resnet18", "timm:resnet50"]})
    assert model_name(one, "clip", "timm:resnet18", 3) == "clip-s3"
    assert model_name(two, "clip", "timm:resnet18", 3) == "clip-timm-resnet18-s3"
    assert model_name(one, "clip", None, 0) == "clip-s0"


def test_arms_are_called_after_recipe_and_variant() -> None:
    arms = [{"recipe": "unicl"}, {"recipe": "unicl", "variant": "supcon"}]
    study = Study.model_validate({**MINIMAL, "arms": arms})
    assert [arm.label for arm in study.arms] == ["unicl", "unicl-supcon"]
    assert study.settings(study.arms[1], None, 0)["variant"] == "supcon"


def test_random_rows_are_of_the_last_arm_or_of_those_named() -> None:
    assert Study.model_validate(MINIMAL).random_rows == {"random": "unicl"}
    assert Study.model_validate({**MINIMAL, "random": False}).random_rows == {}
    named = Study.model_validate({**MINIMAL, "random": ["clip", "unicl"]})
    assert named.random_rows == {"random-clip": "clip", "random-unicl": "unicl"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_can_be_run_and_share_a_budget(path: Path) -> None:
    study = read_study(path)
    cells = [(backbone, 0, arm) for backbone in study.backbones or (None,) for arm in study.arms]
    (note,) = _budgets(study, cells, str(path))
    images = {"photographs": "256,000", "recipes_resnet18": "25,600"}.get(path.stem, "38,400")
    tower = {"recipes_resnet18": "resnet18"}.get(path.stem, "test_resnet")
    assert note.startswith(f"Every arm saw {images} images through timm:{tower} at 64 px"), note


def test_study_trains_measures_and_reuses(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 120)):
        (Path("data") / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(low, low + 120, (24, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(Path("data") / name / f"{number}.png")
    settings = ["steps=2", "batch_size=8", "visual.image_size=32", "workers=0"]
    changes: dict[str, Any] = {
        "arms": [
            {"recipe": "supervised", "data": ["imagefolder:data"]},
            {"recipe": "clip", "data": ["imagefolder:data"]},
        ],
        "eval_data": "imagefolder:data",
        "seeds": [0],
        "set": settings,
        "models": {"mean colour": "tests.verbs.toy_backbone:build"},
        "notes": ["The night images have no captions."],
    }
    assert run(arguments(written(**changes))) == 0
    first = capsys.readouterr().out
    assert "[study] 2/2 clip-s0" in first
    table = Path("results/studies/recipes.md").read_text()
    assert table in first
    assert "knn/data: acc1" in table
    assert [line.split("|")[1].strip() for line in table.split("\n") if line.startswith("| ")] == [
        *("Arm", "supervised", "clip", "random", "mean colour", "*chance*")
    ]
    assert "The night images have no captions.\n\nEvery arm saw 16 images through timm:test_resnet at 32 px." in table
    board = Path("results/LEADERBOARD.md").read_text()
    for name in ("supervised-s0", "clip-s0", "random-s0", "mean colour"):
        assert name in board
    made = {path: path.stat().st_mtime_ns for path in [*Path("out").rglob("ckpt.pt"), *Path("results").rglob("*.json")]}
    assert sorted(path.parent.name for path in made if path.name == "ckpt.pt") == ["clip-s0", "supervised-s0"]

    assert run(arguments(written(**changes))) == 0
    assert capsys.readouterr().err.count("this run is finished (2 steps)") == 2
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    assert Path("results/LEADERBOARD.md").read_text() == board

    # Of what is stored alone, and of the study's own tasks.
    Path("data").rename("away")
    again = arguments(written(**changes))
    again.check = True
    assert run(again) == 0
    stored = ResultStore("results")
    (knn, *_) = [result for result in stored.all() if result.model.name == "clip-s0"]
    rows = stored.rows(knn)
    stored.save(knn.model_copy(update={"task": "knn/others", "task_fingerprint": "0" * 16}), rows)
    assert run(again) == 0, "a task that the study does not have is no column of it"
    Path("results/studies/recipes.md").write_text(table + "\n")
    assert run(again) == 1
    again.check, again.table_only = False, True
    assert run(again) == 0
    assert Path("results/studies/recipes.md").read_text() == table
    Path("away").rename("data")

    with pytest.raises(UserError, match=r"steps: 2, now 3\)"):
        run(arguments(written(**{**changes, "set": ["steps=3", *settings[1:]]})))


def test_what_an_arm_has_not_the_parts_for_is_skipped_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    """Named in full, and the only task: still no failure, and a dash in the table."""
    for name in ("dark", "light"):
        (Path("data") / name).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(np.full((24, 24, 3), 100 * (name == "light") + number, np.uint8)).save(
                Path("data") / name / f"{number}.png"
            )
    arm = {"data": ["imagefolder:data"]}
    study = written(
        arms=[{"recipe": "unicl", "variant": "cross_entropy", **arm}, {"recipe": "clip", **arm}],
        tasks="zeroshot/shapes",
        seeds=[0],
        random=False,
        set=["steps=1", "batch_size=4", "visual.image_size=32", "workers=0", "max_bad=1"],
    )
    assert run(arguments(study)) == 0
    said = capsys.readouterr().out
    assert "skipped zeroshot/shapes: unicl-cross_entropy-s0 has no text tower" in said
    table = Path("results/studies/recipes.md").read_text()
    rows = [line.split("|")[1:3] for line in table.split("\n") if line.startswith("| ")]
    cells = {name.strip(): cell.strip() for name, cell in rows}
    assert cells["unicl-cross_entropy"] == "–"
    assert "[" in cells["clip"]
