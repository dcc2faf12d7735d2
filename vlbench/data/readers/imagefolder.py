"""ImageNet-style folders: ``DIR/{train,val,test}/CLASS/**.jpg``, or ``DIR/CLASS/**.jpg`` without splits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.types import Example
from vlbench.data.images import IMAGE_EXTENSIONS
from vlbench.data.readers.files import OfFiles
from vlbench.data.sources import Reader, canonical_split, split_table
from vlbench.data.spec import DataSpec, local_path

_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_STANDARD = ("train", "val", "test")


class ImageFolderSource(OfFiles):
    """Images under class folders. An id is the path below the split's folder, so that moving the folder keeps it."""

    def __init__(self, spec: DataSpec, split: str | None, folder: Path, classes: Sequence[str]) -> None:
        super().__init__(spec.bare, split, provides=("image", "label"), classes=classes)
        self._folder = os.fspath(folder)
        self._ids: list[str] = []
        self._labels: list[int] = []
        for label, name in enumerate(classes):
            files = images_under(folder / name)
            self._ids += [f"{name}/{file}" for file in files]
            self._labels += [label] * len(files)

    def __len__(self) -> int:
        return len(self._ids)

    def without_images(self, index: int) -> Example:
        """A path and its class."""
        return Example(id=self._ids[index], label=self._labels[index])

    def image_files(self, index: int) -> Mapping[str, str]:
        """The image."""
        return {"image": f"{self._folder}/{self._ids[index]}"}

    def ids(self) -> Sequence[str]:
        """Paths below the split's folder."""
        return self._ids

    def labels(self) -> Sequence[int | None] | None:
        """The class of each image's folder."""
        return list(self._labels)


def _open(spec: DataSpec, split: str | None) -> ImageFolderSource:
    root = _root(spec)
    folders = _split_folders(root)
    folder = root if split is None else folders[split]
    _refuse_loose_images(folder)
    classes = _class_names(folders.get("train", folder))
    own = _class_names(folder)
    for name in own:
        if name not in classes and images_under(folder / name):
            raise UserError(
                f"{folder / name}: this class is missing in {folders['train']}; {unknown('class', name, classes)}"
            )
    if not classes:
        raise UserError(f"{folder}: there are no class folders; images lie in {folder}/CLASS/NAME.jpg")
    source = ImageFolderSource(spec, split, folder, classes)
    if not len(source):
        shown = ", ".join(IMAGE_EXTENSIONS)
        raise UserError(f"{folder}: there is no image in its class folders; looked for {shown}")
    if split in (None, "train"):
        _refuse_empty_classes(source, folder)
    return source


def _splits(spec: DataSpec) -> tuple[str, ...]:
    return tuple(_split_folders(_root(spec)))


def _root(spec: DataSpec) -> Path:
    root = local_path(spec)
    if not root.exists():
        siblings = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"data {spec.bare!r}: there is no folder {root}; {unknown('folder', root.name, siblings)}")
    if not root.is_dir():
        raise UserError(f"data {spec.bare!r}: {root} is a file, not a folder of class folders")
    return root


def _split_folders(root: Path) -> dict[str, Path]:
    """Standard split → its folder; empty where ``root`` itself holds the class folders."""
    names = [name for name in _folders(root) if canonical_split(name) in _STANDARD]
    table = split_table(names, os.fspath(root))
    return {standard: root / name for standard, name in table.items()}


def _class_names(folder: Path) -> list[str]:
    return _folders(folder)


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def images_under(folder: Path) -> list[str]:
    """Image files below ``folder``, nested ones included, as sorted relative paths; hidden files are left out."""
    found: list[str] = []
    if not folder.is_dir():
        return found
    base = os.fspath(folder)
    for parent, folders, files in os.walk(base, followlinks=True, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = "" if parent == base else os.path.relpath(parent, base).replace(os.sep, "/") + "/"
        found += [inner + name for name in files if name.lower().endswith(_SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def _present(spec: DataSpec) -> bool:
    """Whether some class folder holds an image: a folder of shards under the same name is no image folder."""
    root = local_path(spec)
    if not root.is_dir():
        return False
    try:
        tops = list(_split_folders(root).values()) or [root]
    except UserError:
        return True  # opening them says what is wrong
    return any(_holds_image(top / name) for top in tops for name in _folders(top))


def _holds_image(folder: Path) -> bool:
    return any(name.lower().endswith(_SUFFIXES) for _, _, files in os.walk(folder) for name in files)


def _unreadable(error: OSError) -> None:
    # os.walk would leave the folder out in silence.
    raise UserError(f"{error.filename}: cannot be listed: {error.strerror}")


def _refuse_loose_images(folder: Path) -> None:
    with os.scandir(folder) as entries:
        loose = sorted(entry.name for entry in entries if entry.name.lower().endswith(_SUFFIXES) and entry.is_file())
    if loose:
        raise UserError(
            f"{folder / loose[0]}: {len(loose)} image(s) lie beside the class folders; move each into {folder}/CLASS/"
        )


def _refuse_empty_classes(source: ImageFolderSource, folder: Path) -> None:
    assert source.classes is not None, "an image folder has classes"
    filled = set(source.labels() or ())
    for label, name in enumerate(source.classes):
        if label not in filled:
            raise UserError(f"{folder / name}: this class folder holds no image; add some or remove the folder")


READER = Reader(
    name="imagefolder",
    open=_open,
    splits=_splits,
    help="imagefolder:DIR, with DIR/{train,val,test}/CLASS/*.jpg or DIR/CLASS/*.jpg",
    options={},
    present=_present,
)
