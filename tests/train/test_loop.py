"""The loop: resumed, killed, spread over ranks, it is the same run; what goes wrong stops it and leaves the good."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import CLASSES, in_process, on_ranks
from tests.train.stopping import Stop, StopAt
from vlbench.core.errors import RunError, UserError
from vlbench.models.weights import checkpoint_assets, read_checkpoint
from vlbench.recipes.supervised import RECIPE, Supervised
from vlbench.train.distributed import Ranks, session
from vlbench.train.loop import fit


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = {"images_per_second", "data_wait", "seconds"}
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., Any]) -> Path:
    """The uninterrupted run."""
    return fit(RECIPE, settings(), out=tmp_path_factory.mktemp("whole"))


def test_fit_learns_and_writes_a_self_describing_checkpoint(whole: Path, settings: Callable[..., Any]) -> None:
    found = read_checkpoint(whole)
    assert (found["recipe"], found["classes"], found["step"], found["samples_seen"]) == (
        "supervised",
        list(CLASSES),
        12,
        96,
    )
    assert found["config"] == settings().model_dump(mode="json")
    assert found["card"]["preprocess"]["image_size"] == [32, 32]
    assert found["card"]["images_seen"] == 96
    assert "train" not in found
    records = log_of(whole.parent)
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(record["images_per_second"] > 0 for record in records)
    assert set(records[0]) >= {"loss", "lr", "grad_norm", "images_per_second", "data_wait", "seconds", "samples_seen"}
    stored = json.loads((whole.parent / "config.json").read_text())
    assert stored["config"]["steps"] == 12


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_resume_gives_the_same_bits_and_the_same_log(
    stop: int, whole: Path, settings: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        fit(RECIPE, settings(), out=tmp_path, watcher=StopAt(stop))
    torch.manual_seed(99)  # whatever the process did in between
    # Loader processes are free to change; they never change the data.
    path = fit(RECIPE, settings("workers=2"), out=tmp_path, resume=True)
    assert same(weights(path), weights(whole))
    assert untimed(log_of(tmp_path)) == untimed(log_of(whole.parent))


def test_a_different_seed_gives_different_weights(whole: Path, settings: Callable[..., Any], tmp_path: Path) -> None:
    assert not same(weights(fit(RECIPE, settings("seed=1"), out=tmp_path)), weights(whole))


def test_killed_twice_and_resumed_gives_the_same_bits(
    whole: Path, settings: Callable[..., Any], tmp_path: Path
) -> None:
    """SIGKILL, at moments that the process did not choose: while it computes, or while it writes."""
    config = settings("workers=1", "checkpoint_every=1")

    def once() -> None:
        fit(RECIPE, config, out=tmp_path, resume=True)

    seen = 0
    for wanted in (3, 7):
        process = in_process(once)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.is_alive():
            path = tmp_path / "ckpt.pt"
            if path.is_file() and (seen := read_checkpoint(path)["step"]) >= wanted:
                break
            time.sleep(0.01)
        assert process.is_alive(), "the run ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert read_checkpoint(tmp_path / "ckpt.pt")["step"] >= seen
    once()
    assert same(weights(tmp_path / "ckpt.pt"), weights(whole))
    steps = [record["step"] for record in log_of(tmp_path)]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_two_ranks_equal_one_process(settings: Callable[..., Any], tmp_path: Path) -> None:
    """Without dropout, whose masks belong to a rank. Accumulation splits a batch further and changes nothing either."""
    plain = ("visual.kwargs={}", "steps=6")
    one = fit(RECIPE, settings(*plain), out=tmp_path / "one")

    def rank(out: str, *more: str) -> None:
        with session("cpu") as device:
            fit(RECIPE, settings(*plain, *more), out=tmp_path / out, device=device)

    on_ranks(rank, "two")
    on_ranks(rank, "two-parts", "accumulate=2")
    for name in ("two", "two-parts"):
        for key, value in weights(tmp_path / name / "ckpt.pt").items():
            torch.testing.assert_close(value, weights(one)[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
        for mine, theirs in zip(log_of(tmp_path / name), log_of(one.parent), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert mine["samples_seen"] == theirs["samples_seen"]
    assert not same(weights(one), weights_at_start(settings(*plain)))


def weights_at_start(config: Any) -> dict[str, torch.Tensor]:
    return RECIPE.build(config, CLASSES).state_dict()


def test_resume_refuses_changed_settings_by_name(settings: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(RECIPE, settings(), out=tmp_path, watcher=StopAt(5))
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001, now 0\.01; steps: 12, now 20\)"):
        fit(RECIPE, settings("optim.lr=1e-2", "steps=20"), out=tmp_path, resume=True)
    with pytest.raises(UserError, match="already holds a run; go on with it by --resume"):
        fit(RECIPE, settings(), out=tmp_path)
    free = settings("log_every=3", "checkpoint_every=5", "max_bad=4")
    assert fit(RECIPE, free, out=tmp_path, resume=True).is_file()


def test_resume_refuses_changed_data(settings: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "data")
    config = settings(f"data=[imagefolder:{tmp_path / 'data'}]")
    with pytest.raises(Stop):
        fit(RECIPE, config, out=tmp_path / "run", watcher=StopAt(5))
    red = tmp_path / "data" / "red"
    (red / "0.png").rename(red / "x.png")
    with pytest.raises(UserError, match=r"the data have changed since \(imagefolder:\S+: other ids\): "):
        fit(RECIPE, config, out=tmp_path / "run", resume=True)
    (red / "x.png").unlink()
    with pytest.raises(
        UserError, match=r"examples 48, now 47; imagefolder:\S+: other ids; imagefolder:\S+: other labels"
    ):
        fit(RECIPE, config, out=tmp_path / "run", resume=True)
    shutil.copy(red / "1.png", red / "0.png")
    assert fit(RECIPE, config, out=tmp_path / "run", resume=True).is_file()


def test_resume_refuses_another_number_of_ranks(
    settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        fit(RECIPE, settings(), out=tmp_path, watcher=StopAt(5))
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    content["train"]["world"] = 2
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"made by 2 processes, now 1: .* start 2, or a new run"):
        fit(RECIPE, settings(), out=tmp_path, resume=True)


def test_resume_refuses_other_settings_before_the_first_checkpoint_and_after_the_last(
    whole: Path, settings: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        fit(RECIPE, settings(), out=tmp_path, watcher=StopAt(1))
    for folder in (tmp_path, whole.parent):
        with pytest.raises(UserError, match=r"steps: 12, now 20\).*another --out, or delete the folder"):
            fit(RECIPE, settings("steps=20"), out=folder, resume=True)


def test_resume_of_a_finished_run_says_so(whole: Path, settings: Callable[..., Any]) -> None:
    watcher, before = StopAt(-1), whole.stat().st_mtime_ns
    assert fit(RECIPE, settings(), out=whole.parent, resume=True, watcher=watcher) == whole
    assert watcher.said == ["this run is finished (12 steps)"]
    assert whole.stat().st_mtime_ns == before


class Exploding(Supervised):
    """Its loss is not a number from the eighth step on."""

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, model: Any, batch: Any, config: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        losses = super().loss(model, batch, config)
        return {**losses, "loss": losses["loss"] * (float("nan") if self.calls > 7 else 1.0)}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RunError) as error:
        fit(Exploding(), settings(), out=tmp_path)
    text = str(error.value)
    for part in ("step 8", "loss nan", "gradient norm nan", "learning rate", "step 4 stays", "ckpt.pt", "optim.lr"):
        assert part in text, f"{part!r} is not in {text!r}"
    assert "\n" not in text
    kept = read_checkpoint(tmp_path / "ckpt.pt")
    assert kept["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in kept["model"].values())
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        fit(Exploding(), settings("optim.lr=1e30", "optim.clip_norm=null"), out=tmp_path / "lr")


def test_bad_examples_are_replaced_counted_and_limited(
    settings: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "red" / "0.png").write_bytes(b"not an image")
    (tmp_path / "data" / "red" / "1.png").write_bytes(b"")
    data = f"data=[imagefolder:{tmp_path / 'data'}]"
    watcher = StopAt(-1)
    for workers in (0, 2):
        fit(RECIPE, settings(data, f"workers={workers}"), out=tmp_path / str(workers), watcher=watcher)
        assert "1 not an image" in watcher.said[-1]
        assert "1 empty file" in watcher.said[-1]
        assert log_of(tmp_path / str(workers))[-1]["bad_examples"] == 2
        with pytest.raises(RunError, match="too many bad examples"):
            fit(RECIPE, settings(data, f"workers={workers}", "max_bad=1"), out=tmp_path / f"limit{workers}")
    assert same(weights(tmp_path / "0" / "ckpt.pt"), weights(tmp_path / "2" / "ckpt.pt"))


def test_bad_examples_of_all_ranks_are_counted(settings: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    """Each rank meets the one that the other does not; an example that both have met is one example."""
    import shutil

    shutil.copytree(folder, tmp_path / "data")
    for name in ("0.png", "1.png", "2.png"):
        (tmp_path / "data" / "red" / name).write_bytes(b"not an image")
    config = settings(f"data=[imagefolder:{tmp_path / 'data'}]", "visual.kwargs={}")  # 12 steps of 8: two epochs

    def rank() -> None:
        with session("cpu") as device:
            watcher = StopAt(-1)
            fit(RECIPE, config, out=tmp_path / "two", device=device, watcher=watcher)
            assert watcher.said[-1].startswith("bad examples, replaced by others: 3 not an image: ")

    on_ranks(rank)
    fit(RECIPE, config, out=tmp_path / "one")
    counts = [[record["bad_examples"] for record in log_of(tmp_path / name)] for name in ("one", "two")]
    assert counts[0] == counts[1]
    assert counts[0][-1] == 3


def test_bf16_keeps_the_weights_in_fp32(settings: Callable[..., Any], tmp_path: Path) -> None:
    path = fit(RECIPE, settings("precision=bf16", "steps=2"), out=tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in weights(path).values())


def test_compile_compiles_and_leaves_the_run_what_it_was(
    settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        """Runs what was traced as it is: the default backend would call a C++ compiler for a minute."""
        graphs.append(graph)
        return graph.forward

    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend=backend))
    few = ("steps=2", "visual.kwargs={}")
    one = fit(RECIPE, settings(*few), out=tmp_path / "plain")
    assert not graphs
    two = fit(RECIPE, settings(*few, "compile=true"), out=tmp_path / "compiled")
    assert graphs
    assert weights(one).keys() == weights(two).keys()
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-5)


def test_batch_that_cannot_be_shared_is_refused(
    settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="batch_size 8 cannot be cut into accumulate=3"):
        settings("accumulate=3")
    monkeypatch.setattr("vlbench.train.loop.ranks", lambda: Ranks(0, 3))
    with pytest.raises(UserError, match="8 cannot be shared by 3 ranks in accumulate=2 parts; make it a multiple of 6"):
        fit(RECIPE, settings("accumulate=2"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Learned(Supervised):
    """Supervision whose head starts from something learnt of the data, and which cannot do without it."""

    learnt = 0

    def __init__(self, word: bytes | None = None) -> None:
        self.word = word

    def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
        type(self).learnt += 1
        return {"word": " ".join(data.classes).encode()}

    def with_assets(self, assets: Mapping[str, bytes]) -> Learned:
        return type(self)(assets["word"])

    def collate(self, config: Any, samples: Any) -> dict[str, torch.Tensor]:
        assert self.word == b"blue green grey red"
        return super().collate(config, samples)


def test_assets_are_learnt_once_and_travel_in_the_checkpoint(settings: Callable[..., Any], tmp_path: Path) -> None:
    Learned.learnt = 0
    with pytest.raises(Stop):
        fit(Learned(), settings(), out=tmp_path, watcher=StopAt(6))
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert checkpoint_assets(saved) == {"word": b"blue green grey red"}
    fit(Learned(), settings(), out=tmp_path, resume=True)
    assert Learned.learnt == 1
    assert checkpoint_assets(torch.load(tmp_path / "ckpt.pt", weights_only=True)) == {"word": b"blue green grey red"}
