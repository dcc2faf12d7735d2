from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.finetune.toys import CLASSES, Points, Toy, ToyConfig, accuracy
from tests.train.conftest import in_process, on_ranks
from vlbench.core.config import override
from vlbench.core.errors import RunError, UserError
from vlbench.finetune.conduct import BEGUN_ANEW, Conduct, conducted
from vlbench.finetune.folder import work_folder
from vlbench.finetune.run import Tuned, finetune
from vlbench.models.weights import read_weights
from vlbench.train.distributed import Ranks, session
from vlbench.train.progress import Silent

HELD_OUT = Points(50, seed=1)


def judged(module: torch.nn.Module) -> float:
    assert not module.training, "the judge sees the model in evaluation mode"
    assert not torch.is_grad_enabled()
    torch.rand(3)  # whatever it draws changes nothing of the training
    return accuracy(module, HELD_OUT)


def tune(folder: Path, *changes: str, judge: Any = judged, **words: Any) -> Tuned:
    config = override(ToyConfig(), changes)
    return finetune(Toy(), config, feed=Points(), judge=judge, folder=folder, device="cpu", **words)


def weights(tuned: Tuned) -> dict[str, torch.Tensor]:
    return read_weights(tuned.weights)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[Any] = []

    def record(self, record: Any) -> None:
        self.records.append(record)

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return tune(tmp_path_factory.mktemp("whole"))


def test_it_learns_and_returns_the_chosen_model(whole: Tuned) -> None:
    assert [line["step"] for line in whole.history] == [4, 8, 12]
    best = max(whole.history, key=lambda line: line["value"])
    assert (whole.step, whole.value, whole.learning_rate) == (best["step"], best["value"], 0.05)
    assert accuracy(whole.module, HELD_OUT) == whole.value > 0.5
    assert not whole.module.training
    assert same(weights(whole), dict(whole.module.state_dict()))
    assert whole.assets == {"names": "\n".join(CLASSES).encode()}
    assert whole.seconds > 0


def test_a_finished_folder_is_not_trained_again(whole: Tuned) -> None:
    def never(module: torch.nn.Module) -> float:
        raise AssertionError("judged again")

    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()}
    again = tune(whole.folder, "workers=3", "log_every=7", judge=never)  # neither moves a weight
    assert (again.step, again.value, again.history, again.seconds, again.assets) == (
        whole.step,
        whole.value,
        whole.history,
        whole.seconds,
        whole.assets,
    )
    assert same(dict(again.module.state_dict()), dict(whole.module.state_dict()))
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()} == before
    assert not list(whole.folder.rglob("ckpt.pt")), "what only a resume needs is gone"


def test_a_finished_folder_whose_weights_are_damaged_is_made_again(whole: Tuned, tmp_path: Path) -> None:
    tuned = tune(tmp_path)
    tuned.weights.write_bytes(tuned.weights.read_bytes()[:-1])
    assert same(weights(tune(tmp_path)), weights(whole))
    (tmp_path / "tuned.json").write_text("{")
    assert same(weights(tune(tmp_path)), weights(whole))
    (tmp_path / "assets.safetensors").unlink()
    assert tune(tmp_path).assets == whole.assets


def test_the_folder_of_another_fine_tuning_is_refused(whole: Tuned) -> None:
    with pytest.raises(UserError, match="holds a fine-tuning with another config; delete the folder"):
        tune(whole.folder, "steps=13")
    with pytest.raises(UserError, match="another data"):
        finetune(Toy(), ToyConfig(), feed=Points(seed=5), judge=judged, folder=whole.folder, device="cpu")


def test_killed_and_resumed_gives_the_same_bits_and_the_same_choice(whole: Tuned, tmp_path: Path) -> None:
    """SIGKILL at moments that the process did not choose."""
    for wanted in (3, 8):

        def once() -> None:
            tune(tmp_path, judge=lambda module: (time.sleep(0.3), judged(module))[1])

        process = in_process(once)
        path = tmp_path / "lr-0.05" / "ckpt.pt"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.is_alive():
            if path.is_file() and torch.load(path, weights_only=True)["step"] >= wanted:
                break
            time.sleep(0.01)
        assert process.is_alive(), "the run ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    tuned = tune(tmp_path)
    assert same(weights(tuned), weights(whole))
    assert (tuned.step, tuned.value, tuned.history) == (whole.step, whole.value, whole.history)


