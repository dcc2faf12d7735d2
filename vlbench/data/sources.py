"""Opening data: from a spec and a split to a ``Source`` with random access."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from vlbench.core.catalog import READERS
from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example, Part, Region, Source
from vlbench.data.spec import DataSpec, local_path, parse_spec

UNSPLIT = "all"
"""What the ``split`` of a source is called where the data have no splits."""

OF_ANY = {"share": "of the training split, this share alone", "share_seed": "which share of that size (default: 0)"}
"""Options of any kind of data, which its reader does not see. What is opened without a split is trained on."""

_ALIASES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}


class Member(NamedTuple):
    """Where the bytes of an image lie that is no file of its own."""

    tar: str
    offset: int
    size: int


Place: TypeAlias = "str | Member"
"""Where the bytes of an image lie: a file, or a member of a tar."""


@dataclass(frozen=True)
class Reader:
    """One on-disk format.

    ``splits`` answers with standard names (``train``, ``val``, ``test``) where the data's own are aliases of these, and
    with ``()`` for unsplit data. ``open`` is only called with a split that ``splits`` has named, or None for unsplit
    data.
    """

    name: str
    open: Callable[[DataSpec, str | None], Source]
    splits: Callable[[DataSpec], tuple[str, ...]]
    help: str
    options: Mapping[str, str] | None = None
    """Option → what it does. None: the reader checks its options itself."""
    present: Callable[[DataSpec], bool] | None = None
    """Whether the data are on this machine. None: whether the path exists."""


class BaseSource:
    """What all sources of vlbench share; a reader adds ``__len__``, ``__getitem__``, ``ids`` and ``labels``.

    One that knows where the bytes of its images lie also adds ``image_files`` and ``without_images``, as
    ``readers.files.OfFiles`` does: then images whose digests are remembered are not read for them. The bytes there must
    be those that ``__getitem__`` gives.
    """

    def __init__(
        self,
        spec: str,
        split: str | None,
        *,
        provides: Iterable[Part],
        classes: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
    ) -> None:
        self.spec = spec
        self.split = split if split is not None else UNSPLIT
        self.classes = tuple(classes) if classes is not None else None
        self.templates = tuple(templates) if templates is not None else None
        self.provides: frozenset[Part] = frozenset(provides)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {self.split!r})"


class Subset(BaseSource):
    """Some entries of another source, in the given order."""

    def __init__(self, source: Source, indices: Sequence[int], *, split: str) -> None:
        super().__init__(
            source.spec, split, provides=source.provides, classes=source.classes, templates=source.templates
        )
        self._source = source
        self._indices = [int(index) for index in indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._indices[index]]

    @property
    def whole(self) -> Source:
        """What the entries were chosen from."""
        return self._source

    @property
    def regions_of(self) -> Callable[[int], tuple[Region, ...]]:
        """The source's ``regions_of``, which reads no image, for the chosen entries. AttributeError where it has none.

        A property, so that ``getattr`` says of a subset what it says of the source.
        """
        whole: Any = self._source
        look = whole.regions_of
        return lambda index: look(self._indices[index])

    @property
    def without_images(self) -> Callable[[int], Example]:
        """The source's ``without_images``, where it has one, for the chosen entries."""
        whole: Any = self._source
        look = whole.without_images
        return lambda index: look(self._indices[index])

    @property
    def image_files(self) -> Callable[[int], Mapping[str, Place]]:
        """The source's ``image_files``, where it has them, for the chosen entries."""
        whole: Any = self._source
        look = whole.image_files
        return lambda index: look(self._indices[index])

    def ids(self) -> Sequence[str]:
        """The ids of the chosen entries."""
        ids = self._source.ids()
        return [ids[index] for index in self._indices]

    def labels(self) -> Sequence[int | None] | None:
        """The labels of the chosen entries."""
        labels = self._source.labels()
        return None if labels is None else [labels[index] for index in self._indices]


def without_images(source: Source, index: int) -> Example:
    """An example of which only what is asked or annotated is wanted: no image is read where the source can do so."""
    look = getattr(source, "without_images", None)
    example: Example = look(index) if look is not None else source[index]
    return example


