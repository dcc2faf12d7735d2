"""Fine-tunings killed by SIGKILL end as the one that was never stopped: weights, value and predictions, bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import pkgutil
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

from tests.adapters.fusion_worlds import SIZES
from tests.adapters.test_detection import Data
from tests.finetune.detection import scenes
from tests.finetune.fusion import quadrants
from tests.train.conftest import in_process, on_ranks, ranks_of
from vlbench.adapters.common.fusion import tune_and_answer
from vlbench.adapters.detection import ADAPTER as DETECTION
from vlbench.adapters.encoder import Encoder
from vlbench.data.shapes.write import write_world
from vlbench.finetune.detection.feed import DetectionFeed
from vlbench.finetune.detection.recipe import DetectionTuner, renew_norms
from vlbench.finetune.fusion.heads import AnswerHead
from vlbench.store.features import FeatureStore
from vlbench.store.results import ResultStore
from vlbench.train.distributed import session

ROOT = Path(__file__).resolve().parents[2]
Predictions: TypeAlias = list[Any]

RATES = {"search": (1, 0.3), "steps": 6, "judge_every": 2, "checkpoint_every": 3}
"""Two runs: saved after 2, 3, 4 and 6 steps, judged after 2, 4 and 6."""


def fusion(**settings: Any) -> Predictions:
    """What a fusion model with dropout answers, and how it was chosen."""
    train, held = quadrants.soft_colour(24), quadrants.soft_colour(12, seed=7)
    stream = {"width": 16, "layers": 1, "heads": 2, "dropout": 0.1, "positions": 32, "init_std": 0.1}

    def judge(logits: list[np.ndarray]) -> float:
        return float(np.mean([row[max(t, key=t.get)] for row, t in zip(logits, held.targets, strict=True)]))

    found = tune_and_answer(
        Encoder(quadrants.backbone(), FeatureStore(), batch_size=16),
        AnswerHead(4),
        train=train,
        held_out=held,
        asked={"held": held},
        judge=judge,
        config=quadrants.settings(**({"batch_size": 8, "stream": stream} | RATES | settings)),
        data_key="test",
    )
    return [found.logits["held"], found.chosen]


def detection() -> Predictions:
    """What a detector finds, of images in two sizes of which some are mirrored, and how it was chosen."""
    data = Data(train=scenes.Scenes(8), test=scenes.Scenes(3, seed=5, split="test"))
    config = scenes.small(**RATES, short_sides=(64, 96), score_threshold=0.0, held_out=0.3)
    rows = DETECTION.predict(Encoder(scenes.backbone(), None), data, config)
    return [rows.columns["boxes"], rows.columns["scores"], rows.columns["masks"], rows.meta["chosen"]]


KINDS: dict[str, Callable[[], Predictions]] = {
    "frozen": fusion,
    "trained": lambda: fusion(backbone="trained"),
    "detection": detection,
}


@dataclass(frozen=True)
class Moment:
    """Before or after the ``count``-th call of a function, or halfway through what it writes to its second argument."""

    when: str
    name: str
    count: int = 1

    def lurk(self) -> None:
        """From now on this process dies then."""
        place, _, name = self.name.rpartition(".")
        owner = pkgutil.resolve_name(place)
        whole, calls = getattr(owner, name), []

        def watched(*args: Any, **words: Any) -> Any:
            calls.append(1)
            now = len(calls) == self.count
            if now and self.when == "halfway":
                args[1].write(b"half of it")
                args[1].flush()
            if now and self.when != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            found = whole(*args, **words)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, name, watched)


LIFE = {
    "before there is a checkpoint": Moment("before", "vlbench.train.loop._one_step", 2),
    "while the first checkpoint is written": Moment("halfway", "torch.save"),
    "right after a checkpoint, before it was judged": Moment("after", "vlbench.train.checkpoint.save"),
    "while what was saved is judged before anything else": Moment("before", "vlbench.finetune.run._Judging._judged"),
    "when the best weights were kept and that was not noted": Moment(
        "before", "vlbench.finetune.run.write_judgements", 2
    ),
    "between two checkpoints": Moment("before", "vlbench.train.loop._one_step", 4),
    "while the model is judged": Moment("before", "vlbench.finetune.run._Judging._judged"),
    "between two learning rates": Moment("after", "vlbench.finetune.run._Judging.train"),
    "at the second rate, between two judgements": Moment("before", "vlbench.train.loop._one_step", 4),
    "while the second rate's last step is judged": Moment("before", "vlbench.finetune.run._Judging._judged", 2),
    "before the rates are compared": Moment("before", "vlbench.finetune.run._finish"),
    "when the chosen weights are there and nothing says so": Moment("before", "vlbench.finetune.run.sha256"),
    "before the chosen model is asked": Moment("before", "vlbench.finetune.run.read_assets"),
}
"""Each in the process that goes on from where the one before died."""


def died(moment: Moment, body: Callable[[], Any]) -> bool:
    """Whether ``body`` ended so."""

    def lurking() -> None:
        moment.lurk()
        body()

    process = in_process(lurking)
    process.join(timeout=120)
    return bool(process.exitcode == -signal.SIGKILL)


def left(cache: Path) -> tuple[bytes, dict[str, Any]]:
    """The chosen weights, and what is said of them but for the time that they took."""
    (folder,) = (cache / "finetune").glob("*-*")
    facts = json.loads((folder / "tuned.json").read_text())
    assert facts.pop("seconds") > 0
    return (folder / "weights.safetensors").read_bytes(), facts


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_life_of_kills_ends_as_one_that_was_never_stopped(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "whole"))
    predicted = KINDS[kind]()
    assert len(predicted[-1]["history"]) == 6
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "killed"))
    for name, moment in LIFE.items():
        assert died(moment, KINDS[kind]), f"it was not killed {name}"
    torch.rand(7)  # whatever this process did before
    again = KINDS[kind]()
    assert left(tmp_path / "killed") == left(tmp_path / "whole")
    assert same(again, predicted)
    assert not list((tmp_path / "killed").rglob("ckpt.pt*"))


def test_two_ranks_of_which_one_is_killed_end_as_two_that_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backbone's batch norm has running statistics, of which the ranks' copies differ until a checkpoint."""

    def predict(out: str, killed: str) -> None:
        if os.environ["RANK"] == killed:
            Moment("before", "vlbench.train.loop._one_step", 6).lurk()
        with session("cpu"):
            found = fusion(backbone="trained", search=())
        (tmp_path / f"{out}-{os.environ['RANK']}").write_bytes(pickle.dumps(found))

    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "whole"))
    on_ranks(predict, "whole", "nobody")
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "killed"))
    processes = ranks_of(predict, "killed", "1")
    for process in processes:
        process.join(timeout=60)
        process.kill()  # one that hangs must not outlive the test
    assert processes[1].exitcode == -signal.SIGKILL
    assert processes[0].exitcode == 1, "it cannot go on alone"
    on_ranks(predict, "killed", "nobody")
    assert left(tmp_path / "killed") == left(tmp_path / "whole")
    found = [pickle.loads(path.read_bytes()) for path in sorted(tmp_path.glob("*-[01]"))]
    assert len(found) == 4
    assert all(same(one, found[0]) for one in found)


