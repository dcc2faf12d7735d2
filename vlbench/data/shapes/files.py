"""How the world's files are written: the same bytes on every machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """JSON with sorted keys, in one line unless indented."""
    separators = None if indent else (",", ":")
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent, separators=separators).encode()


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """One JSON value and a line end, in a folder that is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_bytes(value, indent) + b"\n")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json_bytes(value) + b"\n" for value in values))


def write_text(path: Path, text: str) -> None:
    """UTF-8, line ends as they are."""
    path.write_bytes(text.encode())
