"""What a call wants of its fine-tunings, for whoever starts them.

An adapter knows neither the words of the call nor a terminal, and its protocol has no place for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from vlbench.train.distributed import ranks
from vlbench.train.progress import Watcher


@dataclass
class Conduct:
    """How a caller wants the fine-tunings of a block to go, whoever starts them: see ``conducted``."""

    anew: bool = False
    """Train again what is there, finished or half done. What such a block began itself and did not end, since it was
    killed or failed, the next one goes on with."""
    forgets: bool = False
    """With ``anew``: begin at step 0 even then. What was begun may be of another model."""
    watch: Callable[[int, int], contextlib.AbstractContextManager[Watcher]] | None = None
    """``train.progress.watch`` or its like; None: in silence."""
    folders: list[Path] = field(default_factory=list)
    """Where the fine-tuned models of the block are; filled by ``finetune``. What is there before is new enough."""


BEGUN_ANEW = "begun-anew"
"""The file that marks a folder whose work a block with ``anew`` has begun, until that block ends well."""

_CONDUCT: ContextVar[Conduct | None] = ContextVar("vlbench-finetune", default=None)


@contextlib.contextmanager
def conducted(conduct: Conduct) -> Iterator[Conduct]:
    """Every ``finetune`` of the block goes as ``conduct`` says."""
    token = _CONDUCT.set(conduct)
    try:
        yield conduct
    finally:
        _CONDUCT.reset(token)
    for folder in conduct.folders if ranks().first else ():  # another rank may be through where this one fails
        (folder / BEGUN_ANEW).unlink(missing_ok=True)


def current() -> Conduct:
    """The conduct of the block that one is in; a plain one outside of any."""
    return _CONDUCT.get() or Conduct()
