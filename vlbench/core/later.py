"""Importing a library without those that it loads for what is seldom used; they come when they are needed.

Of the four seconds that torch and open_clip took to import, two thirds went into torch's compiler (torchvision asks it
one question), transformers and timm (two kinds of open_clip's towers). Each import here leaves ``sys.modules`` as it
would have been, but for what was left out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo.utils"


@contextlib.contextmanager
def compiler_later() -> Iterator[None]:
    """Let torchvision be imported in this block without torch's compiler.

    ``torchvision.ops`` takes from it the function ``is_compile_supported``, to be asked in ``roi_align``. It gets one
    that hands the question on: the answer is the same. Whatever else is asked for loads the compiler at once.
    """
    if "torch._dynamo" in sys.modules or _COMPILER in sys.modules:
        yield
        return
    stand_in = _StandIn(_COMPILER)
    sys.modules[_COMPILER] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(_COMPILER) is stand_in:
            del sys.modules[_COMPILER]


class _StandIn(ModuleType):
    """``torch._dynamo.utils``, not loaded."""

    @staticmethod
    def is_compile_supported(device_type: Any) -> Any:
        return importlib.import_module(_COMPILER).is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system looks whether it is a package
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return getattr(importlib.import_module(_COMPILER), name)


@contextlib.contextmanager
def absent(*libraries: str) -> Iterator[None]:
    """Let these libraries seem not to be installed, unless they are loaded already: for who can do without."""
    hidden = [name for name in libraries if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: what is imported raises ImportError
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]


def complete_at(module: ModuleType, class_name: str, method: str) -> None:
    """Run a module again that was imported while a library was ``absent``, just before this method's first call.

    What it defines then takes the place of what it had defined without the library, but for its classes: there is one
    of each, to which what was made before and what is made after belongs, and its methods see the library. A call in
    another thread waits until that is done.
    """
    owner = getattr(module, class_name)
    original = getattr(owner, method)
    running = threading.RLock()

    @functools.wraps(original)
    def complete_first(*args: Any, **kwargs: Any) -> Any:
        with running:
            if getattr(owner, method) is complete_first:
                _run_again(module)
                setattr(owner, method, original)
        return original(*args, **kwargs)

    setattr(owner, method, complete_first)


def _run_again(module: ModuleType) -> None:
    own = {name: value for name, value in vars(module).items() if _is_own_class(value, module)}
    importlib.reload(module)
    first_of = {}
    for name, value in own.items():
        again = getattr(module, name)
        if _is_own_class(again, module):  # else the library's, for which it had a makeshift
            first_of[again] = value
            setattr(module, name, value)
    for table in vars(module).values():
        if isinstance(table, dict):  # in which it may list its classes
            listed = {key: value for key, value in table.items() if isinstance(value, type) and value in first_of}
            table.update({key: first_of[value] for key, value in listed.items()})


def _is_own_class(value: Any, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__
