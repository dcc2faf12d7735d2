"""Webdataset shards, in the two layouts that the field has.

- img2dataset's, for training: plain tars of ``KEY.jpg``, ``KEY.txt`` (one caption), ``KEY.json`` (perhaps ``KEY.cls``),
  given as a tar, a brace pattern (``'cc3m/{00000..00331}.tar'``) or a folder of tars.
- CLIP_benchmark's, for evaluation: ``DIR/{split}/nshards.txt`` and ``DIR/{split}/N.tar``, with ``classnames.txt``,
  ``zeroshot_classification_templates.txt`` and ``dataset_type.txt`` in ``DIR``; in a retrieval set ``.txt`` holds one
  caption a line, in a multilabel set ``.npy`` holds the labels, one number a class.

A JSON member with ``"captions": {language: [...]}`` gives the texts of every language.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import braceexpand

from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.data.readers.tarindex import index_tar
from vlbench.data.readers.wds_source import Layout, WdsSource
from vlbench.data.sources import Reader, split_table
from vlbench.data.spec import DataSpec, local_path

_TYPES = ("classification", "retrieval", "multilabel")


def _open(spec: DataSpec, split: str | None) -> WdsSource:
    layout = _layout(spec)
    shards = layout.shards if split is None else _shards_of(layout.splits[split])
    indices = [index_tar(path) for path in shards]
    damaged = [index for index in indices if index.damage]
    if damaged and split == "test":
        raise UserError(
            f"{damaged[0].path}: truncated tar: {damaged[0].damage}; a test set must be whole, get it again"
        )
    details = Layout(
        kind=_dataset_type(layout.root),
        classes=_classes(layout.root / "classnames.txt"),
        templates=_templates(layout.root / "zeroshot_classification_templates.txt"),
    )
    source = WdsSource(spec, split, indices, details)
    if not len(source):
        raise UserError(f"data {spec.bare!r}: its {len(shards)} shard(s) hold no sample, for instance {shards[0]}")
    return source


def _splits(spec: DataSpec) -> tuple[str, ...]:
    return tuple(_layout(spec).splits)


def shard_paths(spec: DataSpec) -> tuple[Path, ...]:
    """The tars of unsplit data, in order. Raises UserError where there are none, or where the data have splits."""
    layout = _layout(spec)
    if layout.splits:
        raise UserError(
            f"data {spec.bare!r}: divided into splits ({', '.join(layout.splits)}); name one folder of shards, "
            f"wds:{next(iter(layout.splits.values()))}"
        )
    return layout.shards


@dataclass(frozen=True)
class _Places:
    """Where the shards are: either ``shards`` (unsplit) or ``splits``."""

    root: Path
    """The folder of ``classnames.txt`` and its neighbours."""
    shards: tuple[Path, ...] = ()
    splits: dict[str, Path] = field(default_factory=dict)


def _layout(spec: DataSpec) -> _Places:
    root = local_path(spec)
    if root.is_dir():
        own = sorted(root.glob("*.tar"), key=_natural)
        folders = [path.name for path in root.iterdir() if path.is_dir() and _holds_shards(path)]
        if own and not (root / "nshards.txt").is_file():
            return _Places(root, tuple(own), {})
        if folders:
            return _Places(root, (), {k: root / v for k, v in split_table(folders, str(root)).items()})
        if own:
            return _Places(root, _shards_of(root), {})
        raise UserError(f"data {spec.bare!r}: no .tar file in {root} nor in a split's folder below it")
    return _Places(root.parent, _named_shards(spec, str(root)), {})


def _named_shards(spec: DataSpec, pattern: str) -> tuple[Path, ...]:
    """The files that a brace pattern or a single name stands for, all of which must be there."""
    try:
        names = list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:
        raise UserError(f"data {spec.bare!r}: unbalanced braces; write '{{00000..00331}}.tar'") from None
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        first = Path(missing[0])
        near = [path.name for path in first.parent.glob("*")] if first.parent.is_dir() else []
        hint = unknown("file", first.name, near) if len(names) == 1 else f"{len(missing)} of {len(names)} are missing"
        raise UserError(f"data {spec.bare!r}: there is no {first}; {hint}")
    return tuple(Path(name) for name in names)


def _holds_shards(folder: Path) -> bool:
    return (folder / "nshards.txt").is_file() or next(folder.glob("*.tar"), None) is not None


def _shards_of(folder: Path) -> tuple[Path, ...]:
    """The shards of one split: as many as ``nshards.txt`` says, else every tar in the folder."""
    count_file = folder / "nshards.txt"
    if not count_file.is_file():
        return tuple(sorted(folder.glob("*.tar"), key=_natural))
    text = count_file.read_text(encoding="utf-8").strip()
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{count_file}: expected the number of shards, got {text[:40]!r}")
    shards = tuple(folder / f"{i}.tar" for i in range(int(text)))
    missing = [path for path in shards if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: this shard is missing ({count_file} promises {len(shards)})")
    return shards


def _natural(path: Path) -> list[tuple[int, str]]:
    """``10.tar`` after ``9.tar``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _dataset_type(root: Path) -> str:
    lines = _lines(root / "dataset_type.txt")
    if not lines:
        return "classification" if (root / "classnames.txt").is_file() else "pairs"
    kind = lines[0].lower()
    if kind not in _TYPES:
        raise UserError(f"{root / 'dataset_type.txt'}: {unknown('type of data set', lines[0], _TYPES)}")
    return kind


def _classes(path: Path) -> tuple[str, ...] | None:
    """Class names by line. An empty line is a class with an empty name (CLEVR's "closest object" has one)."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8").rstrip()
    return tuple(line.strip() for line in text.split("\n")) if text else None


def _templates(path: Path) -> tuple[str, ...] | None:
    lines = _lines(path)
    if lines is None:
        return None
    wrong = [line for line in lines if "{c}" not in line and "{}" not in line]
    if wrong:
        raise UserError(f"{path}: a template needs {{c}} where the class name goes: {wrong[0]!r}")
    return tuple(line.replace("{c}", "{}") for line in lines)


def _lines(path: Path) -> tuple[str, ...] | None:
    """The lines of a small text file without blank ones, or None where it is absent. Only a line feed ends a line."""
    if not path.is_file():
        return None
    lines: Sequence[str] = path.read_text(encoding="utf-8").split("\n")
    return tuple(line.strip() for line in lines if line.strip())


def _present(spec: DataSpec) -> bool:
    try:
        _layout(spec)
    except UserError:
        return False
    return True


READER = Reader(
    name="wds",
    open=_open,
    splits=_splits,
    help="wds:DIR, wds:FILE.tar or wds:'DIR/{00000..00331}.tar'; img2dataset's or CLIP_benchmark's layout",
    options={},
    present=_present,
)
