"""The result store: one JSON file for one model on one task, and beside it the per-example rows.

``<root>/<model>/<task>@v<version>.json`` and ``.parquet``. A task is stored the moment it is finished; a killed run
loses nothing that was finished and leaves nothing half-written. What is damaged is said, with the command that makes
it again, and never averaged into a table.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from vlbench.core.cards import task_cards
from vlbench.core.config import flatten, parse
from vlbench.core.errors import UserError
from vlbench.core.files import atomic_writer, write_text
from vlbench.core.names import slug, unknown
from vlbench.core.types import RESULT_SCHEMA_VERSION, ExamplesRef, Result, Rows
from vlbench.store.examples import rows_from_parquet, rows_to_parquet

NO_EXAMPLES = ExamplesRef(file="", sha256="", rows=0)
"""What a result says of its rows before it is saved."""


@dataclass(frozen=True)
class Scan:
    """What a results folder holds."""

    results: tuple[Result, ...]
    """Sorted by model, task, version and, last, file."""
    problems: tuple[str, ...]
    """One line for each file that could not be used."""


class ResultStore:
    """Results under one folder, which is made by the first save."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def path(self, model: str, task: str, version: int) -> Path:
        """Where the result of ``model`` on ``task`` lies. Every part of both names becomes a safe file name."""
        parts = [slug(part) for part in task.split("/")]
        return self.root.joinpath(slug(model), *parts[:-1], f"{parts[-1]}@v{version}.json")

    def save(self, result: Result, rows: Rows) -> Result:
        """Store ``result`` with its ``rows`` and return it with ``examples`` filled in.

        A result of the same model, task and version is replaced. Safe beside other writers.

        Raises:
            UserError: where another model or task already has this file (two names that differ only in signs which
                file names lack), or a value is not finite.
        """
        path = self.path(result.model.name, result.task, result.task_version)
        data = rows_to_parquet(rows)
        reference = ExamplesRef(file=_rows_path(path).name, sha256=hashlib.sha256(data).hexdigest(), rows=len(rows))
        result = result.model_copy(update={"examples": reference})
        text = _to_json(result, path)
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / ".lock"):
            self._make_room(path, result)
            with atomic_writer(_rows_path(path)) as handle:
                handle.write(data)
            write_text(path, text)
        return result

    def load(self, model: str, task: str, version: int | None = None) -> Result:
        """The stored result of ``model`` on ``task``; ``version`` None is the newest.

        Raises:
            UserError: where there is none (with the nearest name that there is), or it is damaged.
        """
        if version is None:
            stem = self.path(model, task, 1).name.rpartition("@v")[0]
            folder = self.path(model, task, 1).parent
            versions = [_version(path) for path in folder.glob(f"{stem}@v*.json")] if folder.is_dir() else []
            version = max(versions, default=1)
        path = self.path(model, task, version)
        if path.is_file():
            return self._read(path)
        results = self.scan().results
        names = {result.model.name for result in results}
        if model not in names:
            raise UserError(f"{self.root}: {unknown('model', model, names)}")
        tasks = {result.task for result in results if result.model.name == model} - {task}
        raise UserError(f"{self.root}: {model} has no result on {task!r} (v{version}): {unknown('task', task, tasks)}")

    def rows(self, result: Result) -> Rows:
        """The per-example rows behind a stored ``result``, checked against its checksum. Raises UserError."""
        path = self.path(result.model.name, result.task, result.task_version)
        again = self._redo(result)
        if result.examples.file != _rows_path(path).name:
            raise UserError(f"{path}: its rows are said to be in {result.examples.file!r}; {again}")
        return rows_beside(path, result, again=again)

    def scan(self) -> Scan:
        """Every stored result, and a line for each file that is damaged."""
        results, problems = [], []
        for path in sorted(self.root.rglob("*@v*.json")):
            if path.name.startswith("."):
                continue
            try:
                results.append(self._read(path))
            except UserError as error:
                if path.exists():  # else another process has just replaced it
                    problems.append(str(error))
        results.sort(key=lambda result: (result.model.name, result.task, result.task_version))
        return Scan(tuple(results), tuple(problems))

    def all(self) -> list[Result]:
        """Every stored result by model, task and version. Raises UserError where one is damaged: see ``scan``."""
        scan = self.scan()
        if scan.problems:
            more = f" (and {len(scan.problems) - 1} more)" if len(scan.problems) > 1 else ""
            raise UserError(scan.problems[0] + more)
        return list(scan.results)

    def find(
        self,
        model: str | None = None,
        task: str | None = None,
        *,
        backbone_fingerprint: str | None = None,
        task_fingerprint: str | None = None,
    ) -> list[Result]:
        """The undamaged results that agree with everything asked for."""
        return [
            result
            for result in self.scan().results
            if model in (None, result.model.name)
            and task in (None, result.task)
            and backbone_fingerprint in (None, result.model.backbone_fingerprint)
            and task_fingerprint in (None, result.task_fingerprint)
        ]

    def _make_room(self, path: Path, result: Result) -> None:
        """Take an older result of the same name away before its rows are replaced.

        A writer killed between the two files then leaves rows without a result, which count as not evaluated; the
        other order would leave a result beside rows that are not its own.
        """
        if not path.is_file():
            return
        try:
            old = self._read(path)
        except UserError:
            old = None
        if old is not None and (old.model.name, old.task) != (result.model.name, result.task):
            raise UserError(
                f"{path}: already holds {old.model.name} on {old.task}; give this model another name with --name"
            )
        if old is None or old.examples != result.examples:
            path.unlink()

    def _read(self, path: Path) -> Result:
        model, _, task = path.relative_to(self.root).as_posix().partition("/")
        again = f"make it again: {_eval(model, task.rpartition('@v')[0])} --results {self.root} --force"
        result = result_in(path, again=again)
        if self.path(result.model.name, result.task, result.task_version) != path:
            raise UserError(
                f"{path}: holds {result.model.name} on {result.task} v{result.task_version}, which belongs elsewhere;"
                " move or delete it"
            )
        return result

    def _redo(self, result: Result) -> str:
        """The command that makes ``result`` again."""
        model, own = result.model, result.task not in task_cards()
        words = _eval(model.spec, result.task.partition("/")[0] if own else result.task)
        if own:  # the user's own data have no card to be named by
            words += f" --data {shlex.quote(result.data.spec)}"
        return f"make it again: {words} --name {shlex.quote(model.name)} --results {self.root} --force"


