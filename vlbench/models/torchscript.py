"""The weights in a TorchScript archive, read without running any of the code in it.

OpenAI published CLIP in this form. ``torch.jit.load`` would compile the program in the archive; the tensors alone need
none of it. An archive is a zip file: ``data.pkl`` holds the tree of modules as a pickle, ``data/N`` the bytes of each
storage, ``code/`` the program as text. The pickle is read here by an unpickler that knows tensors and plain
containers; a module becomes a bag of attributes, and anything else is refused. The text of the program is searched for
the lists of parameters and buffers, which tell weights from other tensors (an attention mask).
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:  .*\n|\n)*)", re.MULTILINE)
_NAMES = re.compile(r"^  (__parameters__|__buffers__) = \[(.*?)\]", re.MULTILINE | re.DOTALL)


def is_torchscript(path: Path) -> bool:
    """Whether ``path`` is a zip file that holds a program."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _root(archive) is not None
    except (zipfile.BadZipFile, OSError):
        return False


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, as ``torch.jit.load(path).state_dict()`` would give them.

    Raises:
        pickle.UnpicklingError: where the archive holds anything but modules, tensors and plain values.
        Exception: of another kind where it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        root = _root(archive)
        assert root is not None, "not a TorchScript archive"
        reader = _Reader(archive, root)
        top = reader.load()
        if not isinstance(top, _Module):
            raise pickle.UnpicklingError("no module at the top")
        return dict(_weights(top, "", _declared(archive, root)))


def _root(archive: zipfile.ZipFile) -> str | None:
    """The folder inside the archive, with its slash."""
    names = archive.namelist()
    for name in names:
        if name.endswith("/data.pkl") and any(other.startswith(f"{name[:-8]}code/") for other in names):
            return name.removesuffix("data.pkl")
    return None


class _Module:
    """Stands in for every class of the program: its attributes, and nothing that could be called."""

    kind = ""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"{self.kind} with a state of its own")
        self.attributes = state


class _Reader(pickle.Unpickler):
    """Knows how TorchScript writes tensors, containers and modules, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive = archive
        self._root = root
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The harmless stand-in for a name in the pickle."""
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Module,), {"kind": f"{module}.{name}"})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _first,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "build_intlist"): _first,
            ("torch.jit._pickle", "build_doublelist"): _first,
            ("torch.jit._pickle", "build_boollist"): _first,
            ("torch.jit._pickle", "build_tensorlist"): _first,
            ("torch.jit._pickle", "restore_type_tag"): _first,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """The flat tensor over a storage: ``("storage", type, key, device, elements)``."""
        word, dtype, key, _, elements = pid
        if word != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"persistent {word}")
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}data/{key}"))
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            if len(flat) < elements:
                raise EOFError(f"storage {key} has {len(flat)} of {elements} elements")
            self._storages[key] = flat
        return self._storages[key]


def _tensor(storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _first(value: Any, *_: Any) -> Any:
    return value


def _declared(archive: zipfile.ZipFile, root: str) -> dict[str, set[str] | None]:
    """Class → the names of its parameters and buffers; None where the program, of an old PyTorch, lists no buffers."""
    found: dict[str, set[str] | None] = {}
    for file in archive.namelist():
        if not (file.startswith(f"{root}code/") and file.endswith(".py")):
            continue
        module = file.removeprefix(f"{root}code/").removesuffix(".py").replace("/", ".")
        for name, body in _CLASS.findall(archive.read(file).decode("utf-8", "replace")):
            lists = dict(_NAMES.findall(body))
            names = {text.strip(" \"'\n") for listed in lists.values() for text in listed.split(",")} - {""}
            found[f"{module}.{name}"] = names if "__buffers__" in lists else None
    return found


def _weights(module: _Module, prefix: str, declared: dict[str, set[str] | None]) -> Iterator[tuple[str, torch.Tensor]]:
    names = declared.get(module.kind)
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, _Module):
            yield from _weights(value, f"{prefix}{name}.", declared)
        elif isinstance(value, torch.Tensor) and (names is None or name in names):
            yield f"{prefix}{name}", value
