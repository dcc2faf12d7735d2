"""The identity of a user's own code: what a model computes is its weights and the source that computes with them.

Covered: the printed form of the module, the file of the function that built it, and the files of the classes and
functions that it is made of, as far as they are the user's. Not covered: files that these only import from.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

_OF_LIBRARIES = frozenset({"torch", "torchvision", "timm", "open_clip", "vlbench"})
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def is_of_user(backbone: Any) -> bool:
    """Whether a backbone comes from a user's function or ``wrap``, rather than from a library's architecture."""
    return backbone.card.loader == "build" or getattr(backbone, "built_by", None) is not None


def code_fingerprint(backbone: Any) -> str | None:
    """A 16-digit fingerprint of the code behind a user's backbone; None where a part has no source file.

    It does not depend on where the files lie.
    """
    module = getattr(backbone, "module", None)
    files: set[Path | None] = {_file(item) for item in _parts(backbone, module) if not _is_of_library(item)}
    if getattr(backbone, "built_by", None) is not None:
        files.add(_file(_callee(backbone.built_by)))
    contents = set()
    for path in files:
        try:
            contents.add(hashlib.sha256(path.read_bytes()).hexdigest() if path is not None else None)
        except OSError:
            return None
    if None in contents:
        return None
    said = _ADDRESS.sub("", repr(module)) if isinstance(module, nn.Module) else type(backbone).__qualname__
    return hashlib.sha256("\n".join([said, *sorted(contents)]).encode()).hexdigest()[:16]


def has_known_code(backbone: Any) -> bool:
    """Whether everything that a backbone computes is in its fingerprint, so that its features can be kept."""
    return not is_of_user(backbone) or code_fingerprint(backbone) is not None


def _parts(backbone: Any, module: Any) -> Iterator[Any]:
    """Classes and functions that the features come out of."""
    functions = [getattr(backbone, name, None) for name in ("_image_fn", "_text_fn", "_tokenizer")]
    holders = [getattr(function, "__self__", function) for function in functions]
    yield from type(backbone).__mro__
    for root in [module, *holders]:
        for child in root.modules() if isinstance(root, nn.Module) else ():
            yield from type(child).__mro__
    for function in functions:
        if function is not None:
            yield _callee(function)


def _callee(function: Any) -> Any:
    """The function or class that a call of ``function`` runs."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(getattr(function, "__func__", function))
    return function if inspect.isroutine(function) or inspect.isclass(function) else type(function)


def _is_of_library(item: Any) -> bool:
    package = (getattr(item, "__module__", None) or "builtins").partition(".")[0]
    if package in _OF_LIBRARIES or package in sys.stdlib_module_names:
        return True
    path = _file(item)
    return path is not None and bool(_INSTALLED.intersection(path.parts))


def _file(item: Any) -> Path | None:
    module = sys.modules.get(getattr(item, "__module__", None) or "")
    name = getattr(module, "__file__", None)
    return Path(name) if name else None
