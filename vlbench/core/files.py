"""Writing files so that a reader, or a killed writer, never leaves half of one behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_writer(path: Path | str, *, sync: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` and rename it over ``path`` once the block ends without error.

    Args:
        path: the final place; its folder is made.
        sync: also force the bytes to the disk before the rename (checkpoints, which must survive a power cut).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
        Path(temporary).chmod(0o666 & ~_umask())  # mkstemp makes files private; results are for colleagues too
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, line ends as they are, atomically."""
    with atomic_writer(path) as handle:
        handle.write(text.encode("utf-8"))


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, read piece by piece."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
