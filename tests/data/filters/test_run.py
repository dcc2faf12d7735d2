"""A run as a whole: kills, restarts, memory, changed minds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import tracemalloc
from pathlib import Path

import pytest

from tests.data.filters import planting
from tests.data.filters.planting import evaluation_images, flat_image, plant, tree
from tests.data.making import write_files, write_tar
from vlbench.core.errors import RunError, UserError
from vlbench.data.filters import near
from vlbench.data.filters.job import Job
from vlbench.data.filters.pool import work_off
from vlbench.data.filters.run import run_filter
from vlbench.data.filters.settings import FilterConfig
from vlbench.data.filters.shards import source_shards

SHARDS = 7
SMALL_MEMORY = 64 << 10  # several ranges of keys


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return plant(300).write(tmp_path_factory.mktemp("dirty"), SHARDS)


@pytest.fixture(scope="module")
def against(tmp_path_factory) -> str:
    return evaluation_images(tmp_path_factory.mktemp("evaluation"))


def job_of(source: Path, target: Path, *against: str, memory: int = SMALL_MEMORY, **settings: object) -> Job:
    limits = {"min_side": planting.MIN_SIDE, "max_texts": planting.MAX_TEXTS, "top_ngrams": 400}
    config = FilterConfig(**limits | {"against": against} | settings)
    spec = f"wds:{source}"
    sets = tuple(near.evaluation_set(each) for each in against)
    return Job(spec, source_shards(spec), target, config, memory, removed="jsonl", against=sets)


@pytest.fixture(scope="module")
def expected(source, against, tmp_path_factory) -> dict[str, bytes]:
    """What a run that nobody disturbs leaves."""
    target = tmp_path_factory.mktemp("undisturbed") / "out"
    report = run_filter(job_of(source, target, against))
    assert 0 < report["kept"] < report["samples"]
    files = tree(target)
    assert sorted(files) == [*(f"{i:05}.tar" for i in range(SHARDS)), "removed.jsonl", "report.json"]
    return files


def die_at_rename(number: int) -> None:
    """Be killed at the ``number``-th file that would get its final name; for a process that does not come back."""
    seen = 0
    rename = Path.replace

    def counted(path: Path, target: Path) -> Path:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.replace = counted


def run_until_rename(job: Job, number: int) -> None:
    die_at_rename(number)
    run_filter(job)


def in_a_process(function, *words) -> int:
    process = multiprocessing.get_context("fork").Process(target=function, args=words)
    process.start()
    process.join()
    return process.exitcode


def test_a_run_killed_again_and_again_leaves_the_same_bytes(source, against, tmp_path, expected):
    job = job_of(source, tmp_path / "out", against)
    kills, steps = 0, set()
    # Every restart comes a few files further than the last: scan, merge, compare, write, report are all met.
    while in_a_process(run_until_rename, job, 7) == -signal.SIGKILL:
        kills += 1
        steps |= {path.name for path in job.state.iterdir() if path.is_dir()}
        assert kills < 100
    assert kills > 10
    assert steps >= {"scan", "merged", "against", "near", "judged", "removed"}
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_killed_while_it_ends_goes_on(source, against, tmp_path, expected, number):
    job = job_of(source, tmp_path / "out", against)
    run_filter(job, keep_state=True)
    assert in_a_process(run_until_rename, job, number) == -signal.SIGKILL  # call.json, removed.jsonl, report.json
    run_filter(job)
    assert tree(tmp_path / "out") == expected


def test_workers_memory_and_order_of_their_work_change_nothing(source, against, tmp_path, expected):
    for workers, memory in ((3, SMALL_MEMORY), (2, 1 << 30), (1, 1 << 20)):
        target = tmp_path / f"{workers}-{memory}"
        run_filter(job_of(source, target, against, memory=memory), workers=workers)
        assert tree(target) == expected


def test_a_killed_run_with_workers_is_gone_on_with_at_once(source, against, tmp_path, expected):
    job = job_of(source, tmp_path / "out", against)
    process = multiprocessing.get_context("fork").Process(target=run_filter, args=(job,), kwargs={"workers": 2})
    process.start()
    while not list(job.state.glob("scan/*.samples.npz")):
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    run_filter(job, workers=2)  # waits for the orphans, which hold the lock until they see that they are such
    assert tree(tmp_path / "out") == expected


def die_at_task_three(job: Path, number: int) -> None:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    (job / str(number)).touch()


def test_a_killed_worker_ends_the_run_with_one_line(tmp_path):
    with pytest.raises(RunError, match="a worker process was killed, out of memory perhaps; run this again"):
        work_off(die_at_task_three, tmp_path, [(number,) for number in range(50)], workers=2)


def fail_at_task_three(job: Path, number: int) -> None:
    if number == 3:
        raise UserError("three")


def test_an_error_in_a_worker_is_the_runs_error(tmp_path):
    with pytest.raises(UserError, match="three"):
        work_off(fail_at_task_three, tmp_path, [(number,) for number in range(50)], workers=2)


def test_a_finished_run_is_reported_again_and_not_done_again(source, against, tmp_path, expected):
    job = job_of(source, tmp_path / "out", against)
    first = run_filter(job)
    (tmp_path / "out" / "00000.tar").unlink()
    assert run_filter(job) == first == json.loads(expected["report.json"])
    assert not (tmp_path / "out" / "00000.tar").exists()
    with pytest.raises(UserError, match="holds the finished run of another call or source; name a new folder"):
        run_filter(job_of(source, tmp_path / "out", against, min_words=4))


def begun(source: Path, target: Path, *against: str, **settings: object) -> None:
    assert in_a_process(run_until_rename, job_of(source, target, *against, **settings), 20) == -signal.SIGKILL


def test_other_options_than_the_killed_runs_are_named(source, against, tmp_path):
    target = tmp_path / "out"
    begun(source, target, against)
    with pytest.raises(UserError, match=r"out: --min-side was 16 and is 17 since this run was begun; put it back"):
        run_filter(job_of(source, target, against, min_side=17))
    with pytest.raises(UserError, match=r"--against was \['imagefolder:.*'\] and is \[\]"):
        run_filter(job_of(source, target))


def test_a_source_that_changed_since_the_kill_is_named(tmp_path, against):
    source, target = plant(50).write(tmp_path / "src", 3), tmp_path / "out"
    begun(source, target, against)
    kept = (source / "00000.tar").read_bytes()
    (source / "00000.tar").write_bytes(kept + bytes(512))
    with pytest.raises(UserError, match=r"00000\.tar has changed since this run was begun"):
        run_filter(job_of(source, target, against))
    (source / "00002.tar").rename(tmp_path / "00002.tar")
    with pytest.raises(UserError, match=r"shard 00002\.tar has gone since"):
        run_filter(job_of(source, target, against))


def test_evaluation_images_that_changed_since_the_kill_are_named(source, tmp_path):
    target = tmp_path / "out"
    spec = evaluation_images(tmp_path / "evaluation")
    begun(source, target, spec)
    write_files(tmp_path / "evaluation", {"test/a/new.png": flat_image(1)})
    with pytest.raises(UserError, match=r"the evaluation set imagefolder:.* has changed since this run was begun"):
        run_filter(job_of(source, target, spec))


def test_a_cut_shard_is_got_again_and_the_run_goes_on(tmp_path):
    source, target = plant(50).write(tmp_path / "src", 3), tmp_path / "out"
    whole = (source / "00002.tar").read_bytes()
    (source / "00002.tar").write_bytes(whole[:100_000])
    with pytest.raises(UserError, match=r"00002\.tar: truncated tar: "):
        run_filter(job_of(source, target))
    cut = run_filter(job_of(source, tmp_path / "cut", allow_truncated=True))
    assert list(cut["source"]["damaged"]) == ["00002.tar"]
    (source / "00002.tar").write_bytes(whole)
    report = run_filter(job_of(source, target))
    assert report["samples"] == 50 + 331 > cut["samples"]
    assert not report["source"]["damaged"]


def test_a_second_run_on_the_folder_is_refused(source, tmp_path, monkeypatch):
    from vlbench.data.filters import job as module

    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    job = job_of(source, tmp_path / "out")
    with module.opened_state(job), pytest.raises(UserError, match="another vlbench is at work on this folder"):
        run_filter(job)


def peak_of_run(folder: Path, shards: int, a_shard: int = 60) -> int:
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for number in range(a_shard * shard, a_shard * (shard + 1)):
            text = f"{planting.clean_text(number)} number {number}"  # words that are in no other text
            members |= {f"{number:06}.png": flat_image(number), f"{number:06}.txt": text.encode()}
        write_tar(folder / "src" / f"{shard:03}.tar", members)
    job = job_of(folder / "src", folder / "out", memory=1 << 19)
    tracemalloc.start()
    report = run_filter(job)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report["samples"] == a_shard * shards
    assert report["ngrams"]["different"] > 2 * a_shard * shards
    return peak


def test_four_times_the_shards_take_no_more_memory(tmp_path):
    run_filter(job_of(plant(10).write(tmp_path / "warm", 1), tmp_path / "out"))  # what is imported on first use
    once, four_times = (peak_of_run(tmp_path / str(shards), shards) for shards in (4, 16))
    assert four_times < 1.25 * once


def test_shards_without_a_usable_sample_stay_as_empty_shards(tmp_path):
    write_tar(tmp_path / "src" / "0.tar", {"a.txt": b"no image here"})
    write_tar(tmp_path / "src" / "1.tar", {"b.png": flat_image(1), "b.txt": b"a small red car"})
    report = run_filter(job_of(tmp_path / "src", tmp_path / "out"))
    assert (report["samples"], report["kept"]) == (2, 1)
    assert len(source_shards(f"wds:{tmp_path}/out")) == 2
