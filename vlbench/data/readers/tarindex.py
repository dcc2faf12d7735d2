"""Random access to a plain tar: which samples are in it, and where each member's bytes lie.

A tar is walked once; the index (arrays, not objects: millions of members fit) is kept in the cache under the file's
path, size and times of change. Members are read by offset with one ``open`` a sample, so nothing is shared between
loader processes or threads, and nothing is ever extracted to a path.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.core.files import atomic_writer
from vlbench.core.fingerprint import fingerprint
from vlbench.core.paths import cache_dir

_VERSION = 1
_COLUMNS = ("starts", "member_extension", "offsets", "sizes")
_BLOCK = 512
_WORTH_KEEPING = 200  # members; fewer are walked again in little more time than a cache file is read
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar. Members of one key (the name up to the first dot, folder kept) are one sample."""

    path: str
    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    """Every extension in the tar, lower case; what ``member_extension`` indexes."""
    starts: np.ndarray
    """``int64 [n_samples + 1]``: the members of sample i are ``starts[i]:starts[i + 1]``."""
    member_extension: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    damage: str
    """What is wrong with the tar as a whole (it ends early), or ``""``. What lies before the damage can be read."""

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, index: int) -> dict[str, tuple[int, int]]:
        """Extension → offset and size of the members of one sample."""
        span = range(int(self.starts[index]), int(self.starts[index + 1]))
        return {self.extensions[self.member_extension[m]]: (int(self.offsets[m]), int(self.sizes[m])) for m in span}

    def has(self, extension: str) -> bool:
        """Whether any sample has a member with this extension."""
        return extension in self.extensions


def read_members(path: str, places: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """The bytes at each (offset, size). Raises BadExample where the file has gone or become shorter."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadExample("unreadable file", path, error.strerror or str(error)) from None
    try:
        return {name: _pread(descriptor, path, *place) for name, place in places.items()}
    finally:
        os.close(descriptor)


def index_tar(path: Path) -> TarIndex:
    """The index of ``path``, from the cache where the file has not changed.

    Raises:
        UserError: where the file is absent, compressed, or no tar at all.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such tar file") from None
    _refuse_compressed(path)
    # A file may be given its old time of modification back (rsync, touch); the time of its last change of state not.
    times = [status.st_mtime_ns, status.st_ctime_ns]
    key = fingerprint([_VERSION, os.fspath(path.resolve()), status.st_size, *times])
    kept = cache_dir() / "tarindex" / f"{key}.npz"
    index = _load(kept, path)
    if index is None:
        index = _build(path, status.st_size)
        if len(index.offsets) >= _WORTH_KEEPING:
            with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
                _save(kept, index)
    return index


def _pread(descriptor: int, path: str, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # one pread gives at most 2 GiB
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise BadExample("truncated tar", path, "the file has become shorter since it was opened")
        data += more
    return data


def _build(path: Path, size: int) -> TarIndex:
    """Walk the tar."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    repeats: dict[str, int] = {}
    damage = "it is empty" if size == 0 else ""
    last = ""
    end = 0
    if size:
        for member in _walk(path):
            end = member.offset_data + -(-_stored(member) // _BLOCK) * _BLOCK
            name = _sample_name(member)
            if name is None:
                continue
            key, extension = name
            if member.offset_data + member.size > size:
                damage, last = f"it ends inside {member.name!r}", key
                break
            sample = f"{key}#{repeats[key]}" if key in repeats else key
            if extension in samples.get(sample, ()):
                # The same member twice is two samples; a sample whose members lie apart is one.
                repeats[key] = repeats.get(key, 1) + 1
                sample = f"{key}#{repeats[key]}"
            samples.setdefault(sample, {})[extension] = (member.offset_data, member.size)
            last = sample
        damage = damage or _end_damage(path, size, end)
    if damage:
        _drop_incomplete(samples, last)
    return _pack(path, samples, damage)


def _walk(path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        tar = tarfile.open(path, mode="r:")  # noqa: SIM115 - closed below; a failure to open means something else
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a tar file ({error})") from None
    with tar, contextlib.suppress(tarfile.TarError, EOFError, ValueError, OSError):
        # Damage past the first member ends the walk; the caller sees it from where the walk stopped.
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or every header of the tar stays in memory
            yield member


def _stored(member: tarfile.TarInfo) -> int:
    return member.size if member.isfile() else 0


def _sample_name(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Key and extension, or None for what is no part of a sample (folders, links, hidden files, no extension)."""
    if not member.isreg() or member.sparse is not None:
        return None
    folder, slash, base = member.name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or not extension or base.startswith("__"):
        return None
    return folder + slash + stem, extension.lower()


def _end_damage(path: Path, size: int, end: int) -> str:
    """A whole tar ends in a block of zeros; anything else is a cut or a damaged header, at which tarfile just stops."""
    with path.open("rb") as handle:
        handle.seek(end)
        block = handle.read(_BLOCK)
    whole = len(block) == _BLOCK and not any(block)
    return "" if whole else f"it is cut or damaged at byte {min(end, size):,}"


def _drop_incomplete(samples: dict[str, dict[str, tuple[int, int]]], last: str) -> None:
    """Leave out the sample at the cut unless it has every member that its neighbours have."""
    if last in samples:
        others = [members.keys() for key, members in samples.items() if key != last]
        if not others or samples[last].keys() < others[-1]:
            del samples[last]


def _pack(path: Path, samples: dict[str, dict[str, tuple[int, int]]], damage: str) -> TarIndex:
    extensions = sorted({extension for members in samples.values() for extension in members})
    code = {extension: i for i, extension in enumerate(extensions)}
    flat = [(code[ext], *place) for members in samples.values() for ext, place in members.items()]
    table = np.array(flat, dtype=np.int64).reshape(-1, 3)
    starts = np.cumsum([0, *(len(members) for members in samples.values())], dtype=np.int64)
    columns = (table[:, 0].astype(np.int32), table[:, 1].copy(), table[:, 2].copy())
    return TarIndex(os.fspath(path), tuple(samples), tuple(extensions), starts, *columns, damage)


def _save(kept: Path, index: TarIndex) -> None:
    words = "\0".join([index.damage, *index.extensions]).encode("utf-8", "surrogateescape")
    keys = "\0".join(index.keys).encode("utf-8", "surrogateescape")
    with atomic_writer(kept) as handle:
        np.savez(
            handle,
            words=np.frombuffer(words, dtype=np.uint8),
            keys=np.frombuffer(keys, dtype=np.uint8),
            **{name: getattr(index, name) for name in _COLUMNS},
        )


def _load(kept: Path, path: Path) -> TarIndex | None:
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            damage, *extensions = arrays["words"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            keys = tuple(arrays["keys"].tobytes().decode("utf-8", "surrogateescape").split("\0"))
            starts, codes, offsets, sizes = (arrays[name] for name in _COLUMNS)
    except FileNotFoundError:
        return None
    except Exception:  # a damaged cache file is built again, whatever is wrong with it
        return None
    if len(starts) != len(keys) + 1:
        return None
    return TarIndex(os.fspath(path), keys, tuple(extensions), starts, codes, offsets, sizes, damage)


def _refuse_compressed(path: Path) -> None:
    with path.open("rb") as handle:
        head = handle.read(8)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{path}: compressed with {name}; unpack it to a plain .tar first (images do not compress)")
