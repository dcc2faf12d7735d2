"""Region features as one ``.npz`` file an image, in the layout of bottom-up-attention's PyTorch port.

Keys: ``x`` (N, D), ``bbox`` (N, 4) corners in pixels, ``image_w``, ``image_h``; of our own files also ``tags`` and
``scores``. Nothing is unpickled: a file whose arrays hold Python objects is refused where they are needed, and the
port's ``info`` is never looked at.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.core.files import atomic_writer
from vlbench.data.regions.features import BAD_REGIONS, RegionFeatures, checked_regions

_NEEDED = ("x", "bbox", "image_w", "image_h")


class NpzFolder:
    """A folder of ``<id>.npz``; an id with slashes lies in folders.

    Raises:
        UserError: where there is no such folder, or no ``.npz`` in it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: there is no such folder of region features")
        paths = sorted(self.folder.rglob("*.npz"))
        self._ids = [path.relative_to(self.folder).as_posix().removesuffix(".npz") for path in paths]
        self._known = frozenset(self._ids)
        if not self._ids:
            raise UserError(f"{self.folder}: there is no .npz file in it")

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._known

    def __getitem__(self, image_id: str) -> RegionFeatures:
        """The regions of an image. Raises KeyError, or BadExample where its file is damaged."""
        if image_id not in self._known:
            raise KeyError(f"{self.folder} holds no {image_id}.npz")
        return read_npz(npz_path(self.folder, image_id))

    def tags(self, image_id: str) -> tuple[str, ...]:
        """The classes of an image's regions. Raises as ``[image_id]``."""
        if image_id not in self._known:
            raise KeyError(f"{self.folder} holds no {image_id}.npz")
        return read_tags(npz_path(self.folder, image_id))

    def ids(self) -> Sequence[str]:
        """All ids, by name."""
        return self._ids


def npz_path(folder: Path, image_id: str) -> Path:
    """Where an image's file lies. Raises UserError for an id that would leave the folder."""
    parts = PurePosixPath(image_id).parts
    if not parts or ".." in parts or image_id.startswith("/"):
        raise UserError(f"the id {image_id!r} cannot be a file name in {folder}")
    return folder / f"{image_id}.npz"


def read_npz(path: Path | str) -> RegionFeatures:
    """One file. Raises BadExample where it cannot be read, lacks a key, or says what cannot be."""
    where = str(path)
    values = _arrays(path, _NEEDED, ("tags", "scores"))
    sides = [values[key].reshape(-1) for key in ("image_w", "image_h")]
    if any(len(side) != 1 for side in sides):
        raise BadExample(BAD_REGIONS, where, "image_w and image_h are not one number each")
    return checked_regions(
        values["x"],
        values["bbox"],
        size=(sides[0][0], sides[1][0]),
        tags=values["tags"].reshape(-1).tolist() if "tags" in values else (),
        scores=values.get("scores"),
        where=where,
    )


def read_tags(path: Path | str) -> tuple[str, ...]:
    """The classes of one file's regions, without its features; none where it names none. Raises as ``read_npz``."""
    values = _arrays(path, ("bbox",), ("tags",))
    tags = tuple(map(str, values["tags"].reshape(-1).tolist())) if "tags" in values else ()
    if tags and len(tags) != len(values["bbox"]):
        raise BadExample(BAD_REGIONS, str(path), f"{len(values['bbox'])} boxes, {len(tags)} tags")
    return tags


def write_npz(path: Path | str, regions: RegionFeatures) -> None:
    """Write one file, whole or not at all."""
    arrays = {
        "x": regions.features_ND,
        "bbox": regions.boxes_N4,
        "image_w": np.array(regions.width),
        "image_h": np.array(regions.height),
        "num_bbox": np.array(len(regions)),
        "tags": np.array(regions.tags, dtype=np.str_),
    }
    if regions.scores_N is not None:
        arrays["scores"] = regions.scores_N
    with atomic_writer(path) as handle:
        np.savez(handle, **arrays)  # type: ignore[arg-type]


def _arrays(path: Path | str, needed: Sequence[str], others: Sequence[str]) -> dict[str, np.ndarray]:
    """Some arrays of one file; ``others`` where it has them. Raises BadExample."""
    where = str(path)
    try:
        with np.load(path, allow_pickle=False) as data:
            missing = [key for key in needed if key not in data]
            if missing:
                raise BadExample(
                    BAD_REGIONS, where, f"it has no {missing[0]!r}, only {', '.join(data.files) or 'nothing'}"
                )
            return {key: data[key] for key in (*needed, *others) if key in data}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        if isinstance(error, BadExample):
            raise
        raise BadExample(BAD_REGIONS, where, f"cannot be read: {str(error)[:120]}") from None
