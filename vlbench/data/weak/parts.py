"""Long work in parts, each on disk when it is done, so that a killed run goes on where it was.

The folder's name holds a fingerprint of all that decides the parts: a run with other settings or data never meets
them. Parts are renamed into place whole; the folder goes when the work is finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlbench.core.files import atomic_writer


class Parts:
    """Named arrays in a folder.

    Args:
        out: the file that the parts will become; their folder lies beside it.
        key: the fingerprint.

    Attributes:
        found: how many parts were there before and were not made again.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.folder = out.parent / f".{out.name}.{key}.parts"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found = 0

    def array(self, name: str, make: Callable[[], Any]) -> Any:
        """The array ``name``, mapped into memory; made now if it is not there."""
        path = self.folder / f"{name}.npy"
        if path.exists():
            self.found += 1
        else:
            with atomic_writer(path) as handle:
                np.save(handle, make(), allow_pickle=False)
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def remove(self) -> None:
        """The work is finished: nothing of it is needed any more."""
        shutil.rmtree(self.folder)
