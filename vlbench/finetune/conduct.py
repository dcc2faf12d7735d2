"""What a call wants of its fine-tunings, for whoever starts them.

An adapter knows neither the words of the call nor a terminal, and its protocol has no place for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from vlbench.train.progress import Watcher


@dataclass
class Conduct:
    """How a caller wants the fine-tunings of a block to go, whoever starts them: see ``conducted``."""

    anew: bool = False
    """Train again what is finished, and forget what is half done."""
    watch: Callable[[int, int], contextlib.AbstractContextManager[Watcher]] | None = None
    """``train.progress.watch`` or its like; None: in silence."""
    folders: list[Path] = field(default_factory=list)
    """Where the fine-tuned models of the block are; filled by ``finetune``."""


_CONDUCT: ContextVar[Conduct | None] = ContextVar("vlbench-finetune", default=None)


@contextlib.contextmanager
def conducted(conduct: Conduct) -> Iterator[Conduct]:
    """Every ``finetune`` of the block goes as ``conduct`` says."""
    token = _CONDUCT.set(conduct)
    try:
        yield conduct
    finally:
        _CONDUCT.reset(token)


def current() -> Conduct:
    """The conduct of the block that one is in; a plain one outside of any."""
    return _CONDUCT.get() or Conduct()
