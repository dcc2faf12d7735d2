from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.conftest import in_process
from vlbench.cli import main
from vlbench.core.errors import UserError
from vlbench.core.types import Result
from vlbench.store.results import ResultStore
from vlbench.verbs.crew import Crew, joined, own_device

MODEL = "tests.verbs.conv_backbone"
TASKS = "zeroshot,linear,knn,retrieval"
ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"amber": (230, 150, 30), "green": (30, 180, 60), "violet": (140, 60, 200)}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 noisy images of three classes, each with two captions, in open_clip's CSV."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    lines = ["filepath\ttitle\tlabel"]
    for number in range(45):
        name, rgb = list(COLOURS.items())[number % 3]
        pixels = np.clip(np.array(rgb) + rng.normal(0, 90, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines += [f"{number}.png\ta photo of {name}, number {number}\t{name}", f"{number}.png\t{name} {number}\t{name}"]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def _words(table: Path, folder: Path, *, model: str = "build", tasks: str = TASKS) -> list[str]:
    words = ["eval", "--model", f"{MODEL}:{model}", "--tasks", tasks, "--data", f"csv:{table}?label=label"]
    return [*words, "--results", str(folder / "results"), "--device", "cpu", "--workers", "0"]


def _run(table: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Result]:
    """In this process, alone."""
    monkeypatch.setenv("VLBENCH_CACHE", str(folder / "cache"))
    assert main([*_words(table, folder), *more]) == 0
    return _stored(folder)


def _together(words: list[str], folder: Path) -> tuple[list[int | None], list[str]]:
    """Two processes as torchrun would start them: their exit statuses, and what each printed."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    env["VLBENCH_CACHE"] = str(folder / "cache")

    def body(rank: int) -> None:
        with (folder / f"said{rank}").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.stdout = sys.stderr = said
            status = main(words)
        os._exit(status)

    started = [in_process(body, rank, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    for process in started:
        process.join(timeout=120)
    return [process.exitcode for process in started], [(folder / f"said{rank}").read_text() for rank in (0, 1)]


def _stored(folder: Path) -> dict[str, Result]:
    return {result.task: result for result in ResultStore(folder / "results").all()}


def _numbers(results: dict[str, Result]) -> dict[str, object]:
    return {name: (result.estimates, result.chosen, result.chance) for name, result in results.items()}


def _shards(folder: Path) -> list[tuple[str, np.ndarray]]:
    """(kind of table, digests) of every shard."""
    found = []
    for path in (folder / "cache").rglob("shard-*.npz"):
        kind = "images" if '"images"' in (path.parent / "meta.json").read_text() else "texts"
        found.append((kind, np.load(path)["digests"]))
    return found


@pytest.fixture(scope="module")
def alone(table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        return _run(table, folder, patch)


def test_two_processes_give_the_numbers_of_one_and_encode_everything_once(
    table: Path, tmp_path: Path, alone: dict[str, Result]
) -> None:
    statuses, said = _together(_words(table, tmp_path), tmp_path)
    assert statuses == [0, 0], said
    assert said[1] == "", "only the first process talks"
    assert "images: 45 encoded" in said[0]
    found = _stored(tmp_path)
    assert set(found) == {"zeroshot/list", "linear/list", "knn/list", "retrieval/list"}
    assert _numbers(found) == _numbers(alone)
    assert {result.settings["processes"] for result in found.values()} == {2}
    assert found["linear/list"].estimates["acc1"].value > 0.3
    for kind, count in (("images", 45), ("texts", None)):
        digests = [digest for which, names in _shards(tmp_path) if which == kind for digest in names.tolist()]
        assert len(digests) == len(set(digests)), f"{kind}: one was encoded twice"
        assert count is None or len(digests) == count
        sizes = sorted(len(names) for which, names in _shards(tmp_path) if which == kind)
        assert len(sizes) >= 2, f"{kind}: one process encoded all"


def test_no_store_shares_a_folder_that_does_not_stay(
    table: Path, tmp_path: Path, alone: dict[str, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    statuses, said = _together([*_words(table, tmp_path), "--no-store"], tmp_path)
    assert statuses == [0, 0], said
    assert _numbers(_stored(tmp_path)) == _numbers(alone)
    assert not _shards(tmp_path)
    assert not list((tmp_path / "tmp").glob("vlbench-*"))


def test_a_bad_image_in_the_others_share_fails_the_task_with_one_line(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for split, count in (("train", 4), ("test", 6)):
        for name in ("amber", "green"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((8, 8, 3), number * 9 + 90 * (name == "green"), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    (folder / "test" / "green" / "5.png").write_bytes(b"this is text")  # the last, so in the second share
    words = ["eval", "--model", f"{MODEL}:build", "--tasks", "knn,zeroshot", "--data", f"imagefolder:{folder}"]
    words += ["--results", str(tmp_path / "results"), "--device", "cpu", "--workers", "0"]
    statuses, said = _together(words, tmp_path)
    assert statuses == [1, 1], said
    assert said[1] == ""
    (line,) = [line for line in said[0].splitlines() if line.startswith("FAILED knn")]
    assert "5.png" in line
    assert line.endswith("(process 1 of 2)")


def test_a_wrong_word_ends_both_with_one_line(table: Path, tmp_path: Path) -> None:
    statuses, said = _together(_words(table, tmp_path, model="no_such_function"), tmp_path)
    assert statuses == [2, 2]
    assert said[1] == ""
    assert len(said[0].splitlines()) == 1


def test_a_process_that_dies_ends_the_other_soon(table: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    statuses, said = _together([*_words(table, tmp_path, model="build_dying"), "--batch-size", "2"], tmp_path)
    assert time.monotonic() - began < 60
    assert statuses == [1, -9]
    assert "a process that torchrun started is gone" in said[0]
    assert "Traceback" not in said[0]


@pytest.mark.parametrize("batch_size", ["1", "7", "64"])
def test_batch_size_and_the_store_change_no_number(
    table: Path, tmp_path: Path, alone: dict[str, Result], monkeypatch: pytest.MonkeyPatch, batch_size: str
) -> None:
    """Fresh features, and the same read back: each estimate to the last digit."""
    words = ("--batch-size", batch_size)
    assert _numbers(_run(table, tmp_path, monkeypatch, *words)) == _numbers(alone)
    assert _numbers(_run(table, tmp_path, monkeypatch, *words, "--force")) == _numbers(alone)
    assert _numbers(_run(table, tmp_path, monkeypatch, *words, "--force", "--no-store")) == _numbers(alone)


@pytest.mark.slow
def test_torchrun_starts_it(table: Path, tmp_path: Path, alone: dict[str, Result]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "vlbench"]
    env = {**os.environ, "VLBENCH_CACHE": str(tmp_path / "cache")}
    words = [*launcher, *_words(table, tmp_path, tasks="knn,zeroshot")]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^model: towers", done.stdout, re.MULTILINE)) == 1
    expected = _numbers(alone)
    assert _numbers(_stored(tmp_path)) == {name: expected[name] for name in ("knn/list", "zeroshot/list")}


def test_shares_cover_everything_once() -> None:
    keys = [str(number) for number in range(11)]
    for world in (1, 2, 3, 16):
        shares = [list(Crew(rank, world).share(keys)) for rank in range(world)]
        assert [key for share in shares for key in share] == keys
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_gpu_for_all_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert own_device("cpu") == "cpu"
    with pytest.raises(UserError, match="--device cuda:1: every process of torchrun would take this one"):
        own_device("cuda:1")


def test_a_world_size_without_a_rank_is_not_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler sets WORLD_SIZE for processes that know nothing of one another."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert own_device("cuda:1") == "cuda:1"
    with joined() as crew:
        assert (crew.rank, crew.world) == (0, 1)


def test_processes_that_do_not_find_one_another_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["eval", "--model", f"{MODEL}:build", "--tasks", "knn", "--data", "shapes"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the processes that torchrun started do not find one another" in line


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlbench.verbs.session import _make_current

    taken: list[str] = []
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    for device in ("cpu", "cuda", "cuda:1"):
        _make_current(device)
    assert taken == ["cuda:1"]
