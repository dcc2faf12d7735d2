"""Data specs: how a data set is named on the command line and in a task card.

``kind:path[?key=value&key=value][@weight]``, for instance ``wds:'cc3m/{00000..00331}.tar@2'`` or
``hf:DIR?label=fine_label``. ``shapes`` alone is the embedded world.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote

from vlbench.core.catalog import READERS
from vlbench.core.errors import UserError
from vlbench.core.names import unknown


@dataclass(frozen=True)
class DataSpec:
    """One data set, as named by the user."""

    kind: str
    """Key of ``core.catalog.READERS``."""
    path: str
    """What the reader opens: a file, a folder, a brace pattern, a hub name; empty for ``shapes``."""
    options: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    """Its share in a mixture, relative to the other sources."""
    text: str = ""
    """As it was written."""

    @property
    def bare(self) -> str:
        """The spec without its weight: what a source reports as its ``spec``."""
        options = "&".join(f"{key}={value}" for key, value in self.options.items())
        path = f":{self.path}" if self.path else ""
        return f"{self.kind}{path}{'?' + options if options else ''}"


def parse_spec(text: str) -> DataSpec:
    """Read a data spec.

    The weight is whatever number follows the last ``@``; a folder whose own name ends in ``@2`` needs a weight of its
    own behind it (``DIR@2@1``).

    Raises:
        UserError: for an unknown kind, a bare path (with the spec that was probably meant), a malformed option or a
            weight that is not a positive number.
    """
    body, weight = _split_weight(text)
    location, _, query = body.partition("?")
    kind, colon, path = location.partition(":")
    try:
        READERS.target(kind)
    except UserError:
        raise UserError(_not_a_kind(text, location, kind, READERS.names())) from None
    if not path and kind != "shapes":
        raise UserError(f"data {text!r}: say where it lies, as {kind}:PATH")
    return DataSpec(kind=kind, path=path if colon else "", options=_options(text, query), weight=weight, text=text)


def rebase(text: str, root: Path) -> str:
    """``text`` with a relative path put under ``root``, as task cards mean it.

    Absolute paths, ``~`` paths, specs without a path, and hub names (``hf:`` names for which ``root`` holds no folder)
    stay as they are.
    """
    spec = parse_spec(text)
    # The parts of the embedded world are names, not paths.
    if spec.kind == "shapes" or not spec.path or spec.path.startswith(("/", "~")):
        return text
    moved = root / spec.path
    if spec.kind == "hf" and not moved.exists():
        return text
    weight = f"@{spec.weight:g}" if spec.weight != 1.0 else ""
    return replace(spec, path=os.fspath(moved)).bare + weight


def local_path(spec: DataSpec) -> Path:
    """The spec's path with ``~`` expanded."""
    return Path(spec.path).expanduser()


def _split_weight(text: str) -> tuple[str, float]:
    body, at, tail = text.rpartition("@")
    if not at or "/" in tail or "?" in tail or ":" in tail:
        return text, 1.0
    try:
        weight = float(tail)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight) or weight <= 0:
        raise UserError(f"data {text!r}: the weight after '@' must be a positive number")
    return body, weight


def _options(text: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UserError(f"data {text!r}: write options as ?key=value&key=value, not {pair!r}")
        if key in options:
            raise UserError(f"data {text!r}: option {key!r} is given twice")
        options[key] = unquote(value)
    return options


def _not_a_kind(text: str, location: str, kind: str, kinds: list[str]) -> str:
    path = Path(location).expanduser()
    if path.exists():
        return f"data {text!r}: say what it is, probably {_guess_kind(path)}:{text}"
    if ":" not in location and ("/" in location or "." in location):
        return f"data {text!r}: there is no such file or folder, and no kind of data before it (kind:PATH)"
    return f"data {text!r}: {unknown('kind of data', kind, kinds)}"


def _guess_kind(path: Path) -> str:
    """The reader that what lies at ``path`` was probably made for; the image folder where nothing speaks against it."""
    by_suffix = {".tar": "wds", ".csv": "csv", ".tsv": "csv", ".json": "coco", ".parquet": "hf", ".arrow": "hf"}
    if path.is_file() and path.name.startswith("dataset_") and path.suffix == ".json":
        return "karpathy"
    if path.is_file():
        return by_suffix.get(path.suffix.lower(), "imagefolder")
    marks = {"dataset_dict.json": "hf", "state.json": "hf", "nshards.txt": "wds", "dataset_type.txt": "wds"}
    for pattern in ("*", "*/*"):
        for _, entry in zip(range(200), sorted(path.glob(pattern)), strict=False):
            if entry.name in marks:
                return marks[entry.name]
            if entry.name.startswith(("instances_", "captions_")) and entry.suffix == ".json":
                return "coco"
            if entry.name == "ImageSets":
                return "voc"
            if entry.name.startswith("dataset_") and entry.suffix == ".json":
                return "karpathy"
            if entry.suffix.lower() in {".tar", ".parquet", ".arrow"}:
                return by_suffix[entry.suffix.lower()]
    return "imagefolder"
