"""Hugging Face ``datasets``: a local folder of Parquet or Arrow files, a ``save_to_disk`` folder, or a hub name."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vlbench.core.errors import BadExample, UserError
from vlbench.core.fingerprint import digest
from vlbench.core.names import unknown
from vlbench.core.paths import cache_dir
from vlbench.core.types import Example, Part
from vlbench.data.images import not_empty, read_file
from vlbench.data.sources import BaseSource, Reader, canonical_split, split_table
from vlbench.data.spec import DataSpec, local_path

if TYPE_CHECKING:
    import datasets

_LABEL_NAMES = ("label", "labels", "fine_label", "class")
_TEXT_NAMES = ("caption", "captions", "text", "texts", "sentence", "sentences")
_ID_NAMES = ("id", "image_id", "sample_id")
_SPLIT_NAME = "split"
_STANDARD = ("train", "val", "test")
_OPTIONS = {
    "image": "the column of the images",
    "label": "the column of the labels",
    "text": "the column of the captions",
    "split": "the only split to offer",
    "config": "the configuration of a hub data set",
}


class HfSource(BaseSource):
    """Rows of one split. Images stay encoded; labels that are words get sorted class names."""

    def __init__(
        self, spec: DataSpec, split: str, table: datasets.Dataset, columns: dict[str, str], classes: list[str] | None
    ) -> None:
        super().__init__(spec.bare, split, provides=_parts(columns), classes=classes)
        self._table = table.with_format("arrow", columns=sorted(set(columns.values())))
        self._columns = columns
        self._label_values = _label_values(table, columns.get("label"), classes)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        if index < 0 or index >= len(self):
            raise IndexError(index)
        row = self._table[index].to_pylist()[0]
        where = f"{self.spec} {self._ids[index]} (row {index})"
        texts = _texts(row.get(self._columns.get("text", "")), where)
        return Example(
            id=self._ids[index],
            image=_image_bytes(row[self._columns["image"]], where) if "image" in self._columns else None,
            texts=texts,
            label=None if self._label_values is None else self._label_values[index],
        )

    def ids(self) -> Sequence[str]:
        """The id column, else the images' paths, where all values differ; else a digest of each image's bytes.

        Equal images get ``-2``, ``-3`` and so on. Never a row number, which would pair different images of two
        versions of a data set. Without an id column the images are gone through once.
        """
        return self._ids

    @cached_property
    def _ids(self) -> list[str]:
        if "id" in self._columns:
            return [str(name) for name in self._table.with_format(None)[self._columns["id"]][:]]
        return _ids_from_paths(self._table, self._columns["image"]) or _ids_from_content(
            self._table, self._columns["image"]
        )

    def labels(self) -> Sequence[int | None] | None:
        """The label column; -1 (the hub's mark of a hidden label) is None."""
        return self._label_values


def _ids_from_paths(table: datasets.Dataset, column: str) -> list[str] | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    paths: list[str | None] = []
    for values in _column_parts(table, column):
        if not pa.types.is_struct(values.type) or values.type.get_field_index("path") < 0:
            return None
        paths += pc.struct_field(values, "path").to_pylist()
    return [str(path) for path in paths] if all(paths) and len(set(paths)) == len(paths) else None


def _ids_from_content(table: datasets.Dataset, column: str) -> list[str]:
    seen: Counter[str] = Counter()
    ids = []
    for values in _column_parts(table, column):
        for value in values.to_pylist():
            try:
                name = digest(_image_bytes(value, ""))[:16]
            except BadExample:  # said when the row is read
                name = digest(b"")[:16]
            seen[name] += 1
            ids.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return ids


def _column_parts(table: datasets.Dataset, column: str) -> Iterator[Any]:
    """One column as Arrow arrays of some hundred rows."""
    for part in table.with_format("arrow", columns=[column]).iter(batch_size=256):
        yield part[column]


def _open(spec: DataSpec, split: str | None) -> HfSource:
    tables = _load(spec)
    assert split is not None, "a data set of the datasets library always has splits"
    table = tables[split_table(tables, spec.bare)[split]]
    columns = _find_columns(spec, table)
    classes = _classes(tables, columns["label"]) if "label" in columns else None
    return HfSource(spec, split, table, columns, classes)


def _splits(spec: DataSpec) -> tuple[str, ...]:
    return tuple(split_table(_load(spec), spec.bare))


def _load(spec: DataSpec) -> dict[str, datasets.Dataset]:
    """Every split by the data's own name, images not decoded."""
    import datasets

    path = local_path(spec)
    offline = not path.exists() and not _hub_resolves()
    if offline and not _present(spec):
        raise UserError(_why(spec, OSError("no network")))  # the library would try for half a minute
    with _quiet(), _offline() if offline else nullcontext():
        try:
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                loaded: Any = datasets.load_from_disk(str(path))
            elif path.exists():
                # Apart from the hub's: a folder must never be taken for a hub data set of the same name.
                loaded = _load_files(path, str(cache_dir() / "datasets" / "local"))
            else:
                loaded = datasets.load_dataset(spec.path, spec.options.get("config"), cache_dir=str(_hub_cache()))
        except UserError:
            raise
        except Exception as error:  # the library and the network raise many types; each is one line for the user
            raise UserError(_why(spec, error)) from None
    tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    chosen = spec.options.get("split")
    if chosen is not None:
        near = {name: name for name in tables} | {canonical_split(name): name for name in tables}
        if chosen not in near:
            raise UserError(f"data {spec.bare!r}: {unknown('split', chosen, tables)}")
        tables = {near[chosen]: tables[near[chosen]]}
    return {name: _undecoded(table) for name, table in _divided(_hidden_apart(tables)).items()}


def _divided(tables: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """One table by its column of splits, as Karpathy's division lies on the hub; else the tables as they are."""
    if len(tables) > 1 or _SPLIT_NAME not in next(iter(tables.values())).column_names:
        return tables
    table = next(iter(tables.values()))
    names = table.with_format(None)[_SPLIT_NAME][:]
    if not names or not all(isinstance(name, str) and canonical_split(name) in _STANDARD for name in set(names)):
        return tables
    return {name: table.select([row for row, of in enumerate(names) if of == name]) for name in dict.fromkeys(names)}


def _hidden_apart(tables: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """A test split whose every label is hidden (-1: ImageNet's on the hub) under a name that no task asks for."""
    import datasets

    named = {str(name): table for name, table in tables.items()}
    for name, table in tables.items():
        labels = [key for key in table.column_names if isinstance(table.features[key], datasets.ClassLabel)]
        if canonical_split(str(name)) == "test" and len(tables) > 1 and labels and table.unique(labels[0]) == [-1]:
            named[f"{name} (labels hidden)"] = named.pop(str(name))
    return named


def _load_files(path: Any, cache: str) -> Any:
    import datasets

    if path.is_file():
        kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix.lower())
        if kind is None:
            raise UserError(f"{path}: expected a .parquet or .arrow file, or a folder of them")
        return datasets.load_dataset(kind, data_files=str(path), cache_dir=cache)
    if not any(next(path.rglob(pattern), None) for pattern in ("*.parquet", "*.arrow")):
        raise UserError(f"{path}: there is no .parquet or .arrow file in this folder")
    return datasets.load_dataset(str(path), cache_dir=cache)


def _why(spec: DataSpec, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).split("\n")[0][:200]
    if local_path(spec).exists():
        return f"data {spec.bare!r}: the files cannot be read: {reason}"
    return (
        f"data {spec.bare!r}: there is no such folder, and the hub cannot be asked ({reason}); "
        f"download its Parquet files by hand into a folder and write hf:FOLDER"
    )


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _find_columns(spec: DataSpec, table: datasets.Dataset) -> dict[str, str]:
    """Role → column: as the options say, else by type and usual name."""
    import datasets

    names = list(table.column_names)
    columns: dict[str, str] = {}
    for role in ("image", "label", "text"):
        named = spec.options.get(role)
        if named is not None and named not in names:
            raise UserError(f"data {spec.bare!r}: {unknown('column', named, names)}")
        if named is not None:
            columns[role] = named
    images = [name for name in names if _is_image(table.features[name])]
    if "image" not in columns and images:
        columns["image"] = images[0]
    if "image" not in columns:
        raise UserError(f"data {spec.bare!r}: which column is the image? Add ?image=COLUMN; it has {', '.join(names)}")
    by_type = [name for name in names if isinstance(table.features[name], datasets.ClassLabel)]
    by_name = [name for name in _LABEL_NAMES if name in names]
    candidates = by_type or by_name
    if "label" not in columns and candidates:
        columns["label"] = candidates[0]
    text = next((name for name in _TEXT_NAMES if name in names and name not in columns.values()), None)
    if "text" not in columns and text is not None:
        columns["text"] = text
    for name in _ID_NAMES:
        if name in names and "id" not in columns and len(table.unique(name)) == len(table):
            columns["id"] = name
    return columns


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())


def _classes(tables: dict[str, datasets.Dataset], column: str) -> list[str]:
    """Class names: the ClassLabel's own; else the different values of every split, sorted."""
    import datasets

    having = [table for table in tables.values() if column in table.column_names]
    feature = having[0].features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = {value for table in having for value in table.unique(column) if value is not None}
    if all(isinstance(value, int) for value in values):
        return [str(number) for number in range(max(values, default=-1) + 1)]
    if not all(isinstance(value, str) for value in values):
        raise UserError(
            f"column {column!r}: a label must be a number or a word; name another column with ?label=COLUMN"
        )
    return sorted(values)


def _label_values(table: datasets.Dataset, column: str | None, classes: list[str] | None) -> list[int | None] | None:
    if column is None or classes is None:
        return None
    index = {name: i for i, name in enumerate(classes)}
    values = table.with_format(None)[column][:]
    labels = [index[value] if isinstance(value, str) else value for value in values]
    return [label if label is not None and label >= 0 else None for label in labels]


def _image_bytes(value: Any, where: str) -> bytes:
    if isinstance(value, bytes):
        return not_empty(value, where=where)
    if isinstance(value, dict) and value.get("bytes") is not None:
        return not_empty(value["bytes"], where=where)
    if isinstance(value, dict) and value.get("path"):
        return read_file(value["path"])
    raise BadExample("missing image", where, "this row has no image")


def _texts(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    """Captions of one row: a text, a list of texts, or either by language."""
    if value is None:
        return {}
    by_language = value if isinstance(value, dict) else {"en": value}
    texts: dict[str, tuple[str, ...]] = {}
    for language, lines in by_language.items():
        lines = [lines] if isinstance(lines, str) else lines or []
        if not all(isinstance(line, str) for line in lines):
            raise BadExample("bad text", where, "its caption is not a text")
        kept = tuple(line.strip() for line in lines if line.strip())
        texts |= {language: kept} if kept else {}
    return texts


def _parts(columns: dict[str, str]) -> set[Part]:
    roles: tuple[Part, ...] = ("image", "text", "label")
    return {role for role in roles if role in columns}


@contextmanager
def _quiet() -> Iterator[None]:
    """The library's progress bars off, then as they were."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def _offline() -> Iterator[None]:
    """The library reads its cache at once instead of asking a hub that cannot be reached."""
    import datasets.config
    import huggingface_hub.constants

    settings = (datasets.config, huggingface_hub.constants)
    before = [setting.HF_HUB_OFFLINE for setting in settings]
    try:
        for setting in settings:
            setting.HF_HUB_OFFLINE = True
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.HF_HUB_OFFLINE = value


def _hub_resolves() -> bool:
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return False
    if any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # then the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _present(spec: DataSpec) -> bool:
    path = local_path(spec)
    if path.is_dir():  # not searched to the bottom: an image folder of the same name may hold a million files
        marks = ("state.json", "dataset_dict.json", "*.parquet", "*.arrow", "*/*.parquet", "*/*.arrow")
        return any(next(path.glob(mark), None) is not None for mark in marks)
    if path.exists():
        return True
    return (_hub_cache() / spec.path.replace("/", "___")).is_dir()


def _hub_cache() -> Path:
    return cache_dir() / "datasets" / "hub"


READER = Reader(
    name="hf",
    open=_open,
    splits=_splits,
    help="hf:DIR (Parquet or Arrow files) or hf:HUB/NAME; ?image=, label=, text=, split= name columns and split",
    options=_OPTIONS,
    present=_present,
)