@pytest.mark.parametrize("at", [4, 12])
def test_killed_between_checkpoint_and_judgement_judges_first(whole: Tuned, tmp_path: Path, at: int) -> None:
    """At step 12 the run itself is finished, and only the judgement and the choice are left to do."""
    calls = []

    def dies(module: torch.nn.Module) -> float:
        calls.append(1)
        if len(calls) == at // 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return judged(module)

    process = in_process(lambda: tune(tmp_path, judge=dies))
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "lr-0.05" / "ckpt.pt", weights_only=True)["step"] == at
    tuned = tune(tmp_path)
    assert same(weights(tuned), weights(whole))
    assert (tuned.step, tuned.history) == (whole.step, whole.history)


def test_data_that_were_moved_are_the_same_data(whole: Tuned, tmp_path: Path) -> None:
    def begin() -> None:
        def dies(module: torch.nn.Module) -> float:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        tune(tmp_path, judge=dies)

    process = in_process(begin)
    process.join(timeout=60)
    moved = Points()
    moved.spec = "elsewhere/points"

    def again() -> Tuned:
        return finetune(Toy(), ToyConfig(), feed=moved, judge=judged, folder=tmp_path, device="cpu")

    assert again().history == whole.history, "half done"
    assert same(weights(again()), weights(whole)), "finished"


def test_killed_after_the_best_weights_and_before_the_note_of_it(whole: Tuned, tmp_path: Path) -> None:
    def dies() -> None:
        import vlbench.finetune.run as run

        def never(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        run.write_judgements = never
        tune(tmp_path)

    process = in_process(dies)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "lr-0.05" / "best.safetensors").is_file()
    assert not (tmp_path / "lr-0.05" / "judged.jsonl").exists()
    assert same(weights(tune(tmp_path)), weights(whole))


def test_the_best_step_is_kept_and_not_the_last(tmp_path: Path) -> None:
    values = iter([0.3, 0.9, 0.9])
    seen: list[dict[str, torch.Tensor]] = []

    def judge(module: torch.nn.Module) -> float:
        seen.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return next(values)

    best = tune(tmp_path / "best", judge=judge)
    assert (best.step, best.value) == (8, 0.9), "the earlier of two that are as good"
    assert same(weights(best), seen[1])
    assert not same(seen[1], seen[2])
    values = iter([0.3, 0.9, 0.2])
    last = tune(tmp_path / "last", "select=last", judge=judge)
    assert (last.step, last.value) == (12, 0.2)
    assert same(weights(last), seen[-1])


def test_without_a_judge_the_last_step_is_taken(whole: Tuned, tmp_path: Path) -> None:
    heard = Heard()
    tuned = tune(tmp_path, "select=last", judge=None, watcher=heard)
    assert (tuned.step, tuned.value) == (12, None)
    assert [line["step"] for line in tuned.history] == [12]
    assert not any("held-out" in line for line in heard.lines)
    judged_too = tune(tmp_path / "judged", "select=last")
    assert same(weights(tuned), weights(judged_too))
    with pytest.raises(AssertionError, match="who chooses looks at held-out data"):
        tune(tmp_path / "best", judge=None)


def test_what_another_number_of_processes_began_starts_anew(whole: Tuned, tmp_path: Path) -> None:
    def dies(module: torch.nn.Module) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    process = in_process(lambda: tune(tmp_path, judge=dies))
    process.join(timeout=60)
    path = tmp_path / "lr-0.05" / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["train"]["world"] == 1
    saved["train"]["world"] = 2
    torch.save(saved, path)
    heard = Heard()
    tuned = tune(tmp_path, watcher=heard)
    assert f"{path} was begun by 2 processes: from the beginning" in heard.lines
    assert same(weights(tuned), weights(whole))
    assert tuned.history == whole.history


def test_search_takes_the_rate_that_is_best_on_held_out_data(tmp_path: Path) -> None:
    values = iter([0.1, 0.5, 0.2, 0.3, 0.6, 0.4, 0.6, 0.5, 0.1])
    heard = Heard()
    tuned = tune(tmp_path, "search=[0.1, 1, 3]", judge=lambda module: next(values), watcher=heard)
    assert (tuned.learning_rate, tuned.step, tuned.value) == (0.05, 8, 0.6), "the first of two that are as good"
    rates = [line["learning_rate"] for line in tuned.history]
    assert rates == pytest.approx([0.005] * 3 + [0.05] * 3 + [0.15] * 3)
    assert heard.lines[0] == "learning rate 0.005 (1 of 3)"
    assert [record["step"] for record in heard.records] == [4, 8, 12] * 3
    values = iter([0.3, 0.6, 0.4])
    alone = tune(tmp_path / "alone", judge=lambda module: next(values))
    assert same(weights(tuned), weights(alone)), "a run of the search is the run of that rate"


