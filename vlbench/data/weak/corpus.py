"""The weakly aligned corpus on disk: for each image its tags, the sentences retrieved for it, and their links.

One Arrow file (Feather 2 without compression), one row an image: it is mapped into memory, so that any image is read
in microseconds, an open corpus costs no memory of its own, and a loader process that receives it by pickle opens the
same file. It is renamed into place when it is whole; a file cut short has no footer and is refused.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlbench.core.errors import UserError
from vlbench.core.files import atomic_writer
from vlbench.core.fingerprint import canonical_json

_META = b"vlbench.weak"
_BATCH = 4096
_LINK = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("region", pa.int32()), ("score", pa.float32())])
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.uint64()),  # a hash of some id, ascending over the file: what look-ups search in
        ("row", pa.int64()),  # where that id stands
        ("tags", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("links", pa.list_(pa.list_(_LINK))),
    ]
)


@dataclass(frozen=True, slots=True)
class Link:
    """A noun phrase of a sentence and the region that it most resembles."""

    phrase: str
    start: int
    """Of the phrase's first character in the sentence."""
    end: int
    """Behind its last: ``text[start:end] == phrase``."""
    region: int
    """Index into the image's regions, which is also the index into its ``tags``."""
    score: float
    """Cosine of the embeddings of phrase and tag."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """One sentence retrieved for an image."""

    text: str
    score: float
    """Cosine of sentence and tags; where the corpus was made with the metric ``l2``, minus the squared distance."""
    links: tuple[Link, ...]
    """At most one for each region, in the order of the regions."""


@dataclass(frozen=True, slots=True)
class Entry:
    """All that the corpus says of one image."""

    id: str
    tags: tuple[str, ...]
    """The category of each region, in the order of ``Example.regions``, repeats included."""
    aligned: tuple[Aligned, ...]


class Corpus:
    """An open corpus: a sequence of entries in the order they were written, and a look-up by image id.

    Args:
        path: the file; use ``open_corpus``.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        """The number of images."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and self._find(image_id) is not None

    def __getitem__(self, image_id: str) -> tuple[Aligned, ...]:
        """The sentences of an image, best first. Raises KeyError for an image that the corpus does not know."""
        return self.entry(self._row(image_id)).aligned

    def __iter__(self) -> Iterator[Entry]:
        return (self.entry(row) for row in range(len(self)))

    def tags(self, image_id: str) -> tuple[str, ...]:
        """The tags of an image, one for each of its regions. Raises KeyError."""
        return tuple(self._value("tags", self._row(image_id)))

    def ids(self) -> list[str]:
        """All image ids, in the order of the rows."""
        return [value for batch in self._batches for value in batch.column("id").to_pylist()]

    def entry(self, row: int) -> Entry:
        """The entry at a row."""
        texts, scores = self._value("texts", row), self._value("scores", row)
        links = self._value("links", row)
        aligned = tuple(
            Aligned(text, score, tuple(_link(text, link) for link in found))
            for text, score, found in zip(texts, scores, links)
        )
        return Entry(self._value("id", row), tuple(self._value("tags", row)), aligned)

    def _open(self) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            meta = (reader.schema.metadata or {}).get(_META)
            if meta is None or not reader.schema.equals(_SCHEMA):
                raise UserError(f"{self.path}: not a weakly aligned corpus; make one with `vlbench data weakly-align`")
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file; make it with `vlbench data weakly-align`") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: cannot be read as a weakly aligned corpus: {error}"[:300]) from None
        self.made_of: dict[str, Any] = json.loads(meta)
        """What it was made of and with: settings, fingerprints, counts."""
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])
        firsts = [batch.column("key")[0].as_py() for batch in self._batches]
        self._first_keys = np.array(firsts, dtype=np.uint64)

    def _value(self, column: str, row: int) -> Any:
        which = int(np.searchsorted(self._ends, row, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return self._batches[which].column(column)[row - before].as_py()

    def _row(self, image_id: str) -> int:
        row = self._find(image_id)
        if row is None:
            raise KeyError(f"{self.path} knows no image {image_id!r}")
        return row

    def _find(self, image_id: str) -> int | None:
        """The row of ``image_id``: among the sorted keys, batch first."""
        key = _key(image_id)
        which = max(int(np.searchsorted(self._first_keys, key, side="left")) - 1, 0)
        for batch in self._batches[which:]:
            keys = batch.column("key").to_numpy()
            for place in range(int(np.searchsorted(keys, key)), len(keys)):
                if keys[place] != key:
                    return None
                row = batch.column("row")[place].as_py()
                if self._value("id", row) == image_id:
                    return int(row)
        return None


def open_corpus(path: Path | str) -> Corpus:
    """Open a corpus. Raises UserError where there is none, or the file is damaged."""
    return Corpus(path)


def write_corpus(
    path: Path | str, entries: Iterable[Entry], *, ids: Sequence[str], made_of: Mapping[str, Any]
) -> Corpus:
    """Write a corpus, whole or not at all, and open it.

    Args:
        path: the file; one that is there is replaced.
        entries: one an image, taken one after the other, so that they need not fit in memory.
        ids: the ids of ``entries`` in their order.
        made_of: JSON: settings, fingerprints, counts. Read after the last entry, which may still have changed it.

    Raises:
        UserError: where an id occurs twice.
    """
    if len(set(ids)) < len(ids):
        twice = next(name for name, times in Counter(ids).items() if times > 1)
        raise UserError(f"{path}: the image id {twice!r} occurs twice; align its sources one by one")
    keys = np.array([_key(name) for name in ids], dtype=np.uint64)
    order = np.argsort(keys, kind="stable")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as handle, tempfile.TemporaryFile(dir=path.parent) as spool:
        # Arrow writes the schema, which carries ``made_of``, before the rows: they wait in a file of their own.
        with pa.ipc.new_file(pa.PythonFile(spool, "w"), _SCHEMA) as writer:
            for batch in _batches(entries, ids, keys[order], order):
                writer.write_batch(batch)
        spool.seek(0)
        rows = pa.ipc.open_file(pa.PythonFile(spool, "r"))
        schema = _SCHEMA.with_metadata({_META: canonical_json(dict(made_of)).encode("utf-8")})
        with pa.ipc.new_file(handle, schema) as writer:
            for number in range(rows.num_record_batches):
                writer.write_batch(rows.get_batch(number))
    return Corpus(path)


def _batches(
    entries: Iterable[Entry], ids: Sequence[str], keys: np.ndarray, order: np.ndarray
) -> Iterator[pa.RecordBatch]:
    """The rows in batches; checks that the entries are those of ``ids``."""
    row = 0
    remaining = iter(entries)
    while batch := list(islice(remaining, _BATCH)):
        assert [entry.id for entry in batch] == list(ids[row : row + len(batch)]), "entries in another order than ids"
        columns = {
            "id": [entry.id for entry in batch],
            "key": keys[row : row + len(batch)],
            "row": order[row : row + len(batch)],
            "tags": [entry.tags for entry in batch],
            "texts": [[aligned.text for aligned in entry.aligned] for entry in batch],
            "scores": [[aligned.score for aligned in entry.aligned] for entry in batch],
            "links": [
                [[_record(aligned.text, link) for link in aligned.links] for aligned in entry.aligned]
                for entry in batch
            ],
        }
        yield pa.record_batch([pa.array(columns[field.name], field.type) for field in _SCHEMA], schema=_SCHEMA)
        row += len(batch)
    assert row == len(ids), f"{row} entries for {len(ids)} ids"


def _key(image_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _record(text: str, link: Link) -> dict[str, Any]:
    assert text[link.start : link.end] == link.phrase, f"{link} is not a span of {text!r}"
    return {"start": link.start, "end": link.end, "region": link.region, "score": link.score}


def _link(text: str, record: Mapping[str, Any]) -> Link:
    return Link(text[record["start"] : record["end"]], **record)
