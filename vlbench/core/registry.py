"""Names to code, resolved on first use.

A registry is a dictionary literal in ``core/catalog.py``: name → ``"module:attribute"``. Nothing is imported
until a name is asked for; entry points of other packages are read only when a name is not ours. No decorators, no
scanning of folders, no side effects at import.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from vlbench.core.errors import UserError
from vlbench.core.names import unknown


class Registry:
    """One table of names.

    Args:
        what: the singular noun for messages (``"recipe"``).
        table: name → ``"package.module:attribute"``.
        group: the entry-point group through which other packages add names.
    """

    def __init__(self, what: str, table: Mapping[str, str], group: str) -> None:
        self.what = what
        self.group = group
        self._table = dict(table)

    def names(self) -> list[str]:
        """All names, those of installed plug-ins included."""
        return sorted({*self._table, *(entry.name for entry in metadata.entry_points(group=self.group))})

    def target(self, name: str) -> str:
        """Where ``name`` lives, as ``module:attribute``, without importing it."""
        if name in self._table:
            return self._table[name]
        for entry in metadata.entry_points(group=self.group):
            if entry.name == name:
                return entry.value
        raise UserError(unknown(self.what, name, self.names()))

    def get(self, name: str) -> Any:
        """The object behind ``name``. Its module is imported now, for the first time."""
        return load_attribute(self.target(name), what=f"{self.what} {name!r}")


def load_attribute(target: str, *, what: str) -> Any:
    """Import ``"package.module:attribute"``.

    Raises:
        UserError: where the text has another form, the module is absent, or it lacks the attribute. An ImportError
            that comes from *inside* the module passes through as it is: hiding it would send the user the wrong way.
    """
    module_name, separator, attribute = target.partition(":")
    if not separator or not module_name or not attribute:
        raise UserError(f"{what}: expected 'package.module:attribute', got {target!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            raise UserError(f"{what}: there is no module {module_name!r}; is its folder on PYTHONPATH?") from None
        raise
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UserError(f"{what}: module {module_name}: {unknown('attribute', attribute, public)}") from None
