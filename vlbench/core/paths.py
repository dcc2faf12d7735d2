"""Where things are: the shipped cards, the cache, the user's data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent.parent


def card_dir(kind: Literal["tasks", "reference_models"]) -> Path:
    """The folder of the shipped cards.

    An installed wheel carries them as ``vlbench/_cards/<kind>``; in a checkout they lie beside the package.
    """
    installed = _PACKAGE / "_cards" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def cache_dir() -> Path:
    """``$VLBENCH_CACHE``, else ``$XDG_CACHE_HOME/vlbench``, else ``~/.cache/vlbench``. Not created here."""
    named = os.environ.get("VLBENCH_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "vlbench"


def data_root() -> Path:
    """``$VLBENCH_DATA``, else ``./data``: where task cards look for their data sets."""
    return Path(os.environ.get("VLBENCH_DATA", "data")).expanduser()
