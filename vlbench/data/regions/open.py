"""Region features by path: a VinVL TSV file, or a folder of ``.npz`` files.

Where a TSV file's objects lie in a second one, the path may name it: ``features.tsv?labels=labels.tsv``. So tasks need
no setting more than ``features``: a stored result holds all of its settings, and one more would set it apart from
those that were measured before.
"""

from __future__ import annotations

from pathlib import Path

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.data.regions.features import RegionStore
from vlbench.data.regions.npz import NpzFolder
from vlbench.data.regions.vinvl import VinvlTsv

_LABELS = "?labels="


def open_regions(path: Path | str, *, labels: Path | str | None = None) -> RegionStore:
    """Open region features.

    Args:
        path: a ``.tsv`` file (with ``?labels=FILE`` or without) or a folder of ``.npz`` files.
        labels: of a TSV file without objects, the file that has them.

    Raises:
        UserError: where it is neither, or there are labels of a folder, or two files of them.
    """
    path, named = _split(path)
    if named is not None and labels is not None:
        raise UserError(f"{path}: two files of labels, {named} and {labels}; name one")
    labels = named if labels is None else Path(labels).expanduser()
    if path.is_dir():
        if labels is not None:
            raise UserError(f"{path}: a folder of .npz files has its labels in them; leave the labels {labels} out")
        return NpzFolder(path)
    if path.suffix == ".tsv":
        return VinvlTsv(path, labels=labels)
    raise UserError(f"{path}: region features are a .tsv file or a folder of .npz files, and this is neither")


def stamp(path: Path | str, *, labels: Path | str | None = None) -> str:
    """Which files these are, by their sizes and times: region features are too large to be digested.

    What is not there is an error of whoever reads it.
    """
    path, named = _split(path)
    labels = named if labels is None else Path(labels).expanduser()
    files = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
    files += [labels] if labels is not None else []
    seen = [(file.name, file.stat()) for file in files if file.is_file()]
    return fingerprint([[name, stat.st_size, stat.st_mtime_ns] for name, stat in seen])


def _split(path: Path | str) -> tuple[Path, Path | None]:
    """The features and, where the path names it, the file of labels."""
    features, separator, labels = str(path).partition(_LABELS)
    return Path(features).expanduser(), Path(labels).expanduser() if separator else None
