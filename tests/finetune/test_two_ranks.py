"""Fine-tunings by two processes: what of the single process's run holds, and what is stored.

Every rank holds equally many examples, so that the mean over ranks of each one's gradient is that of the whole batch
wherever a loss is a mean over examples. What is counted within a rank is that of its part of the batch: statistics of
batch norm, and a detector's normalisers (a loss is divided by the anchors or boxes that were sampled). Two ranks are
then one process with ``accumulate=2``, whose parts are theirs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.fusion_worlds import SIZES
from tests.finetune.toys import Points, Toy, ToyConfig
from tests.train.conftest import on_ranks
from tests.verbs.test_crew import _together as together
from vlbench.cli import main
from vlbench.core.config import override
from vlbench.core.types import Result, Rows
from vlbench.data.shapes.write import write_world
from vlbench.finetune.recipe import FineTuner
from vlbench.finetune.run import finetune
from vlbench.models.weights import read_weights
from vlbench.store.results import ResultStore
from vlbench.train.distributed import session

EYE = ("tests.adapters.fusion_worlds:eye",)
RESNET = ("timm:test_resnet", "--weights", "random")  # with batch norm
STEPS = 6
# Plain SGD: Adam makes much of a gradient that is nothing but rounding.
RUN = (f"steps={STEPS}", "batch_size=8", "judge_every=3", "checkpoint_every=6", "optim.name=sgd", "optim.lr=0.05")
FUSION = (*RUN, "levels=2", "stream.width=16", "stream.hidden=32", "stream.init_std=0.1")
# As many samples as there are: which are drawn is a matter of chance, and a rank's chance is its own.
ALL = ("sampled_anchors=100000", "sampled_boxes=100000")
DETECTION = (*RUN, "optim.lr=0.005", "short_sides=[64]", "short_side=64", "channels=16", "box_width=32", *ALL)
DETECTION = (*DETECTION, "mask_convolutions=[16]", "anchor_sizes=[8,16,32,64,128]", "proposals=30", "select=last")
PARTS = {"vqa": "vqa", "nlvr2": "nlvr2", "entailment": "snli_ve", "grounding": "refcoco", "detection": "coco"}
SMALL = replace(SIZES, vqa_test=15, snli_ve_test=15, refcoco_val=15, coco_train=12, coco_val=7)


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = tuple(PARTS.values())
    return write_world(tmp_path_factory.mktemp("world") / "shapes", sizes=SMALL, parts=parts, workers=1)


class Measured:
    """What one call left: the stored result and its rows, the weights, and those of every step of every rank."""

    def __init__(self, folder: Path) -> None:
        store = ResultStore(folder / "results")
        self.result: Result
        (self.result,) = store.all()
        self.rows: Rows = store.rows(self.result)
        (path,) = (folder / "cache" / "finetune").glob("*/weights.safetensors")
        self.weights: dict[str, torch.Tensor] = read_weights(path)
        self.steps = [path.read_text().split() for path in sorted(folder.glob("steps-*"))]


@pytest.fixture
def measure(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls ``vlbench eval`` on one task, by one process or two."""

    def measured(name: str, kind: str, settings: Sequence[str], *, ranks: int = 1) -> Measured:
        folder = tmp_path / name
        folder.mkdir()

        def note(self: Any, module: torch.nn.Module) -> None:
            """Which weights this rank has after a step."""
            total = hashlib.sha256()
            for parameter in module.parameters():
                total.update(parameter.detach().contiguous().numpy().tobytes())
            with (folder / f"steps-{os.environ.get('RANK', '0')}").open("a") as file:
                file.write(total.hexdigest() + "\n")

        monkeypatch.setattr(FineTuner, "after_step", note)
        model = RESNET if kind == "detection" else EYE
        words = ["eval", "--model", *model, "--tasks", f"{kind}/shapes", "--data", f"shapes:{PARTS[kind]}?root={world}"]
        words += ["--results", str(folder / "results"), "--device", "cpu", "--workers", "0"]
        words += [word for setting in settings for word in ("--set", setting)]
        if ranks == 1:
            monkeypatch.setenv("VLBENCH_CACHE", str(folder / "cache"))
            assert main(words) == 0
        else:
            statuses, said = together(words, folder)
            assert statuses == [0, 0], said
            assert said[1] == "", "only the first process talks"
        return Measured(folder)

    return measured


def assert_by_two(two: Measured, one: Measured) -> None:
    """Both ranks went the same way, and each example was stored once, by the first."""
    assert [len(steps) for steps in two.steps] == [STEPS, STEPS]
    assert two.steps[0] == two.steps[1]
    assert len(set(two.steps[0])) == STEPS, "it moved"
    assert two.result.settings["processes"] == 2
    assert list(two.rows["id"]) == list(one.rows["id"])
    assert len(set(two.rows["id"])) == len(two.rows)


def assert_same_weights(two: Measured, one: Measured, *, but: Sequence[str] = ()) -> None:
    """To float32's rounding, which has grown over the steps; but for what is counted otherwise."""
    assert two.weights.keys() == one.weights.keys()
    for name, tensor in one.weights.items():
        if not name.endswith(tuple(but)):
            torch.testing.assert_close(two.weights[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023


COUNTED = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("kind", ["vqa", "grounding", slow("nlvr2"), slow("entailment")])
def test_frozen_fusion_gives_the_model_and_the_numbers_of_one(measure: Any, kind: str) -> None:
    """Without batch norm nothing is counted within a rank. In grounding one has more regions than the other."""
    one = measure("one", kind, [*FUSION, "scale_features=false"])
    two = measure("two", kind, [*FUSION, "scale_features=false"], ranks=2)
    assert_by_two(two, one)
    assert_same_weights(two, one)
    assert two.result.estimates == one.result.estimates


@pytest.mark.parametrize("backbone", ["trained", slow("frozen")])
def test_features_are_scaled_within_each_ranks_half(measure: Any, backbone: str) -> None:
    halves = measure("halves", "vqa", [*FUSION, f"backbone={backbone}", "accumulate=2"])
    two = measure("two", "vqa", [*FUSION, f"backbone={backbone}"], ranks=2)
    assert_by_two(two, halves)
    assert_same_weights(two, halves, but=COUNTED)


def test_detection_gives_the_model_of_one_that_takes_the_halves_in_turn(measure: Any) -> None:
    halves = measure("halves", "detection", [*DETECTION, "accumulate=2"])
    two = measure("two", "detection", DETECTION, ranks=2)
    assert_by_two(two, halves)
    assert_same_weights(two, halves, but=COUNTED)


def test_a_rate_that_diverges_where_it_is_judged_is_out_of_the_search_on_every_rank(tmp_path: Path) -> None:
    def rank() -> None:
        values = iter([0.5, float("nan"), 0.1, 0.2, 0.3])
        with session("cpu"):
            config = override(ToyConfig(), ["search=[1, 0.3]"])
            judge = lambda module: next(values)  # noqa: E731
            tuned = finetune(Toy(), config, feed=Points(), judge=judge, folder=tmp_path, device="cpu")
            assert (tuned.learning_rate, tuned.value) == (pytest.approx(0.015), 0.3)

    on_ranks(rank)