def result_in(path: Path, *, again: str = "ask for it again where it came from") -> Result:
    """The stored result in one file, wherever that lies: in a store, or by itself, as somebody else sent it.

    Args:
        path: the JSON file.
        again: how to make it again, for the complaint about a damaged one.

    Raises:
        UserError: where the file is absent, damaged, or of a newer schema.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a stored result ({_one_line(error)}); {again}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a stored result (no JSON object); {again}")
    version = values.get("schema_version")
    if isinstance(version, int) and version > RESULT_SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {version} is newer than this vlbench reads; upgrade vlbench")
    try:
        return parse(Result, values, where=str(path))
    except UserError as error:
        raise UserError(f"{error}; {again}") from None


def rows_beside(path: Path, result: Result, *, again: str = "ask for them again where they came from") -> Rows:
    """The per-example rows of ``result``, which was read from ``path``, checked against its checksum.

    Raises:
        UserError: where the file beside it is absent, another's, or damaged.
    """
    rows_path = path.with_name(Path(result.examples.file).name or _rows_path(path).name)
    try:
        data = rows_path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{rows_path}: missing: the result beside it has lost its rows; {again}") from None
    if hashlib.sha256(data).hexdigest() != result.examples.sha256:
        raise UserError(f"{rows_path}: not the rows that the result beside it was made from (checksum); {again}")
    try:
        return rows_from_parquet(data)
    except ValueError as error:
        raise UserError(f"{rows_path}: {error}; {again}") from None


def result_schema() -> dict[str, Any]:
    """The JSON Schema of a stored result, published as ``results/schema/result.v<version>.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Result.model_json_schema()}


def _eval(spec: str, tasks: str) -> str:
    model, separator, weights = spec.partition(" --weights ")  # a spec keeps the weights that were given with it
    words = f"vlbench eval --model {shlex.quote(model)}{separator}{shlex.quote(weights) if separator else ''}"
    return f"{words} --tasks {shlex.quote(tasks)}"


def _to_json(result: Result, path: Path) -> str:
    # Looked for before pydantic makes JSON of it, which would turn a NaN into null in silence.
    for key, value in flatten(result.model_dump()).items():
        for item in _leaves(value):
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{path}: {key} is {item}; a result holds finite numbers only")
    return json.dumps(result.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _rows_path(path: Path) -> Path:
    # Not with_suffix: a model or task may have dots in its name, and only the last ".json" is the suffix.
    return path.with_name(path.name.removesuffix(".json") + ".parquet")


def _version(path: Path) -> int:
    text = path.name.removesuffix(".json").rpartition("@v")[2]
    return int(text) if text.isdecimal() else 0


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