def test_statistics_taken_anew_do_not_depend_on_what_the_process_did_before() -> None:
    """Norms in the heads see the boxes that are sampled, by a chance that a run going on must have again."""
    config = scenes.small(heads_norm="batch", precise_norm=2, sampled_boxes=4, mask_convolutions=(16,))
    feed = DetectionFeed(scenes.Scenes(4), config)
    torch.manual_seed(0)
    model = DetectionTuner(scenes.backbone()).build(config, feed.classes)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        renew_norms(model, feed, config)
        found.append({name: value.clone() for name, value in model.named_buffers() if "running_" in name})
    assert any("roi_heads" in name for name in found[0])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


SETTINGS = {
    "frozen": ("vqa/shapes", "vqa", "eye", ("stream.dropout=0.1", "stream.width=16", "levels=2")),
    "trained": ("vqa/shapes_trained", "vqa", "eye", ("stream.dropout=0.1", "stream.width=16", "levels=2")),
    "detection": ("detection/shapes", "coco", "eye", ("channels=16", "box_width=32", "mask_convolutions=[16]")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_call_killed_at_random_moments_stores_what_an_unbroken_one_stores(kind: str, tmp_path: Path) -> None:
    """The command itself, four times killed after a share of the seconds that the whole run takes."""
    task, part, model, settings = SETTINGS[kind]
    world = write_world(tmp_path / "shapes", sizes=replace(SIZES, coco_train=16, coco_val=6), parts=(part,), workers=1)
    words = [sys.executable, "-m", "vlbench", "eval", "--model", f"tests.adapters.fusion_worlds:{model}"]
    words += ["--tasks", task, "--data", f"shapes:{part}?root={world}", "--device", "cpu", "--workers", "0"]
    run = ("steps=60", "judge_every=7", "checkpoint_every=5", "batch_size=4", "search=[1,0.3]")
    words += [word for setting in (*run, *settings) for word in ("--set", setting)]

    def start(folder: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "VLBENCH_CACHE": str(tmp_path / folder)}
        return subprocess.Popen([*words, "--results", str(tmp_path / folder / "results")], cwd=ROOT, env=env)

    def trains(folder: str) -> bool:
        return any((tmp_path / folder / "finetune").glob("*/lr-*/config.json"))

    began: list[float] = []
    whole = start("whole")
    while whole.poll() is None:
        if not began and trains("whole"):
            began.append(time.monotonic())
        time.sleep(0.02)
    assert whole.returncode == 0
    lasts = time.monotonic() - began[0]
    seed = random.randrange(10**6)
    draw, kills = random.Random(seed), 0
    for _ in range(4):
        running = start("killed")
        while running.poll() is None and not trains("killed"):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, lasts / 2))
        kills += running.poll() is None
        running.kill()
        running.wait()
    assert kills > 0, f"seed {seed}: it ended before it was killed"
    assert start("killed").wait() == 0
    assert left(tmp_path / "killed") == left(tmp_path / "whole"), f"seed {seed}"
    stores = [ResultStore(tmp_path / folder / "results") for folder in ("killed", "whole")]
    (one,), (other,) = (store.all() for store in stores)
    assert (one.estimates, one.chosen) == (other.estimates, other.chosen), f"seed {seed}"
    rows, others = (store.rows(result) for store, result in zip(stores, (one, other)))
    assert rows.columns.keys() == others.columns.keys()
    for name, column in rows.columns.items():
        assert same(list(column), list(others[name])), f"seed {seed}: {name}"
