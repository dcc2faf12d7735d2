"""Multi30k: Flickr30k's captions in several languages, as line files with a list of image names per split.

``multi30k:DIR`` reads ``SPLIT.LANG`` (task 1, one caption an image) or ``SPLIT.N.LANG`` (task 2, several), plain or
``.gz``, with the names in ``SPLIT.txt`` or ``SPLIT_images.txt`` beside them or in ``image_splits``. ``DIR`` may be the
checkout of the data set's repository. Without the images, which are Flickr30k's, the texts can still be read; ``vlbench
data check`` counts every entry as bad then, for no task runs on it.
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from vlbench.core.errors import BadExample, UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example, Part
from vlbench.data.readers.files import OfFiles
from vlbench.data.sources import Reader, split_table
from vlbench.data.spec import DataSpec, local_path

_OPTIONS = {"images": "the folder of the images (Flickr30k's), where it is not beside the texts"}
_TEXT = re.compile(r"(?P<split>(?:train|val|test)\w*)(?:\.(?P<number>\d+))?\.(?P<language>[a-z]{2})(?:\.gz)?")
_NO_LANGUAGE = {"gz", "md", "py", "sh"}
_INNER = ("", "raw", "data/task1/raw")
_FLICKR = ("images", "flickr30k-images", "flickr30k_images")
_OTHERS = (*_FLICKR, *(f"flickr30k/{name}" for name in _FLICKR))
_NAMED = 3  # images that are missing
_STANDARD = {"test_2016_flickr": "test", "test_2016": "test"}
"""The 2016 test set is what "Multi30k test" means; the later ones keep their names."""


class Multi30kSource(OfFiles):
    """One split. An id is the image's name in the split's list."""

    def __init__(
        self,
        spec: DataSpec,
        split: str,
        names: Sequence[str],
        texts: Mapping[str, Sequence[tuple[str, ...]]],
        images: Path | None,
    ) -> None:
        parts: set[Part] = {"text", "image"} if images is not None else {"text"}
        super().__init__(spec.bare, split, provides=parts)
        self._names = names
        self._texts = texts
        self._images = os.fspath(images) if images is not None else None
        self.absent: dict[Part, str] = {}
        if images is None:
            looked = f"none of {', '.join(_FLICKR)} beside the texts"
            self.absent["image"] = f"no folder of images: {looked}; name Flickr30k's with ?images=DIR"

    def __len__(self) -> int:
        return len(self._names)

    def without_images(self, index: int) -> Example:
        """A name and its captions by language."""
        texts = {language: captions[index] for language, captions in self._texts.items()}
        return Example(id=self._names[index], texts=texts)

    def image_files(self, index: int) -> Mapping[str, str]:
        """The image, where there are images."""
        file = self._names[index].partition("#")[0]  # the COCO test set of 2017 names caption and image
        return {} if self._images is None else {"image": f"{self._images}/{file}"}

    def _image_bytes(self, file: str, example: Example) -> bytes:
        try:
            return super()._image_bytes(file, example)
        except BadExample as error:
            if error.kind != "missing file":
                raise
            raise BadExample(error.kind, error.where, error.reason + self._how_many_are_missing) from None

    @cached_property
    def _how_many_are_missing(self) -> str:
        """Said with the first of them that is met: one image that was lost, or half of the download."""
        files = list(dict.fromkeys(self.image_files(index)["image"] for index in range(len(self))))
        missing = [Path(file).name for file in files if not Path(file).is_file()]
        if len(missing) < 2:
            return ""
        shown = ", ".join(missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
        return f"; {len(missing):,} of the split's {len(files):,} images are missing in {self._images}: {shown}"

    def ids(self) -> Sequence[str]:
        """The lines of the split's list."""
        return self._names

    def labels(self) -> Sequence[int | None] | None:
        """None: captions only."""
        return None


def _open(spec: DataSpec, split: str | None) -> Multi30kSource:
    assert split is not None, "Multi30k always has splits"
    folder = _folder(spec)
    files = _text_files(folder)
    own = _split_names(files, folder)[split]
    list_file = _list_file(spec, folder, own)
    names = _lines(list_file)
    _refuse_repeated(names, list_file)
    texts = {language: _captions(paths, list_file, len(names)) for language, paths in files[own].items()}
    return Multi30kSource(spec, split, names, texts, _image_folder(spec, folder))


