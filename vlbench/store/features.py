"""The feature store: each distinct image (or text) is encoded once, however many tasks, splits or runs read it.

A table belongs to one key (weights, preprocessing, precision: everything that changes a feature); its rows are
addressed by the digest of the image's bytes, never by a name or a position, so that two models or two data sets can
never be mistaken for one another.

On disk a table is a folder of shards, each an uncompressed ``.npz`` without pickles: ``digests`` (n, 16 bytes) and
float32 columns (n, width). A shard appears whole or not at all, is never changed, and every array in it carries a
checksum (the zip's), so writers need no lock and a killed one leaves nothing that is read.

Shapes: N asked digests, D width of a column.
"""

from __future__ import annotations

import logging
import struct
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from vlbench.core.errors import UserError
from vlbench.core.files import atomic_writer, write_text
from vlbench.core.fingerprint import canonical_json
from vlbench.core.names import slug
from vlbench.core.paths import cache_dir

Floats: TypeAlias = NDArray[np.float32]

_DIGESTS = "digests"
_BYTES = 16
_WHAT_A_DAMAGED_ZIP_RAISES = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


class FeatureStore:
    """Feature tables under ``root`` (default: ``features`` in vlbench's cache)."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root) if root is not None else cache_dir() / "features"

    def table(self, key: str, made_of: Mapping[str, Any] | None = None) -> FeatureTable:
        """The table of ``key``, a file name; empty where nothing has been appended.

        ``made_of`` is JSON: what the key was made of. It is written beside the shards for a person to read.
        """
        assert slug(key) == key, f"the key of a feature table must be a plain file name, got {key!r}"
        return FeatureTable(self.root / key, made_of)


@dataclass(frozen=True)
class _Shard:
    path: Path
    digests_N: NDArray[np.bytes_]
    widths: Mapping[str, int]


@dataclass(frozen=True)
class _Index:
    """Where each digest of one column lies, sorted by digest; of several equal ones the first shard's."""

    digests: NDArray[np.bytes_]
    shard: NDArray[np.int64]
    row: NDArray[np.int64]

    def find(self, wanted_N: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Position of each wanted digest in the index, -1 where it is absent."""
        if not len(self.digests):
            return np.full(len(wanted_N), -1, dtype=np.int64)
        position = np.minimum(np.searchsorted(self.digests, wanted_N), len(self.digests) - 1)
        return np.where(self.digests[position] == wanted_N, position, -1)


class FeatureTable:
    """Features under one key. Shards that other processes add are seen at the next call."""

    def __init__(self, folder: Path, made_of: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.damaged: list[str] = []
        """One line for every shard that was left out."""
        self._made_of = made_of
        self._shards: list[_Shard | None] = []
        self._known: set[str] = set()
        self._checked: set[tuple[int, str]] = set()
        self._indexes: dict[str, _Index] = {}

    @property
    def columns(self) -> dict[str, int]:
        """Column name → width, over all shards."""
        self._rescan()
        return {name: width for shard in self._shards if shard for name, width in shard.widths.items()}

    def missing(self, digests: Sequence[str], columns: Sequence[str] | None = None) -> list[str]:
        """Those of ``digests`` (each once, in order) that lack one of ``columns`` (None: of all the table's).

        The shards that hold the others are checked against their checksums first, so ``gather`` will find them.
        """
        distinct = list(dict.fromkeys(digests))
        wanted = _as_bytes(distinct)
        names = list(self.columns) if columns is None else list(columns)
        if not names:
            return distinct
        absent = np.zeros(len(distinct), dtype=bool)
        for name in names:
            absent |= self._locate(wanted, name)[0] < 0
        return [distinct[position] for position in np.flatnonzero(absent)]

    def append(self, digests: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
        """Add one row per digest as one shard file, whole or not at all. Safe beside other writers.

        Args:
            digests: N content digests (``core.fingerprint.digest``).
            columns: name → float array (N, D).

        Raises:
            UserError: where a feature is not finite: it would later read as a plain wrong answer.
        """
        if not len(digests):
            return
        known = self.columns
        arrays: dict[str, Floats] = {}
        for name, values in columns.items():
            array = np.ascontiguousarray(values, dtype=np.float32)
            assert name.isidentifier(), f"not a column name: {name!r}"
            assert name != _DIGESTS, f"{name!r} is the name of the digests themselves"
            assert array.shape[:1] == (len(digests),), f"{name}: shape {array.shape} for {len(digests)} digests"
            assert array.ndim == 2, f"{name}: shape {array.shape} is not one vector per digest"
            assert known.get(name, array.shape[1]) == array.shape[1], f"{name}: width {array.shape[1]} in {self.folder}"
            bad = ~np.isfinite(array).all(axis=1)
            if bad.any():
                first = digests[int(np.argmax(bad))]
                raise UserError(
                    f"{name} features of {int(bad.sum())} of {len(digests)} inputs are NaN or infinite (first: digest "
                    f"{first}); try --precision fp32, and look at the weights if that does not help"
                )
            arrays[name] = array
        assert arrays, "append needs at least one column"
        note = self.folder / "meta.json"
        if self._made_of is not None and not note.exists():
            write_text(note, canonical_json(dict(self._made_of)) + "\n")
        with atomic_writer(self.folder / f"shard-{uuid.uuid4().hex}.npz") as handle:
            members: dict[str, Any] = {_DIGESTS: _as_bytes(digests), **arrays}
            np.savez(handle, **members)

    def gather(self, digests: Sequence[str], columns: Sequence[str]) -> dict[str, Floats]:
        """Column name → (N, D) float32, row by row in the order asked; a digest may be asked for twice.

        Only shards that hold an asked digest are opened, each once for a column.

        Raises:
            UserError: where a digest is not in the table (``missing`` says which beforehand).
        """
        wanted = _as_bytes(digests)
        return {name: self._gather_column(wanted, name) for name in columns}

    def _gather_column(self, wanted_N: NDArray[np.bytes_], name: str) -> Floats:
        shard_N, row_N = self._locate(wanted_N, name)
        absent = int((shard_N < 0).sum())
        if absent:
            raise UserError(f"{self.folder}: {absent} of {len(wanted_N)} asked features ({name}) are not in the table")
        width = self.columns.get(name, 0)
        out_ND = np.empty((len(wanted_N), width), dtype=np.float32)
        order = np.argsort(shard_N, kind="stable")
        ends = np.flatnonzero(np.diff(shard_N[order])) + 1
        for positions in np.split(order, ends):
            if len(positions):
                shard = self._shards[shard_N[positions[0]]]
                assert shard is not None, "a shard that was left out is still in the index"
                out_ND[positions] = _read_array(shard.path, name)[row_N[positions]]
        return out_ND

    def _locate(self, wanted_N: NDArray[np.bytes_], name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard number (-1: absent) and row of each wanted digest, out of shards whose checksums hold."""
        self._rescan()
        while True:
            index = self._index(name)
            position_N = index.find(wanted_N)
            shard_N = np.where(position_N >= 0, index.shard[position_N] if len(index.shard) else -1, -1)
            # A shard found damaged leaves the index; a digest may still be in another one, so look again.
            sound = [self._is_sound(int(number), name) for number in np.unique(shard_N) if number >= 0]
            if all(sound):
                return shard_N, np.where(position_N >= 0, index.row[position_N] if len(index.row) else -1, -1)

    def _index(self, name: str) -> _Index:
        if name not in self._indexes:
            chosen = [(number, shard) for number, shard in enumerate(self._shards) if shard and name in shard.widths]
            digests = np.concatenate([shard.digests_N for _, shard in chosen] or [_as_bytes([])])
            number = np.concatenate([np.full(len(s.digests_N), n) for n, s in chosen] or [np.zeros(0, dtype=np.int64)])
            row = np.concatenate([np.arange(len(s.digests_N)) for _, s in chosen] or [np.zeros(0, dtype=np.int64)])
            unique, first = np.unique(digests, return_index=True)
            self._indexes[name] = _Index(unique, number[first], row[first])
        return self._indexes[name]

    def _is_sound(self, number: int, name: str) -> bool:
        """Whether the checksum of one column of one shard holds; looked at once for each process."""
        shard = self._shards[number]
        if shard is None:
            return False
        if (number, name) not in self._checked:
            try:
                shape = _read_array(shard.path, name).shape
                if shape != (len(shard.digests_N), shard.widths[name]):
                    raise ValueError(f"{name} has the shape {shape}")
            except _WHAT_A_DAMAGED_ZIP_RAISES as error:
                self._shards[number] = None
                self._indexes.clear()
                self._leave_out(shard.path, error)
                return False
            self._checked.add((number, name))
        return True

    def _rescan(self) -> None:
        """Read the digests of shards that have appeared since the last call."""
        names = sorted(path.name for path in self.folder.glob("shard-*.npz") if path.name not in self._known)
        for name in names:
            self._known.add(name)
            path = self.folder / name
            try:
                self._shards.append(_read_shard(path))
            except _WHAT_A_DAMAGED_ZIP_RAISES as error:
                self._leave_out(path, error)
        if names:
            self._indexes.clear()

    def _leave_out(self, path: Path, error: BaseException) -> None:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        line = f"{path}: damaged feature shard ({reason}): not used, its features are computed again; delete the file"
        self.damaged.append(line)
        logging.getLogger(__name__).warning("%s", line)


def _as_bytes(digests: Sequence[str]) -> NDArray[np.bytes_]:
    """Hexadecimal digests as fixed 16-byte strings, which numpy sorts and searches."""
    assert all(len(digest) == 2 * _BYTES for digest in digests), "a digest has 32 hexadecimal digits"
    return np.frombuffer(bytes.fromhex("".join(digests)), dtype=f"S{_BYTES}")


def _read_shard(path: Path) -> _Shard:
    with zipfile.ZipFile(path) as archive:
        digests = _read_member(archive, _DIGESTS)
        widths = {}
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            if name != _DIGESTS:
                shape = _read_shape(archive, name)
                if len(shape) != 2 or shape[0] != len(digests):
                    raise ValueError(f"{name} has the shape {shape} for {len(digests)} digests")
                widths[name] = shape[1]
    if digests.dtype != np.dtype(f"S{_BYTES}") or digests.ndim != 1:
        raise ValueError("its digests are of another kind")
    return _Shard(path, digests, widths)


def _read_array(path: Path, name: str) -> Floats:
    with zipfile.ZipFile(path) as archive:
        array = _read_member(archive, name)
    if array.dtype != np.float32:
        raise ValueError(f"{name} is {array.dtype}, not float32")
    return array


def _read_member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as handle:
        array: NDArray[Any] = npy_format.read_array(handle, allow_pickle=False)
        if handle.read(1):  # also reaches the end, where the zip's checksum is compared
            raise ValueError(f"{name} is followed by more bytes")
    return array


def _read_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as handle:
        npy_format.read_magic(handle)
        shape: tuple[int, ...] = npy_format.read_array_header_1_0(handle)[0]
    return shape
