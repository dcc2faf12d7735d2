"""Typed settings: frozen, closed to unknown keys, changed from the command line by ``--set a.b=value``.

Every card and every recipe's hyper-parameters are subclasses of ``Config``. An unknown key is an error that names
the file, the key and the nearest valid key, never a setting that silently did nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vlbench.core.errors import UserError
from vlbench.core.names import unknown

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """The base of every card and every group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def parse(kind: type[C], values: Mapping[str, Any], *, where: str) -> C:
    """Build a ``kind`` from plain values.

    Args:
        kind: the Config class.
        values: nested plain mappings, as YAML or JSON gives them.
        where: what to call the source in an error, usually a file.

    Raises:
        UserError: with one line naming ``where``, the key, and the nearest valid key or the expected type.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(kind, error)}") from None


def override(config: C, assignments: Iterable[str]) -> C:
    """``config`` with ``key.path=value`` assignments applied and checked against the types.

    Values are read as YAML, so ``true``, ``3``, ``1e-3``, ``null`` and ``[1, 2]`` mean what they look like.
    """
    values = config.model_dump()
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise UserError(f"--set {assignment}: write it as key=value, for instance optim.lr=3e-4")
        *parents, last = path.split(".")
        node: Any = values
        for depth, part in enumerate([*parents, last]):
            if not isinstance(node, dict):
                raise UserError(f"--set {assignment}: {'.'.join(parents[:depth])} is a value, not a group of settings")
            if part not in node and not _is_free_mapping(type(config), parents[:depth]):
                raise UserError(f"--set {assignment}: {unknown('setting', part, node)}")
            if depth < len(parents):
                node = node.setdefault(part, {})
        node[last] = _scalar(text)
    return parse(type(config), values, where="--set " + " ".join(assignments))


def tree(assignments: Iterable[str]) -> dict[str, Any]:
    """``key.path=value`` assignments as nested mappings, values read as ``override`` reads them; nothing is checked."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise UserError(f"--set {assignment}: write it as key=value, for instance optim.lr=3e-4")
        *parents, last = path.split(".")
        node = values
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {assignment}: {part} is a value there, not a group of settings")
        node[last] = _scalar(text)
    return values


def difference(config: Config, base: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which ``config`` differs from ``base``: dotted key → (base's value, config's value)."""
    mine, theirs = flatten(config.model_dump(mode="json")), flatten(base.model_dump(mode="json"))
    keys = sorted(mine.keys() | theirs.keys())
    return {key: (theirs.get(key), mine.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 (no dot) as a string; for a number that is never what was meant.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _is_free_mapping(kind: Any, path: list[str]) -> bool:
    """Whether the field at ``path`` is an open mapping (``dict[str, Any]``), whose keys are the user's own."""
    for depth, part in enumerate(path):
        fields = getattr(kind, "model_fields", None)
        if fields is None or part not in fields:
            return depth > 0
        kind = fields[part].annotation
    return not hasattr(kind, "model_fields")


def _explain(kind: type[Config], error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            problems.append(unknown("key", path, _known_keys(kind, problem["loc"])))
        elif problem["type"] == "missing":
            problems.append(f"key {path!r} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = f" (got {problem['input']!r})" if not isinstance(problem["input"], dict) else ""
            problems.append(f"{path}: {message}{shown}" if path else message)
    return "; ".join(problems)


def _known_keys(kind: Any, location: tuple[int | str, ...]) -> list[str]:
    """The valid dotted keys beside the unknown one, so that the guess can be pasted as it is."""
    prefix = ""
    for part in location[:-1]:
        field = getattr(kind, "model_fields", {}).get(str(part))
        if field is None:
            return []
        kind = field.annotation
        prefix += f"{part}."
    return [prefix + name for name in getattr(kind, "model_fields", {})]