def _splits(spec: DataSpec) -> tuple[str, ...]:
    folder = _folder(spec)
    return tuple(_split_names(_text_files(folder), folder))


def _split_names(files: Mapping[str, object], folder: Path) -> dict[str, str]:
    """Standard split → the files' own name for it."""
    plain = {_STANDARD.get(name, name): name for name in files}
    if len(plain) < len(files):
        raise UserError(f"{folder}: test_2016 (task 2) and test_2016_flickr (task 1) lie together; keep them apart")
    return {standard: plain[name] for standard, name in split_table(plain, str(folder)).items()}


def _folder(spec: DataSpec) -> Path:
    """The folder of the line files."""
    root = local_path(spec)
    if not root.is_dir():
        near = [path.name for path in root.parent.glob("*")] if root.parent.is_dir() else []
        raise UserError(f"data {spec.bare!r}: there is no folder {root}; {unknown('folder', root.name, near)}")
    for inner in _INNER:
        if (root / inner).is_dir() and _text_files(root / inner):
            return root / inner
    raise UserError(f"data {spec.bare!r}: there is no SPLIT.LANG or SPLIT.LANG.gz in {root}, for instance val.en")


def _text_files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Split → language → its files, one for every caption an image has. A plain file is preferred to its ``.gz``."""
    found: dict[str, dict[str, dict[str, Path]]] = {}
    for path in sorted(folder.iterdir()):
        match = _TEXT.fullmatch(path.name)
        if match is None or match["language"] in _NO_LANGUAGE or not path.is_file():
            continue
        languages = found.setdefault(match["split"], {})
        languages.setdefault(match["language"], {}).setdefault(match["number"] or "", path)
    return {
        split: {language: [numbered[n] for n in sorted(numbered)] for language, numbered in languages.items()}
        for split, languages in found.items()
    }


def _list_file(spec: DataSpec, folder: Path, split: str) -> Path:
    for place in (folder, folder / "image_splits", folder.parent / "image_splits"):
        for name in (f"{split}.txt", f"{split}_images.txt"):
            if (place / name).is_file():
                return place / name
    raise UserError(
        f"data {spec.bare!r}: there is no list of image names {split}.txt in {folder} nor in image_splits beside it; "
        "it is in the folder image_splits of the Multi30k repository"
    )


def _captions(paths: Sequence[Path], list_file: Path, count: int) -> list[tuple[str, ...]]:
    columns = [_lines(path) for path in paths]
    for path, lines in zip(paths, columns, strict=True):
        if len(lines) != count:
            raise UserError(f"{path}: {len(lines)} lines, but {list_file} names {count} images")
    return list(zip(*columns, strict=True))


def _lines(path: Path) -> list[str]:
    """The lines of a file; only a line feed ends one: str.splitlines would also cut at U+2028."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
            text = handle.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError) as error:  # gzip's errors are among these
        raise UserError(f"{path}: cannot be read: {error}") from None
    lines = [line.strip() for line in text.split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise UserError(f"{path}, line {lines.index('') + 1}: it is empty; every image has one line")
    if not lines:
        raise UserError(f"{path}: it has no lines")
    return lines


def _refuse_repeated(names: Sequence[str], file: Path) -> None:
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if first.setdefault(name, number) != number:
            raise UserError(f"{file}: {name!r} stands in line {first[name]} and again in line {number}")


def _image_folder(spec: DataSpec, folder: Path) -> Path | None:
    if "images" in spec.options:
        named = Path(spec.options["images"]).expanduser()
        images = named if named.is_absolute() or named.is_dir() else local_path(spec) / named
        if not images.is_dir():
            raise UserError(f"data {spec.bare!r}: there is no folder of images {images}")
        return images
    root = local_path(spec)
    places = [folder / name for name in _FLICKR] + [base / name for base in (root, root.parent) for name in _OTHERS]
    return next((place for place in places if place.is_dir()), None)


def _present(spec: DataSpec) -> bool:
    """Whether texts and images are there: the texts alone can be read, and are no task's data."""
    try:
        return _image_folder(spec, _folder(spec)) is not None
    except UserError:
        return False


READER = Reader(
    name="multi30k",
    open=_open,
    splits=_splits,
    help="multi30k:DIR with SPLIT.LANG[.gz] line files and SPLIT.txt, the list of images; ?images=DIR",
    options=_OPTIONS,
    present=_present,
)