def test_a_rate_that_diverges_is_out_of_the_search(tmp_path: Path) -> None:
    heard = Heard()
    tuned = tune(tmp_path, "search=[1, 1e38]", "optim.name=sgd", watcher=heard)
    assert tuned.learning_rate == 0.05
    assert any("is out: step" in line and "not finite" in line for line in heard.lines)
    with pytest.raises(RunError, match="not finite"):
        tune(tmp_path / "none", "search=[1e38, 2e38]", "optim.name=sgd")


def test_a_loss_that_is_not_finite_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not finite") as error:
        tune(tmp_path, "optim.lr=1e38", "optim.name=sgd")
    assert "\n" not in str(error.value)


def test_a_judgement_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the value on held-out data is nan after 4 steps"):
        tune(tmp_path, judge=lambda module: float("nan"))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    def second(module: torch.nn.Module) -> float:
        with pytest.raises(UserError, match="is in use: another process"):
            tune(tmp_path)
        return 1.0

    assert tune(tmp_path, judge=second).value == 1.0


def test_conducted_trains_anew_talks_and_says_where(tmp_path: Path) -> None:
    import contextlib

    heard = Heard()
    tune(tmp_path)
    with conducted(Conduct(anew=True, watch=lambda steps, batch: contextlib.nullcontext(heard))) as conduct:
        tuned = tune(tmp_path)
    assert conduct.folders == [tmp_path]
    assert len(heard.records) == 3
    assert any("on held-out data, the best so far" in line for line in heard.lines)
    with conducted(Conduct(watch=lambda steps, batch: contextlib.nullcontext(heard))):
        assert tune(tmp_path).value == tuned.value
    assert len(heard.records) == 3, "finished: nothing to follow"


def _begin(folder: Path, conduct: Conduct | None, *, judgements: int = 1) -> None:
    """A call that is killed when it judges for the ``judgements``-th time."""
    calls = []

    def dies(module: torch.nn.Module) -> float:
        calls.append(1)
        if len(calls) == judgements:
            os.kill(os.getpid(), signal.SIGKILL)
        return judged(module)

    def call() -> None:
        with conducted(conduct or Conduct()):
            tune(folder, judge=dies)

    process = in_process(call)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL


def _again(folder: Path, conduct: Conduct) -> tuple[Tuned, Heard]:
    heard = Heard()
    with conducted(conduct):
        return tune(folder, watcher=heard), heard


@pytest.mark.parametrize("before", ["finished", "half done"])
def test_a_killed_call_that_trains_anew_is_gone_on_with_by_the_next(whole: Tuned, tmp_path: Path, before: str) -> None:
    if before == "finished":
        tune(tmp_path)
    else:
        _begin(tmp_path, None, judgements=2)
    _begin(tmp_path, Conduct(anew=True), judgements=2)
    tuned, heard = _again(tmp_path, Conduct(anew=True))
    assert f"going on with what was begun anew; to begin at step 0, delete {tmp_path}" in heard.lines
    assert "resuming from step 8 of 12" in heard.lines
    assert [record["step"] for record in heard.records] == [12], "what it began was not forgotten, what was before was"
    assert same(weights(tuned), weights(whole))
    assert tuned.history == whole.history
    _, heard = _again(tmp_path, Conduct(anew=True))
    assert [record["step"] for record in heard.records] == [4, 8, 12], "that call has ended: a new one trains anew"


def test_another_rank_does_not_say_that_the_first_one_is_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / BEGUN_ANEW).touch()
    for rank in (1, 0):
        monkeypatch.setattr("vlbench.finetune.conduct.ranks", lambda rank=rank: Ranks(rank, 2))
        with conducted(Conduct(anew=True, folders=[tmp_path])):
            pass
        assert (tmp_path / BEGUN_ANEW).is_file() == (rank == 1)


def test_what_was_half_done_is_forgotten_by_a_call_that_trains_anew(tmp_path: Path) -> None:
    _begin(tmp_path, None, judgements=2)
    _, heard = _again(tmp_path, Conduct(anew=True))
    assert [record["step"] for record in heard.records] == [4, 8, 12]


def test_a_call_that_was_killed_after_its_training_finds_it_done(tmp_path: Path) -> None:
    def call() -> None:
        with conducted(Conduct(anew=True)):
            tune(tmp_path)
            os.kill(os.getpid(), signal.SIGKILL)

    process = in_process(call)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    _, heard = _again(tmp_path, Conduct(anew=True))
    assert not heard.records


def test_a_model_whose_code_may_have_changed_begins_at_step_0(tmp_path: Path) -> None:
    _begin(tmp_path, Conduct(anew=True, forgets=True), judgements=2)
    _, heard = _again(tmp_path, Conduct(anew=True, forgets=True))
    assert [record["step"] for record in heard.records] == [4, 8, 12]


