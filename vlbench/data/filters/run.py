"""The steps of a filter run, in order; each leaves its result on the disk and is left out where that is there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from vlbench.data.filters import near
from vlbench.data.filters.job import Job, finished_report, opened_state
from vlbench.data.filters.pool import Step, work_off
from vlbench.data.filters.report import write_removed, write_report
from vlbench.data.filters.scan import scan_shard
from vlbench.data.filters.tables import frequency_floor
from vlbench.data.filters.verdict import Counted, judge_shard

Progress: TypeAlias = "Callable[[str, int, int], None]"
"""Called with what is being done, and how much of how much is finished."""
Neighbours: TypeAlias = "Callable[[Job, Sequence[int]], None]"
"""Leaves the near-duplicates (``near.save_neighbours``) of the shards of these numbers."""


def run_filter(
    job: Job,
    *,
    workers: int = 1,
    keep_state: bool = False,
    progress: Progress | None = None,
    neighbours: Neighbours | None = None,
) -> dict[str, Any]:
    """Filter the shards of ``job`` into its folder, and return the report.

    What a killed call has left is gone on with; what a finished one has left is reported again.

    Args:
        job: what is asked for.
        workers: processes; the output does not depend on how many.
        keep_state: leave the state files when all is done.
        progress: told how far each step has come.
        neighbours: finds near-duplicates in another way than by perceptual hashes.

    Raises:
        UserError: for a cut shard, a broken evaluation image, a folder that is not for this, or one that holds a run
            of another call or source.
        RunError: where a worker was killed.
    """
    report = finished_report(job)
    if report is not None:
        shutil.rmtree(job.state, ignore_errors=True)  # of a call that was killed while it cleaned up
        return report
    with opened_state(job):
        every = range(len(job.shards))

        def run(step: Step, what: str, tasks: Sequence[tuple[Any, ...]]) -> None:
            told = None if progress is None else lambda done, total: progress(what, done, total)
            work_off(step, job, tasks, workers=workers, done=told)

        run(scan_shard, "reading", [(number,) for number in every if not job.scanned(number).is_file()])
        parts = {name: table.partitions(job.memory) for name, table in job.tables.items()}
        ranges = [(name, part, parts[name]) for name in parts for part in range(parts[name])]
        run(_merge, "counting", [task for task in ranges if not job.tables[task[0]].is_merged(*task[1:])])
        if job.config.uses("near-duplicate"):
            near.save_names(job)
            unmatched = [number for number in every if not job.neighbours(number).is_file()]
            if neighbours is not None:
                neighbours(job, unmatched)
            else:
                run(near.hash_images, "hashing evaluation images", near.hash_tasks(job))
                run(near.match_hashes, "comparing", [(number,) for number in unmatched])
        histogram = job.tables["ngrams"].histogram(parts["ngrams"]) if "ngrams" in job.tables else {}
        counted = Counted(parts, frequency_floor(histogram, job.config.top_ngrams))
        tasks = [(number, counted) for number in every if not job.judged(number).is_file()]
        run(judge_shard, "writing", tasks)
        write_removed(job)
        report = write_report(job, counted)
        _clean(job, keep_state=keep_state)
    return report


def _merge(job: Job, table: str, part: int, parts: int) -> None:
    job.tables[table].merge(part, parts)


def _clean(job: Job, *, keep_state: bool) -> None:
    for left in job.target.glob(".*.tmp"):  # of a call that was killed while it wrote the report
        left.unlink()
    if keep_state:
        for left in job.state.rglob(".*.tmp"):
            left.unlink()
        return
    # First what says that there is something to go on with: the report alone then says that all is done.
    (job.state / "call.json").unlink()
    with contextlib.suppress(OSError):
        shutil.rmtree(job.state)
