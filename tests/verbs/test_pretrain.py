"""``vlbench pretrain`` as it is typed."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from tests.train.conftest import in_process
from vlbench.cli import main
from vlbench.core.errors import UserError
from vlbench.models.weights import read_checkpoint
from vlbench.verbs import calls
from vlbench.verbs.calls import PRETRAIN_DEFAULTS
from vlbench.verbs.pretrain import run

SMALL = ("visual.image_size=32", "batch_size=8", "workers=0", "log_every=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (root / name).mkdir()
        for number in range(12):
            pixels = rng.integers(0, 120, (24, 24, 3)) + (100 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return f"imagefolder:{root}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def arguments(data: str, /, **changes: Any) -> argparse.Namespace:
    given = {"recipe": "supervised", "data": [data], "steps": 4, "checkpoint_every": 2, "set": list(SMALL)}
    return argparse.Namespace(**{**PRETRAIN_DEFAULTS, **given, **changes})


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["model"]


def test_pretrain_prints_the_changes_the_checkpoint_and_what_to_do_next(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(data)) == 0
    out, err = capsys.readouterr()
    assert re.search(r"steps = 4 \(preset: \d+\)", out)
    assert "checkpoint: runs/supervised-tiny-s0/ckpt.pt\n" in out
    assert "vlbench eval --model runs/supervised-tiny-s0/ckpt.pt --tasks linear,knn" in out
    assert "step 4/4  loss " in err
    stored = json.loads(Path("runs/supervised-tiny-s0/config.json").read_text())
    assert (stored["recipe"], stored["preset"], stored["config"]["steps"]) == ("supervised", "tiny", 4)


def test_pretrain_takes_the_next_free_folder_and_resumes_the_last(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("supervised-tiny-s7", "supervised-tiny-s7-2"):
        run(arguments(data, seed=7, steps=1))
        assert Path("runs", name, "ckpt.pt").is_file()
    capsys.readouterr()
    run(arguments(data, seed=7, steps=1, resume=True))
    out, err = capsys.readouterr()
    assert "checkpoint: runs/supervised-tiny-s7-2/ckpt.pt" in out
    assert "this run is finished (1 steps)" in err
    assert not Path("runs/supervised-tiny-s7-3").exists()


def test_pretrain_resumes_with_the_runs_own_settings(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(arguments(data, out="a"))
    bare = argparse.Namespace(**{**PRETRAIN_DEFAULTS, "recipe": "supervised", "out": "a", "resume": True})
    assert run(bare) == 0
    assert "this run is finished (4 steps)" in capsys.readouterr().err
    with pytest.raises(UserError, match="steps: 4, now 6"):
        run(arguments(data, out="a", resume=True, steps=6))
    with pytest.raises(UserError, match="a is a run of supervised, not of clip"):
        run(arguments(data, out="a", resume=True, recipe="clip"))
    with pytest.raises(UserError, match="already holds a run; go on with it by --resume"):
        run(arguments(data, out="a"))


def test_pretrain_called_by_a_verb_reuses_a_run_of_the_same_settings_only(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"recipe": "supervised", "data": [data], "set": SMALL, "out": "a", "resume": True}
    path = calls.pretrain(**same, steps=2)
    made = path.stat().st_mtime_ns
    assert calls.pretrain(**same, steps=2) == path
    assert "this run is finished (2 steps)" in capsys.readouterr().err
    for steps in (3, None):  # None: the preset's own, not the folder's
        with pytest.raises(UserError, match=r"steps: 2, now \d+\).*give another --out, or delete the folder"):
            calls.pretrain(**same, steps=steps)
    with pytest.raises(UserError, match="a is a run of supervised, not of clip"):
        calls.pretrain(**{**same, "recipe": "clip"}, steps=2)
    assert path.stat().st_mtime_ns == made


def test_pretrain_never_shares_a_folder(data: str) -> None:
    claimed = Path("runs/supervised-tiny-s0")
    claimed.mkdir(parents=True)  # as by a run that has just started
    run(arguments(data, steps=1))
    assert list(claimed.iterdir()) == []
    assert Path("runs/supervised-tiny-s0-2/ckpt.pt").is_file()
    for changes in ({"out": "runs/supervised-tiny-s0-2"}, {}):
        with FileLock("runs/supervised-tiny-s0-2/.lock"), pytest.raises(UserError) as error:
            run(arguments(data, steps=1, resume=True, **changes))
        assert str(error.value).startswith("runs/supervised-tiny-s0-2 is in use by another `vlbench pretrain`; ")
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"the run folder file.* cannot be made"):
        run(arguments(data, out="file"))


def test_pretrain_started_twice_at_once_makes_two_runs(data: str) -> None:
    both = [in_process(run, arguments(data, steps=1)) for _ in range(2)]
    for process in both:
        process.join(timeout=120)
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(path.parent.name for path in Path("runs").glob("*/ckpt.pt")) == [
        "supervised-tiny-s0",
        "supervised-tiny-s0-2",
    ]


def test_pretrain_that_fails_ends_with_1_and_one_that_is_mistyped_with_2(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "supervised", "--data", data, "--steps", "3", "--out", "a"]
    words += [word for setting in SMALL for word in ("--set", setting)]
    assert main([*words, "--set", "optim.lr=1e30", "--set", "optim.clip_norm=null"]) == 1
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    broken = Path(data.partition(":")[2]).parent / "broken"
    (broken / "dark").mkdir(parents=True)
    for number in range(12):
        (broken / "dark" / f"{number}.png").write_bytes(b"no image")
    assert main([*words, "--data", f"imagefolder:{broken}", "--set", "max_bad=0", "--out", "b"]) == 1
    assert "bad examples" in capsys.readouterr().err.splitlines()[-1]
    assert main([*words, "--set", "max_bad=-1", "--out", "c"]) == 2


def test_pretrain_with_another_backbone(data: str) -> None:
    run(arguments(data, backbone="timm:test_vit", out="vit", steps=1))
    assert read_checkpoint("vit/ckpt.pt")["card"]["arch"] == "timm:test_vit"


@pytest.mark.parametrize(
    "changes, answer",
    [
        ({"recipe": "supervized"}, "unknown recipe 'supervized'; did you mean 'supervised'"),
        ({"preset": "papper"}, "unknown preset 'papper'; did you mean 'paper'"),
        ({"preset": "paper", "data": None}, "give --data"),
        ({"backbone": "timm:test_resnt"}, "did you mean 'test_resnet'"),
        ({"backbone": "test_resnet"}, "for instance timm:test_resnet"),
        ({"set": ["optim.rl=1"]}, "unknown setting 'rl'; did you mean 'lr'"),
        ({"set": ["optim.lr=fast"]}, "optim.lr: Input should be a valid number"),
        ({"set": ["batch_size=9", "accumulate=2"]}, "batch_size 9 cannot be cut into accumulate=2"),
        ({"steps": 0}, "pretrain supervised: steps: Input should be greater than or equal to 1 (got 0)"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"device": "gpu"}, "--device gpu: expected cpu, cuda or cuda:<number>"),
        ({"data": ["imagefolder:nowhere"]}, "nowhere"),
    ],
)
def test_pretrain_answers_a_mistake_with_one_line_and_leaves_nothing(
    changes: dict[str, Any], answer: str, data: str
) -> None:
    with pytest.raises(UserError) as error:
        run(arguments(data, **changes))
    assert answer in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("runs").exists()


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "vlbench", "pretrain", *words]


def test_pretrain_under_torchrun_equals_one_process(data: str) -> None:
    """CLIP's loss over two ranks on a network without batch statistics."""
    words = ["clip", "--backbone", "timm:test_vit", "--data", data, "--steps", "3", "--device", "cpu"]
    # A small rate: AdamW divides by gradients near zero, which makes their rounding as large as the rate.
    words += [word for setting in (*SMALL, "optim.lr=1e-3") for word in ("--set", setting)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone = subprocess.Popen(command(*words, "--out", "one"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    two = subprocess.run([*torchrun, *command(*words)[1:]], capture_output=True, text=True, check=True, timeout=180)
    assert alone.wait(timeout=180) == 0
    assert two.stdout.count("checkpoint: runs/clip-tiny-s0/ckpt.pt") == 1
    found, expected = weights("runs/clip-tiny-s0/ckpt.pt"), weights("one/ckpt.pt")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


def last_step(log: Path) -> int:
    """The last whole line's step; 0 where there is none yet."""
    lines = log.read_text().split("\n")[:-1] if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def killed_after(step: int, words: list[str], *, wait: float = 0.0) -> None:
    """Start (or go on with) the run in ``killed`` and end it by SIGKILL once ``step`` is logged."""
    process = subprocess.Popen(
        command(*words, "--out", "killed", "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while last_step(Path("killed/log.jsonl")) < step and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    time.sleep(wait)
    assert process.poll() is None, "the run ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def with_settings(words: list[str], settings: tuple[str, ...]) -> list[str]:
    return [*words, *(word for setting in settings for word in ("--set", setting))]


SGD_LOOKAHEAD = (
    "optim.name=sgd",
    "optim.lr=1e-3",
    r"optim.lr_factors={'^visual\.': 200.0}",
    "optim.weight_decay=1e-4",
    "optim.decay_vectors=true",
    "optim.clip_norm=10",
    "optim.lookahead_steps=7",
    "dropout=0.1",
)
"""VirTex's own, but that the slow weights move every 7 steps and not 5: checkpoints come in between."""
LAMB = (
    "optim.name=lamb",
    "optim.lr=1e-3",
    "optim.weight_decay=1e-5",
    "optim.betas=[0.9, 0.999]",
    "optim.decay_vectors=true",
    r"optim.no_decay=['logit_scale$', '\.bn\d\.']",
    "schedule.kind=linear",
    "text.dropout=0.1",
)
"""ALIGN's own."""


@pytest.mark.parametrize(("recipe", "more"), [("clip", ()), ("virtex", ("head=L1_H32", *SGD_LOOKAHEAD))])
def test_pretrain_killed_and_resumed_gives_the_same_bits(recipe: str, more: tuple[str, ...], data: str) -> None:
    words = [recipe, "--data", data, "--steps", "24", "--checkpoint-every", "3", "--seed", "3"]
    words = with_settings(words, ("visual.image_size=32", "batch_size=8", "log_every=1", *more))
    whole = subprocess.Popen(command(*words, "--out", "whole"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed_after(7, words)
    left = read_checkpoint("killed/ckpt.pt")
    stopped = left["step"]
    assert 6 <= stopped < 24
    if more:
        state = left["train"]["optimizer"]
        assert {group["lookahead_count"] for group in state["param_groups"]} == {stopped % 7}
        assert all("lookahead_slow" in slot and "momentum_buffer" in slot for slot in state["state"].values())
    assert whole.wait(timeout=120) == 0
    done = subprocess.run(command(*words, "--out", "killed", "--resume"), check=True, capture_output=True, text=True)
    assert f"resuming from step {stopped} of 24" in done.stderr
    found, expected = weights("killed/ckpt.pt"), weights("whole/ckpt.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    losses = [
        [json.loads(line)["loss"] for line in Path(name, "log.jsonl").read_text().splitlines()]
        for name in ("killed", "whole")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        *((recipe, ()) for recipe in ("supervised", "clip", "align", "unicl", "virtex", "muvla")),
        pytest.param("virtex", SGD_LOOKAHEAD, id="virtex-sgd-lookahead"),
        pytest.param("align", LAMB, id="align-lamb"),
    ],
)
def test_pretrain_killed_at_five_random_moments_gives_the_same_weights(recipe: str, more: tuple[str, ...]) -> None:
    words = [recipe, "--steps", "60", "--checkpoint-every", "10", "--seed", "3"]
    words = with_settings(words, ("log_every=1", *more))
    subprocess.run(command(*words, "--out", "whole"), check=True, capture_output=True)
    moments = random.Random(0)
    for after in sorted(moments.sample(range(3, 58), 5)):
        killed_after(after, words, wait=moments.uniform(0, 0.2))
    subprocess.run(command(*words, "--out", "killed", "--resume"), check=True, capture_output=True)
    found, expected = weights("killed/ckpt.pt"), weights("whole/ckpt.pt")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in Path("killed/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))
