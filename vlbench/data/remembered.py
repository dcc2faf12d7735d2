"""Digests of images that were read before, by the state of the files that hold them.

An evaluation must know the digest of every image, and a digest takes all the bytes: 140 GB for ImageNet, whether or
not a feature is missing. So the digests of one source are kept in a file of the cache, each under the state of its
bytes: where they lie, and what the file system says of the file. Its times include the last change of state (ctime),
which nobody can set back: an edit that keeps the size and restores the time of modification is seen.

A file that changed a moment ago may change once more at the same time as its clock tells it. So a state is believed
only some seconds after the last change, as git's index does, and only where it is the same before and after the bytes
were read. What is not remembered is read; a cache that is damaged or cannot be written costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from vlbench.core.files import atomic_writer
from vlbench.core.fingerprint import fingerprint_words
from vlbench.core.paths import cache_dir
from vlbench.core.types import Source
from vlbench.data.sources import Member, Place, Subset

MARGIN_NS = 2_000_000_000
"""A state younger than this is not believed: the coarsest clocks of file systems tick every two seconds."""

_VERSION = "1"
"""Raised by any change to what a state is made of, or to what digest an image has."""
_BYTES = 16  # of a state and of a digest


class Looked(NamedTuple):
    """What is known of the bytes at one place before they are read."""

    place: Place
    state: bytes | None
    """None where it says nothing: the file is absent, or has changed just now."""
    digest: str | None
    """None where the bytes must be read."""


class RememberedDigests:
    """The digests of one source's images, from earlier runs and from this one.

    A context: what was learnt is written when it is left, also by an error. Then the file has what the source has now
    and nothing else; a part of a source (``Subset``) and a pass that was broken off add to it.
    """

    def __init__(self, source: Source) -> None:
        whole = source
        while isinstance(whole, Subset):
            whole = whole.whole
        self._is_part = whole is not source
        self._file = cache_dir() / "digests" / f"{fingerprint_words([_VERSION, whole.spec, whole.split])}.npz"
        self._earlier: dict[bytes, bytes] | None = None
        """State to digest, what no image of this source was found to be yet; None: not loaded."""
        self._kept: dict[bytes, bytes] = {}
        """State to digest, of the images of this source."""
        self._young: dict[Place, str] = {}
        """For this run alone: bytes whose state says nothing."""
        self._in_tars: dict[str, dict[bytes, bytes]] = {}
        """Tar to what was read of it: kept if the tar is at the end what it was at the beginning."""
        self._tars: dict[str, bytes | None] = {}
        self._folders: dict[str, bytes] = {}
        self._learnt = False

    def __enter__(self) -> RememberedDigests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tar, digests in self._in_tars.items():
            if self._state_of_file(tar) == self._tars[tar]:
                self._kept |= digests
                self._learnt = True
        if self._learnt:
            left = self._earlier or {}
            with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
                _save(self._file, left | self._kept if self._is_part or kind is not None else self._kept)

    def look(self, place: Place) -> Looked:
        """Whether the bytes at ``place`` are known, without reading them."""
        state = self._state(place)
        found = None if state is None else self._known(place, state)
        return Looked(place, state, self._young.get(place) if found is None else found.hex())

    def learn(self, looked: Looked, digest: str) -> str:
        """Note the digest of bytes that were read after ``look`` was called; gives it back."""
        place, state, _ = looked
        if state is not None and isinstance(place, Member):
            self._in_tars.setdefault(place.tar, {})[state] = bytes.fromhex(digest)
        elif state is not None and self._state(place) == state:
            self._kept[state] = bytes.fromhex(digest)
            self._learnt = True
        else:
            self._young[place] = digest
        return digest

    def _known(self, place: Place, state: bytes) -> bytes | None:
        found = self._kept.get(state)
        if found is None and isinstance(place, Member):
            found = self._in_tars.get(place.tar, {}).get(state)
        if found is None:
            if self._earlier is None:
                self._earlier = _load(self._file)
            found = self._earlier.pop(state, None)
            if found is not None:
                self._kept[state] = found
        return found

    def _state(self, place: Place) -> bytes | None:
        if not isinstance(place, Member):
            return self._state_of_file(place)
        if place.tar not in self._tars:  # asked of once for all its members
            self._tars[place.tar] = self._state_of_file(place.tar)
        tar = self._tars[place.tar]
        return None if tar is None else _hash(tar, place.offset, place.size)

    def _state_of_file(self, path: str) -> bytes | None:
        """What changes whenever the file does; None where it may change again unseen, or there is no such file."""
        now = time.time_ns()
        try:
            status = os.stat(path)  # noqa: PTH116 - called for every image
        except (OSError, ValueError):
            return None
        if max(status.st_mtime_ns, status.st_ctime_ns) > now - MARGIN_NS:
            return None
        folder, slash, _ = path.rpartition("/")
        resolved = self._folders.get(folder)
        if resolved is None:
            resolved = self._folders[folder] = os.fsencode(os.path.realpath(folder + slash))
        times = status.st_mtime_ns, status.st_ctime_ns
        return _hash(resolved, status.st_ino, status.st_dev, status.st_size, *times)


def _hash(place: bytes, *numbers: int) -> bytes:
    return blake2b(b"%b\0%b" % (place, repr(numbers).encode()), digest_size=_BYTES).digest()


def _save(file: Path, digests: Mapping[bytes, bytes]) -> None:
    states, found = (
        np.frombuffer(b"".join(part), np.uint8).reshape(-1, _BYTES) for part in (digests, digests.values())
    )
    with atomic_writer(file) as handle:
        np.savez(handle, states=states, digests=found)


def _load(file: Path) -> dict[bytes, bytes]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            states, digests = (arrays[name] for name in ("states", "digests"))
    except Exception:  # absent, or damaged in whatever way: the images are read again
        return {}
    whole = all(array.dtype == np.uint8 and array.shape == (len(states), _BYTES) for array in (states, digests))
    return dict(zip(_rows(states), _rows(digests))) if whole else {}


def _rows(array: np.ndarray) -> list[bytes]:
    raw = array.tobytes()
    return [raw[start : start + _BYTES] for start in range(0, len(raw), _BYTES)]
