"""Region features by path: a VinVL TSV file, or a folder of ``.npz`` files."""

from __future__ import annotations

from pathlib import Path

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.data.regions.features import RegionStore
from vlbench.data.regions.npz import NpzFolder
from vlbench.data.regions.vinvl import VinvlTsv


def open_regions(path: Path | str, *, labels: Path | str | None = None) -> RegionStore:
    """Open region features.

    Args:
        path: a ``.tsv`` file or a folder of ``.npz`` files.
        labels: of a TSV file without objects, the file that has them.

    Raises:
        UserError: where it is neither.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return NpzFolder(path)
    if path.suffix == ".tsv":
        return VinvlTsv(path, labels=labels)
    raise UserError(f"{path}: region features are a .tsv file or a folder of .npz files, and this is neither")


def stamp(path: Path | str) -> str:
    """Which files these are, by their sizes and times: region features are too large to be digested.

    What is not there is an error of whoever reads it.
    """
    path = Path(path).expanduser()
    files = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
    seen = [(file.name, file.stat()) for file in files if file.is_file()]
    return fingerprint([[name, stat.st_size, stat.st_mtime_ns] for name, stat in seen])
