from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.verbs import toy_backbone
from vlbench.cli import main
from vlbench.core.errors import UserError
from vlbench.core.types import Result
from vlbench.store.results import ResultStore
from vlbench.verbs.calls import evaluate

MODEL = "tests.verbs.toy_backbone"


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A folder of 3 classes x 3 splits of noisy colours: easy, but not without mistakes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 10), ("test", 30)):
        for name, rgb in toy_backbone.COLOURS.items():
            folder = tmp_path / "colours" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = np.clip(60 * np.array(rgb) + 90 + rng.normal(0, 25, 3), 0, 255)
                Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "colours"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))


def _run(tmp_path: Path, data: Path | None, **changes) -> int:
    settings = {
        "model": f"{MODEL}:build",
        "tasks": "zeroshot,linear,knn",
        "data": None if data is None else f"imagefolder:{data}",
        "results": str(tmp_path / "results"),
        "device": "cpu",
        "workers": 0,
        **changes,
    }
    return evaluate(**settings)


def _stored(tmp_path: Path) -> dict[str, Result]:
    return {result.task: result for result in ResultStore(tmp_path / "results").all()}


def test_three_tasks_on_a_folder(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, colours) == 0
    found = _stored(tmp_path)
    assert set(found) == {"zeroshot/colours", "linear/colours", "knn/colours"}
    for result in found.values():
        assert 0.6 < result.estimates["acc1"].value < 1
        assert result.estimates["acc1"].n == 90
        assert result.chance == pytest.approx(1 / 3)
        assert result.model.name == "toy"
        assert result.examples.rows == 90
        assert result.versions["torch"]
        assert result.peak_memory_mib > 0
        assert result.settings["precision"] == "fp32"
    assert found["linear/colours"].chosen["C"] > 0
    # 90 test images for zero-shot, then 90 train and val ones for the probe, then nothing new for kNN.
    assert found["zeroshot/colours"].images_per_second > 0
    assert found["knn/colours"].images_per_second is None
    out = capsys.readouterr().out
    assert "images: 180 encoded" in out
    assert "linear/colours" in out
    assert str(tmp_path / "results" / "toy" / "linear" / "colours@v1.json") in out


def test_second_call_reuses_results_and_force_reuses_features(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, colours)
    first = _stored(tmp_path)
    capsys.readouterr()
    assert _run(tmp_path, colours) == 0
    out = capsys.readouterr().out
    assert out.count("reused, measured") == 3
    assert _stored(tmp_path) == first
    assert _run(tmp_path, colours, force=True) == 0
    out = capsys.readouterr().out
    assert "images: 0 encoded" in out
    assert "reused, measured" not in out
    assert {name: r.estimates for name, r in _stored(tmp_path).items()} == {n: r.estimates for n, r in first.items()}


