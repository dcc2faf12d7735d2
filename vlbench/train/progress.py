"""What a person sees of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_WORTH_SAYING = 0.1


class Watcher(Protocol):
    """Who follows a run."""

    def step(self, done: int, *, loss: float, images_per_second: float) -> None:
        """After every step."""

    def record(self, record: Mapping[str, Any]) -> None:
        """After every line of the log."""

    def say(self, text: str) -> None:
        """A remark."""


class Silent:
    """Nobody looks."""

    def step(self, done: int, *, loss: float, images_per_second: float) -> None:
        """Nothing."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


class _Lines(Silent):
    def __init__(self, console: Console, total: int, batch_size: int) -> None:
        self._console = console
        self._total = total
        self._batch_size = batch_size

    def record(self, record: Mapping[str, Any]) -> None:
        left = (self._total - record["step"]) * self._batch_size / max(record["images_per_second"], 1e-9)
        self.say(
            f"step {record['step']}/{self._total}  loss {record['loss']:.4f}  lr {record['lr']:.2e}"
            f"  {record['images_per_second']:.0f} images/s{_waiting(record)}  {_minutes(left)} left"
        )

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Live(Silent):
    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress = progress
        self._task = task

    def step(self, done: int, *, loss: float, images_per_second: float) -> None:
        self._progress.update(self._task, completed=done, loss=loss, rate=images_per_second)

    def record(self, record: Mapping[str, Any]) -> None:
        self._progress.update(self._task, waiting=_waiting(record))

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def watch(total: int, batch_size: int, *, console: Console | None = None) -> Iterator[Watcher]:
    """Follow a run of ``total`` steps of ``batch_size`` images on ``console`` (default: standard error)."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, total, batch_size)
        return
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} images/s{task.fields[waiting]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        yield _Live(progress, progress.add_task("train", total=total, loss=float("nan"), rate=0.0, waiting=""))


def _waiting(record: Mapping[str, Any]) -> str:
    """The share of the time that went by waiting for data, where it is worth a word: more workers would help."""
    share = record.get("data_wait", 0.0)
    return f"  {share:.0%} waiting for data" if share >= _WORTH_SAYING else ""


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
