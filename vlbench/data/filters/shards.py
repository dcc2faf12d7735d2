"""One shard as the filters read it, and as they copy it: whole members, byte for byte."""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.core.files import atomic_writer
from vlbench.data.images import IMAGE_EXTENSIONS, not_empty
from vlbench.data.readers.tarindex import TarIndex, index_tar, read_members
from vlbench.data.readers.wds import shard_paths
from vlbench.data.spec import parse_spec

_BLOCK = 512
_RECORD = 20 * _BLOCK  # what tar pads its files to
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Shard:
    """One tar of the source."""

    path: Path
    name: str
    """Its path below the folder that all shards have in common: what it is called in the output."""


def source_shards(spec: str) -> tuple[Shard, ...]:
    """The shards that a ``wds:`` spec names, in order.

    Raises:
        UserError: for another kind of data, data in splits, or no shard at all.
    """
    parsed = parse_spec(spec)
    if parsed.kind != "wds":
        raise UserError(
            f"data {spec!r}: only webdataset shards can be filtered (wds:DIR or wds:'DIR/{{000..331}}.tar')"
        )
    paths = shard_paths(parsed)
    if len(set(paths)) < len(paths):
        raise UserError(f"data {spec!r}: a shard is named twice")
    common = Path(os.path.commonpath([path.parent.absolute() for path in paths]))
    return tuple(Shard(path, path.absolute().relative_to(common).as_posix()) for path in paths)


@dataclass(frozen=True)
class Pair:
    """The parts of one sample; None where it has none."""

    image: bytes | None
    text: str | None


def open_shard(shard: Shard, *, allow_truncated: bool) -> TarIndex:
    """The index of a shard. Raises UserError where it is cut and may not be."""
    index = index_tar(shard.path)
    if index.damage and not allow_truncated:
        raise UserError(
            f"{shard.path}: truncated tar: {index.damage}; get it again and run this again, or pass --allow-truncated "
            "to filter what lies before the cut"
        )
    return index


def read_pair(index: TarIndex, row: int) -> Pair:
    """Image and text of one sample: the ``.txt``, else the ``caption`` of the ``.json``.

    Raises:
        BadExample: ``empty file``, ``bad text`` or ``bad JSON``: what a reader of the shard would stumble over too.
    """
    where = f"{index.path}/{index.keys[row]}"
    members = index.members(row)
    kind = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
    wanted = {name: place for name, place in members.items() if name in (kind, "txt", "json")}
    data = read_members(index.path, wanted)
    image = not_empty(data[kind], where=where) if kind is not None else None
    record = _json(data["json"], where) if "json" in data else {}
    text = _text(data["txt"], where) if "txt" in data else record.get("caption")
    text = text.strip() if isinstance(text, str) else ""
    return Pair(image, text or None)


def printable(text: str) -> str:
    """``text`` without what UTF-8 cannot hold: file names need not be Unicode, and JSON can hold half a character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def copy_kept(index: TarIndex, keep_N: np.ndarray, target: Path) -> None:
    """Write the shard without the samples that ``keep_N`` (bool) leaves out, whole or not at all.

    Headers are copied with their members: names, times and owners stay as they are. What is no part of a sample
    (folders, hidden files) is copied too, unless the tar is cut.
    """
    keep_M = np.repeat(keep_N, np.diff(index.starts))
    kept = dict(zip(index.offsets.tolist(), keep_M.tolist()))
    with Path(index.path).open("rb") as source, atomic_writer(target) as out:
        written, size = 0, os.fstat(source.fileno()).st_size
        for start, stop in _joined_spans(index.path, kept, others=not index.damage):
            whole = min(stop, size)  # a cut may fall into the zeros that fill a member's last block
            _copy(source, out, start, whole, index.path)
            written += whole - start
        end = written + -written % _BLOCK + 2 * _BLOCK
        out.write(bytes(end - written + -end % _RECORD))


def _joined_spans(path: str, kept: dict[int, bool], *, others: bool) -> Iterator[tuple[int, int]]:
    """Byte ranges of the tar that are to be copied, neighbours as one."""
    begin = end = 0
    for place, start, stop in _spans(path):
        if not kept.get(place, others):
            continue
        if start != end:
            if end > begin:
                yield begin, end
            begin = start
        end = stop
    if end > begin:
        yield begin, end


def _spans(path: str) -> Iterator[tuple[int, int, int]]:
    """Of each member: where its data are, where its headers begin, where the next one's begin."""
    with contextlib.suppress(tarfile.TarError, EOFError, ValueError, OSError), tarfile.open(path, mode="r:") as tar:
        # Damage ends the walk; the index was made by the same walk and knows of it.
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or every header of the tar stays in memory
            yield member.offset_data, member.offset, tar.offset


def _copy(source: IO[bytes], out: IO[bytes], start: int, stop: int, path: str) -> None:
    source.seek(start)
    while start < stop:
        data = source.read(min(_COPY_BYTES, stop - start))
        if not data:
            raise UserError(f"{path}: has become shorter while it was read; run this again once nothing writes to it")
        out.write(data)
        start += len(data)


def _json(data: bytes, where: str) -> dict[str, object]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadExample("bad JSON", where, str(error)) from None
    if not isinstance(record, dict):
        raise BadExample("bad JSON", where, f"expected an object, got {type(record).__name__}")
    return record


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadExample("bad text", where, f"not UTF-8: {error.reason} at byte {error.start}") from None