def test_precision_spread_says_what_bf16_changes(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "tests.verbs.conv_backbone:build"
    assert _run(tmp_path, colours, model=model, tasks="linear,knn") == 0
    plain = _stored(tmp_path)
    capsys.readouterr()
    assert _run(tmp_path, colours, model=model, tasks="linear,knn", precision_spread=True) == 0
    out = capsys.readouterr().out
    assert out.count("does not say what bf16 changes: measured again") == 2
    assert out.count("  bf16: acc1 ") == 2
    found = _stored(tmp_path)
    _run(tmp_path, colours, model=model, tasks="linear,knn", precision="bf16", results=str(tmp_path / "bf16"))
    in_bf16 = {result.task: result for result in ResultStore(tmp_path / "bf16").all()}
    for task, result in found.items():
        assert result.settings["precision"] == "fp32"
        assert result.estimates == plain[task].estimates, "the result is the fp32 one"
        said = result.settings["bf16_difference"]
        assert said["metric"] == "acc1"
        expected = in_bf16[task].estimates["acc1"].value - result.estimates["acc1"].value
        assert said["difference"] == pytest.approx(expected, abs=1e-12)
        before = ResultStore(tmp_path / "results").rows(result)["pred"]
        after = ResultStore(tmp_path / "bf16").rows(in_bf16[task])["pred"]
        assert said["predictions_changed"] == pytest.approx(np.mean(np.asarray(before) != np.asarray(after)))
    capsys.readouterr()
    assert _run(tmp_path, colours, model=model, tasks="linear,knn", precision_spread=True) == 0
    assert capsys.readouterr().out.count("reused, measured") == 2


def test_a_failure_in_bf16_is_a_note_and_the_fp32_result_stays(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(result, rows, job, encoder):
        assert _stored(tmp_path)["knn/colours"] == result, "stored before bf16 is tried"
        raise RuntimeError("no kernel for bfloat16")

    with monkeypatch.context() as patch:
        patch.setattr("vlbench.verbs.evaluate.bf16_difference", fail)
        assert _run(tmp_path, colours, tasks="knn", precision_spread=True) == 0
    out = capsys.readouterr().out
    assert out.count("  note: what bf16 changes is not known, the fp32 result is stored: RuntimeError: no kernel") == 1
    found = _stored(tmp_path)["knn/colours"]
    assert "bf16_difference" not in found.settings
    assert _run(tmp_path, colours, tasks="knn", precision_spread=True) == 0
    assert _stored(tmp_path)["knn/colours"].estimates == found.estimates
    assert "bf16_difference" in _stored(tmp_path)["knn/colours"].settings, "asked again, tried again"


def test_precision_spread_beside_bf16_is_refused(tmp_path: Path, colours: Path) -> None:
    with pytest.raises(UserError, match="leave --precision out"):
        _run(tmp_path, colours, precision="bf16", precision_spread=True)


def test_a_split_of_another_than_its_published_size_is_noted(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlbench.core.cards import TaskCard

    monkeypatch.setattr(TaskCard, "expected_sizes", {"train": 60, "test": 10_000})
    for _ in range(2):  # measured, then reused
        assert _run(tmp_path, colours, tasks="knn") == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "expected" in line]
        assert lines == ["  note: 10,000 test images expected, 90 found"]
    store = ResultStore(tmp_path / "results")
    assert "10,000 test images expected, 90 found" in store.rows(store.load("toy", "knn/colours")).meta["notes"]


@pytest.mark.parametrize("change", ["weights", "precision"])
def test_a_stored_result_about_something_else_is_not_reused(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    _run(tmp_path, colours, tasks="knn")
    capsys.readouterr()
    changes = {}
    if change == "weights":
        changes["model"] = f"{MODEL}:build_other"
    else:
        changes["precision"] = "bf16"
    assert _run(tmp_path, colours, tasks="knn", **changes) == 0
    assert f"about other {change}" in capsys.readouterr().out


def test_a_result_of_another_features_version_is_not_reused(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlbench.adapters.encoder.FEATURES_VERSION", 1)
    _run(tmp_path, colours, tasks="knn")
    store = ResultStore(tmp_path / "results")
    result = store.load("toy", "knn/colours")
    assert result.settings["features_version"] == 1
    settings = {name: value for name, value in result.settings.items() if name != "features_version"}
    store.save(result.model_copy(update={"settings": settings}), store.rows(result))
    capsys.readouterr()
    assert _run(tmp_path, colours, tasks="knn") == 0
    assert "reused, measured" in capsys.readouterr().out, "no version was recorded while the first was the only one"
    monkeypatch.setattr("vlbench.adapters.encoder.FEATURES_VERSION", 2)
    assert _run(tmp_path, colours, tasks="knn") == 0
    assert "about other features (another vlbench made them): measured again" in capsys.readouterr().out
    assert _stored(tmp_path)["knn/colours"].settings["features_version"] == 2


def test_prompts_are_part_of_the_data_of_a_probe_that_reads_them(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlbench.core.cards import Prompts
    from vlbench.verbs import selection

    own_card = selection.own_card
    small = {"lr_count": 1, "wd_count": 1, "epochs": 1, "search_epochs": 1}

    def fingerprint_of(head: str, templates: str | None) -> str:
        def card(kind: str, spec: str):
            changes = {"protocol": {"head": head, **small}, "prompts": Prompts(templates=templates)}
            return own_card(kind, spec).model_copy(update=changes)

        monkeypatch.setattr(selection, "own_card", card)
        results = tmp_path / f"{head}-{templates}"
        assert _run(tmp_path, colours, tasks="elevater_probe", results=str(results)) == 0
        (result,) = ResultStore(results).all()
        return result.data.fingerprint

    assert fingerprint_of("random", "simple") == fingerprint_of("random", "cifar10")
    assert fingerprint_of("language", "simple") != fingerprint_of("language", "cifar10")
    assert fingerprint_of("language", None) == fingerprint_of("language", "simple"), "the templates of data without any"


def test_a_result_about_other_data_of_the_same_name_is_replaced_by_force_only(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, colours, tasks="knn")
    first = _stored(tmp_path)
    (colours / "test" / "red" / "0.png").unlink()
    capsys.readouterr()
    assert _run(tmp_path, colours, tasks="knn") == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("FAILED"))
    assert "about other data" in line
    assert "--force" in line
    assert _stored(tmp_path) == first
    assert _run(tmp_path, colours, tasks="knn", force=True) == 0
    assert _stored(tmp_path)["knn/colours"].data.n == 89


def test_a_model_pretrained_on_the_same_unsplit_data_is_warned_about_and_the_warning_is_stored(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unsplit = colours / "train"
    build = toy_backbone.build

    def pretrained():
        backbone = build()
        backbone.card = backbone.card.model_copy(update={"pretrain_data": (f"imagefolder:{unsplit}",)})
        return backbone

    monkeypatch.setattr(toy_backbone, "build", pretrained)
    for _ in range(2):  # measured, then reused
        assert _run(tmp_path, unsplit, tasks="knn") == 0
        assert "note: N.B. the model was pretrained on these very images" in capsys.readouterr().out
    store = ResultStore(tmp_path / "results")
    assert any("very images" in note for note in store.rows(store.load("toy", "knn/train")).meta["notes"])


def test_two_data_sets_in_one_call(tmp_path: Path, colours: Path) -> None:
    specs = [f"imagefolder:{colours}", f"imagefolder:{colours / 'train'}"]
    words = ["--data", specs[0], "--data", specs[1], "--device", "cpu", "--workers", "0"]
    words += ["--results", str(tmp_path / "results")]
    assert main(["eval", "--model", f"{MODEL}:build", "--tasks", "knn", *words]) == 0
    assert set(_stored(tmp_path)) == {"knn/colours", "knn/train"}


def test_tasks_on_the_same_data_read_them_once(tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlbench.data import taskdata

    opened = []
    open_source = taskdata.open_source
    monkeypatch.setattr(taskdata, "open_source", lambda *place: opened.append(place) or open_source(*place))
    assert _run(tmp_path, colours) == 0
    assert len(opened) == len(set(opened)) == 3


def test_the_console_script_finds_a_module_in_the_working_directory(tmp_path: Path, colours: Path) -> None:
    lines = [
        "from torch import nn",
        "from vlbench.models import wrap",
        "def build():",
        "    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())",
        "    return wrap(net, preprocess=8, name='mine')",
    ]
    (tmp_path / "mymodel.py").write_text("\n".join(lines))
    script = str(Path(sys.executable).parent / "vlbench")
    words = ["eval", "--model", "mymodel:build", "--tasks", "knn", "--data", f"imagefolder:{colours}"]
    words += ["--device", "cpu", "--workers", "0"]
    done = subprocess.run([script, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results" / "mine" / "knn" / "colours@v1.json").is_file()


def test_a_moved_or_renamed_folder_is_the_same_data(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, colours, tasks="knn")
    (tmp_path / "elsewhere").mkdir()
    moved = colours.rename(tmp_path / "elsewhere" / "colours")
    capsys.readouterr()
    _run(tmp_path, moved, tasks="knn")
    assert "reused, measured" in capsys.readouterr().out


def test_a_failing_task_leaves_the_others_finished(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlbench.adapters.linear import Linear

    def fail(self, encoder, data, config):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Linear, "predict", fail)
    assert _run(tmp_path, colours, tasks="zeroshot,linear,knn") == 1
    assert set(_stored(tmp_path)) == {"zeroshot/colours", "knn/colours"}
    captured = capsys.readouterr()
    assert "FAILED linear/colours: RuntimeError: out of luck" in captured.err
    assert "Traceback" not in captured.err


def test_a_kill_between_tasks_loses_no_finished_task(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlbench.adapters.knn import KNN

    def die(self, encoder, data, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(KNN, "predict", die)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, colours, tasks="zeroshot,linear,knn")
    assert set(_stored(tmp_path)) == {"zeroshot/colours", "linear/colours"}


def test_features_that_are_not_finite_fail_the_task(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, colours, model=f"{MODEL}:build_broken", tasks="knn") == 1
    assert "toy-broken: pooled features are not finite" in capsys.readouterr().err
    assert not _stored(tmp_path)


def test_a_broken_test_image_fails_the_task_and_names_the_file(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (colours / "test" / "red" / "3.png").write_bytes(b"this is text")
    assert _run(tmp_path, colours, tasks="knn") == 1
    err = capsys.readouterr().err
    assert "3" in err
    assert "not an image" in err


def test_model_without_text_skips_a_kind_and_refuses_a_name(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = f"{MODEL}:build_vision_only"
    assert _run(tmp_path, colours, model=vision) == 0
    assert "skipped zeroshot/colours: toy-vision has no text tower" in capsys.readouterr().out
    assert set(_stored(tmp_path)) == {"linear/colours", "knn/colours"}
    with pytest.raises(UserError, match=r"task zeroshot/shapes: toy-vision has no text tower"):
        _run(tmp_path, None, model=vision, tasks="zeroshot/shapes")


def test_data_without_captions_skip_retrieval(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, colours, tasks="retrieval,knn") == 0
    assert "skipped retrieval/colours" in capsys.readouterr().out
    assert set(_stored(tmp_path)) == {"knn/colours"}


def test_nothing_that_could_run_is_not_success(tmp_path: Path, colours: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        _run(tmp_path, colours, tasks="retrieval")


def test_no_store_keeps_no_features_but_shares_them_in_one_call(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, colours, no_store=True) == 0
    assert "images: 180 encoded" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "features").exists()


def test_damaged_rows_are_said_and_measured_again(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, colours, tasks="knn")
    rows = tmp_path / "results" / "toy" / "knn" / "colours@v1.parquet"
    rows.write_bytes(rows.read_bytes()[:-10])
    capsys.readouterr()
    assert _run(tmp_path, colours, tasks="knn") == 0
    captured = capsys.readouterr()
    assert "stored result not used" in captured.err
    store = ResultStore(tmp_path / "results")
    assert len(store.rows(store.load("toy", "knn/colours"))) == 90


def test_stored_rows_score_to_the_stored_numbers(tmp_path: Path, colours: Path) -> None:
    """Tables are rebuilt from rows alone: predict once, score for ever."""
    from vlbench.core.catalog import ADAPTERS

    _run(tmp_path, colours)
    store = ResultStore(tmp_path / "results")
    for result in store.all():
        adapter = ADAPTERS.get(result.adapter)
        assert adapter.score(store.rows(result), adapter.Config(**result.config)) == result.estimates
