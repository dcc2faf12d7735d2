"""What the readers of annotation files share: JSON with a clear line for what is broken, and where the images lie.

Annotations are checked whole when a split is opened, since a test set without one of them would be another test set;
images are read one by one, and an image that is not there is named then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlbench.core.errors import BadExample, UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example
from vlbench.data.images import read_file
from vlbench.data.readers.files import OfFiles
from vlbench.data.spec import DataSpec, local_path

IMAGES_OPTION = {"images": "the folder of the images, where it is not beside the annotations"}

_SHOWN = 40
_TRIED = 20  # images of which one must be there for a folder to be the folder of the images
_WORDS: Mapping[Any, str] = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


class AsksOfFiles(OfFiles):
    """A source whose images are files of their own, as a rule with several examples about each.

    Where one cannot be read, the error says also who wanted it; whoever digests images reads each once.
    """

    unit = ""
    """What an id is called where its image cannot be read, and a space."""

    def _image_bytes(self, file: str, example: Example) -> bytes:
        return image_of(file, f"{self.unit}{example.id}")


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises UserError where it cannot be read, with the line of the first error."""
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None


def read_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``("FILE, line N", object)`` for each line of a file of JSON lines; empty lines are passed over.

    Raises:
        UserError: where the file cannot be read or a line is no JSON object, with the number of the line.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
        yield where, _object(item, where)


def objects(content: Any, key: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``("FILE, KEY N", object)`` for each entry of the list ``content[key]``, counted from 0."""
    items = content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list) or not items:
        raise UserError(f"{file}: expected an object with a list {key!r}")
    for number, item in enumerate(items):
        where = f"{file}, {key} {number}"
        yield where, _object(item, where)


def field(item: Mapping[str, Any], key: str, kind: type[Any], where: str) -> Any:
    """``item[key]``, which must be of that kind, and not empty where it is a text.

    Raises:
        UserError: naming the place and the key.
    """
    if key not in item:
        raise UserError(f"{where}: {key!r} is missing")
    value = item[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {key!r} must be {_WORDS[kind]}, not {shown(value)}")
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{where}: {key!r} is empty")
    return value


def shown(value: Any) -> str:
    """A value in an error line, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def refuse_repeated(id_: Any, where: str, seen: dict[Any, str], what: str) -> None:
    """Note ``id_`` in ``seen``. Raises UserError, naming both places, where it is there already."""
    first = seen.setdefault(id_, where)
    if first is not where:
        before = first.rpartition(", ")[2]
        raise UserError(f"{where}: {what} {id_!r} was given before, in {before}; each must be there once")


def split_files(
    spec: DataSpec, pattern: re.Pattern[str], inner: Sequence[str], expected: str | None
) -> dict[str, Path]:
    """The data's own split name, which is the pattern's group ``split``, to its file.

    Looked for in ``inner`` folders of the spec's path, the first that has any.

    Args:
        spec: the data.
        pattern: of a whole file name.
        inner: folders, "" for the path itself.
        expected: what to say is missing where there is no such file; None: there may be none.

    Raises:
        UserError: where there is no such folder or file, or two files mean one split.
    """
    root = local_path(spec)
    if not root.is_dir():
        near = [path.name for path in root.parent.glob("*")] if root.parent.is_dir() else []
        raise UserError(f"data {spec.bare!r}: there is no folder {root}; {unknown('folder', root.name, near)}")
    for folder in (root / name for name in inner):
        found: dict[str, Path] = {}
        for path in sorted(folder.glob("*")):
            match = pattern.fullmatch(path.name)
            if match is None:
                continue
            if match["split"] in found:
                raise UserError(f"{folder}: {found[match['split']].name} and {path.name} are one split; keep one")
            found[match["split"]] = path
        if found:
            return found
    if expected is not None:
        raise UserError(f"data {spec.bare!r}: there is no {expected} in {root}")
    return {}


def image_folders(spec: DataSpec, names: Sequence[str]) -> list[Path]:
    """The folders that exist of those where images are looked for, the likeliest first.

    ``?images=DIR`` alone where it is given, else below the path and the folder above it; in each of them under
    ``names`` and directly.

    Raises:
        UserError: where ``?images=`` names no folder.
    """
    root = local_path(spec)
    root = root.parent if root.is_file() else root
    bases = [root, root / "images", root.parent, root.parent / "images"]
    if "images" in spec.options:
        named = Path(spec.options["images"]).expanduser()
        base = named if named.is_absolute() or named.is_dir() else root / named
        if not base.is_dir():
            raise UserError(f"data {spec.bare!r}: there is no folder of images {base}")
        bases = [base]
    places = [base / name for base in bases for name in names] + bases
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def find_images(spec: DataSpec, folders: Sequence[Path], spellings: Sequence[Sequence[str]]) -> tuple[str, int] | None:
    """The folder of the images and the spelling of their names, or None where no image was found.

    Args:
        spec: the data.
        folders: where to look.
        spellings: for each way to name the images, the names of the first of them. A folder is taken where one of
            these is there: some may be missing, and are named when they are read.

    Raises:
        UserError: where none was found although ``?images=`` says where they are.
    """
    for folder in folders:
        for number, names in enumerate(spellings):
            if any((folder / name).is_file() for name in names[:_TRIED]):
                return str(folder), number
    if "images" in spec.options:
        names = " or ".join(dict.fromkeys(names[0] for names in spellings if names))
        raise UserError(f"data {spec.bare!r}: the images are not there, for instance {names}")
    return None


def image_of(path: str, who: str) -> bytes:
    """The bytes of an image that an annotation names. Raises BadExample as ``read_file`` does, with who wanted it."""
    try:
        return read_file(path)
    except BadExample as error:
        raise BadExample(error.kind, error.where, f"{error.reason}; it is the image of {who}") from None


def _object(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object, got {shown(item)}")
    return item
