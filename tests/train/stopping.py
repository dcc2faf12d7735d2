"""A run that ends before its time."""

from __future__ import annotations

from typing import Any

from vlbench.train.progress import Silent


class Stop(Exception):
    """As good as a power cut, but in this process."""


class StopAt(Silent):
    """Stops a run after so many steps, before anything of that step is logged or saved; and keeps what was said."""

    def __init__(self, step: int) -> None:
        self.last = step
        self.said: list[str] = []

    def step(self, done: int, **_: Any) -> None:
        if done == self.last:
            raise Stop

    def say(self, text: str) -> None:
        self.said.append(text)
