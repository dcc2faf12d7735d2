"""Work on numbered pieces over several processes; what comes out does not depend on how many."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeAlias

from vlbench.core.errors import RunError

Step: TypeAlias = "Callable[..., None]"
"""A module-level function of the job and the words of one task."""

_job: Any = None
_WATCH_SECONDS = 0.2


def work_off(
    step: Step,
    job: Any,
    tasks: Sequence[tuple[Any, ...]],
    *,
    workers: int,
    done: Callable[[int, int], None] | None = None,
) -> None:
    """Call ``step(job, *task)`` for every task.

    Args:
        step: leaves its result on the disk.
        job: handed to the processes once, when they are forked.
        tasks: arguments, a tuple each.
        workers: processes; with 1 or less the work is done in this one.
        done: called with ``(finished, all)`` tasks after each.

    Raises:
        RunError: where a process was killed (out of memory, mostly); whatever else ``step`` raises.
    """
    if workers <= 1 or len(tasks) <= 1:
        for number, task in enumerate(tasks, start=1):
            step(job, *task)
            if done is not None:
                done(number, len(tasks))
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_begin, initargs=(job, os.getpid()))
    waiting = deque(tasks)
    running: set[Future[None]] = set()
    finished = 0
    try:
        while finished < len(tasks):
            # A few in the queue for each process, not all: a task may be one of a hundred thousand.
            while waiting and len(running) < 4 * workers:
                running.add(pool.submit(_call, step, waiting.popleft()))
            ready, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ready:
                future.result()
                finished += 1
                if done is not None:
                    done(finished, len(tasks))
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed, out of memory perhaps; run this again to go on where it was, with fewer "
            "--workers or less --memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(job: Any, parent: int) -> None:
    """What a worker does first: keep the job, and see to it that it ends when the process that made it does."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and without a traceback
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    # A killed parent says nothing; without this its workers would wait for work, and hold the folder's lock, for ever.
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _call(step: Step, task: tuple[Any, ...]) -> None:
    step(_job, *task)
