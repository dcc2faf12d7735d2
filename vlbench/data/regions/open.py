"""Region features by path: a VinVL TSV file, or a folder of ``.npz`` files."""

from __future__ import annotations

from pathlib import Path

from vlbench.core.errors import UserError
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