def test_one_call_trains_a_folder_anew_once(tmp_path: Path) -> None:
    """It may ask a second time: in another precision."""
    made: list[Path] = []
    assert len(_again(tmp_path, Conduct(anew=True, forgets=True, folders=made))[1].records) == 3
    assert made == [tmp_path]
    assert not _again(tmp_path, Conduct(anew=True, forgets=True, folders=made))[1].records
    assert made == [tmp_path]


def test_backbone_lr_slows_the_tower_alone(tmp_path: Path) -> None:
    """Plain SGD without momentum: a tower's step is proportional to its factor."""
    words = ("steps=1", "optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "schedule.warmup=0", "dropout=0")
    trained = ("backbone=trained", "backbone_lr=0.25")
    at_start = Toy().build(ToyConfig(), CLASSES)  # for the names
    full = weights(tune(tmp_path / "full", *words))
    slow = weights(tune(tmp_path / "slow", *words, *trained))
    start = _start(tmp_path / "start", words)
    for name in at_start.state_dict():
        ratio = 0.25 if name.startswith("visual") else 1.0
        torch.testing.assert_close(slow[name] - start[name], ratio * (full[name] - start[name]), rtol=1e-4, atol=1e-7)
    assert not torch.equal(full["visual.layer.weight"], start["visual.layer.weight"])


def _start(folder: Path, words: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return weights(tune(folder, *words, "optim.lr=1e-30"))


def test_frozen_parameters_stay_and_have_no_optimizer_state(tmp_path: Path) -> None:
    class Frozen(Toy):
        def build(self, config: Any, classes: Any) -> torch.nn.Module:
            module = super().build(config, classes)
            module.visual.requires_grad_(False)
            return module

    def run(folder: Path, lr: float) -> dict[str, torch.Tensor]:
        config = override(ToyConfig(), [f"optim.lr={lr}"])
        return weights(finetune(Frozen(), config, feed=Points(), judge=judged, folder=folder, device="cpu"))

    one, other = run(tmp_path / "one", 0.05), run(tmp_path / "other", 0.01)
    assert torch.equal(one["visual.layer.weight"], other["visual.layer.weight"])
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_two_ranks_give_the_weights_of_one_in_float64(tmp_path: Path) -> None:
    """No dropout, whose masks belong to a rank. A batch cut into parts as well."""
    plain = ("dropout=0", "search=[1, 3]")

    def once(folder: Path, *more: str) -> Tuned:
        return finetune(
            Toy(torch.float64),
            override(ToyConfig(), [*plain, *more]),
            feed=Points(dtype=torch.float64),
            judge=lambda module: accuracy(module, Points(50, seed=1, dtype=torch.float64)),
            folder=folder,
            device="cpu",
        )

    def rank(out: str, *more: str) -> None:
        with session("cpu"):
            tuned = once(tmp_path / out, *more)
            assert tuned.value > 0.5
            found = {name: tensor.tolist() for name, tensor in tuned.module.state_dict().items()}
            (tmp_path / f"{out}-{os.environ['RANK']}.json").write_text(json.dumps([tuned.step, tuned.value, found]))

    one = once(tmp_path / "one")
    for out, more in (("two", ()), ("parts", ("accumulate=2",))):
        on_ranks(rank, out, *more)
        for number in (0, 1):
            step, value, found = json.loads((tmp_path / f"{out}-{number}.json").read_text())
            assert (step, value) == (one.step, one.value)
            for name, tensor in one.module.state_dict().items():
                torch.testing.assert_close(
                    torch.tensor(found[name], dtype=torch.float64), tensor, rtol=1e-12, atol=1e-12
                )


def test_an_error_of_the_judge_reaches_every_rank(tmp_path: Path) -> None:
    def rank() -> None:
        with session("cpu"), pytest.raises(RunError if os.environ["RANK"] == "1" else ZeroDivisionError) as error:
            tune(tmp_path, judge=lambda module: 1 / 0)
        (tmp_path / f"said{os.environ['RANK']}").write_text(str(error.value))

    on_ranks(rank)
    assert (tmp_path / "said1").read_text() == "ZeroDivisionError: division by zero"


def test_work_folder_follows_what_decides_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path))
    words = {"backbone": "b", "adapter": "vqa", "data_key": "d"}

    def folder(config: ToyConfig | None = None, **changes: str) -> Path:
        return work_folder("resnet 50", config=config or ToyConfig(), **(words | changes))

    plain = folder()
    assert plain.parent == tmp_path / "finetune"
    assert plain.name.startswith("resnet-50-vqa-")
    assert folder(config=ToyConfig(workers=5, log_every=3, checkpoint_every=2)) == plain
    others = [folder(backbone="c"), folder(adapter="nlvr2"), folder(data_key="e"), folder(config=ToyConfig(seed=1))]
    assert len({plain, *others}) == 5