def open_source(spec: str | DataSpec, split: str | None = None) -> Source:
    """Open one split of a data set.

    Args:
        spec: a data spec; its weight is ignored here. Of ``?share=0.5`` see ``OF_ANY``.
        split: ``train``, ``val``, ``test`` (or an alias, or a name of the data's own). None: the whole of unsplit data,
            else ``train``, else the only split there is.

    Raises:
        UserError: for an unknown reader or option, data that are absent, or a split that the data lack.
    """
    spec, reader, part = _reader(spec)
    present = reader.splits(spec)
    if split is None:
        if present and "train" not in present and len(present) > 1:
            raise UserError(f"data {spec.bare!r}: which split? It has {_listed(present)}")
        chosen = None if not present else "train" if "train" in present else present[0]
    else:
        chosen = canonical_split(split)
        if chosen not in present:
            has = f"it has {_listed(present)}" if present else "its content is not divided into splits"
            raise UserError(f"data {spec.bare!r}: there is no split {split!r}; {has}")
    source = reader.open(spec, chosen)
    return _part_of(source, part) if part and (split is None or chosen == "train") else source


def list_splits(spec: str | DataSpec) -> tuple[str, ...]:
    """The splits that the data have, by standard names where there are such; ``()`` for unsplit data."""
    spec, reader, _ = _reader(spec)
    return reader.splits(spec)


def is_present(spec: str | DataSpec) -> bool:
    """Whether the data are on this machine, so that a task can be run rather than skipped."""
    spec, reader, _ = _reader(spec)
    return reader.present(spec) if reader.present is not None else local_path(spec).exists()


def canonical_split(name: str) -> str:
    """``validation``, ``valid`` and ``dev`` are ``val``; ``training`` is ``train``; other names stay."""
    return _ALIASES.get(name.lower(), name.lower() if name.lower() in {"train", "val", "test"} else name)


def standard_order(names: Iterable[str]) -> tuple[str, ...]:
    """Train, val, test first, then the others by name."""
    first = {"train": 0, "val": 1, "test": 2}
    return tuple(sorted(names, key=lambda name: (first.get(name, 3), name)))


def split_table(names: Iterable[str], where: str) -> dict[str, str]:
    """Standard name → the data's own name, in standard order.

    Raises:
        UserError: where two names mean one split (``val`` beside ``validation``).
    """
    table: dict[str, str] = {}
    for name in sorted(names):
        standard = canonical_split(name)
        if standard in table:
            raise UserError(f"{where}: {table[standard]!r} and {name!r} both mean the {standard} split; keep one")
        table[standard] = name
    return {name: table[name] for name in standard_order(table)}


def check_options(spec: DataSpec, known: Mapping[str, str]) -> None:
    """Refuse options that the reader does not know. Raises UserError with the nearest one."""
    for key in spec.options:
        if key not in known:
            raise UserError(f"data {spec.bare!r}: {unknown(f'option of {spec.kind}', key, known)}")


def _reader(spec: str | DataSpec) -> tuple[DataSpec, Reader, dict[str, str]]:
    """The spec as its reader knows it, the reader, and the options of any kind of data."""
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    reader: Reader = READERS.get(spec.kind)
    if reader.options is not None:
        check_options(spec, {**reader.options, **OF_ANY})
    part = {key: value for key, value in spec.options.items() if key in OF_ANY}
    own = {key: value for key, value in spec.options.items() if key not in OF_ANY}
    return replace(spec, options=own), reader, part


def _part_of(source: Source, part: Mapping[str, str]) -> Source:
    """The entries whose ids, hashed, come first: whatever the order and the machine, a small share in a larger one."""
    spec = f"{source.spec}{'&' if '?' in source.spec else '?'}{'&'.join(f'{key}={part[key]}' for key in part)}"
    try:
        share = float(part.get("share", ""))
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"data {spec!r}: a share is above 0 and at most 1, for instance ?share=0.5")
    seed, ids = part.get("share_seed", "0"), source.ids()
    keys = [hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=8).digest() for name in ids]
    first = sorted(range(len(ids)), key=keys.__getitem__)[: max(1, round(share * len(ids)))]
    chosen = Subset(source, sorted(first), split=source.split)
    chosen.spec = spec  # another data set, for whoever says or compares what was read
    return chosen


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
