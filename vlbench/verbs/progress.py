"""How far work over images has come: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

EVERY_SECONDS = 10.0


class EncodingProgress:
    """Called with ``(done, total)`` images. Writes to stderr, so that results can be piped.

    Args:
        what: is done to them.
    """

    def __init__(self, what: str = "encoding") -> None:
        self._what = what
        self._bar: Any = None
        self._task: Any = None
        self._began: float | None = None
        self._last_line = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` images are done; equal numbers end the showing."""
        now = time.monotonic()
        if self._began is None:
            self._began = self._last_line = now
        if sys.stderr.isatty():
            self._show_bar(done, total)
        elif now - self._last_line >= EVERY_SECONDS:
            self._last_line = now
            rate = done / max(now - self._began, 1e-9)
            left = (total - done) / max(rate, 1e-9)
            print(f"  {self._what} {done:,} of {total:,} images, {rate:,.0f}/s, {left:,.0f} s left", file=sys.stderr)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End what is shown, finished or not."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = self._began = None

    def _show_bar(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (
                TextColumn(f"  {self._what}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._what, total=total, rate="")
            self._bar.start()
        assert self._began is not None, "the bar is shown before the clock was started"
        rate = done / max(time.monotonic() - self._began, 1e-9)
        self._bar.update(self._task, completed=done, rate=f"{rate:,.0f}/s")
