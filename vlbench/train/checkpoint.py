"""A run's folder: one self-describing checkpoint, the resolved settings, the log.

``ckpt.pt`` is all that evaluation needs (recipe, settings, classes, card, weights) and, while the run goes on, all
that a resume needs (``train``). It holds plain values and tensors only, so it loads with ``weights_only=True``. It is
replaced atomically: a process killed while it writes leaves the older one whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlbench.core.config import Config, flatten
from vlbench.core.errors import UserError
from vlbench.core.files import atomic_writer, write_text
from vlbench.models.weights import CHECKPOINT_FORMAT, CHECKPOINT_VERSION, read_checkpoint
from vlbench.train.run_config import FREE_ON_RESUME

CHECKPOINT = "ckpt.pt"
SETTINGS = "config.json"
LOG = "log.jsonl"


def save(path: Path, **content: Any) -> None:
    """Write a checkpoint: recipe, config, classes, card, model, step, samples_seen and, for a resume, train.

    Forced to the disk before it takes the old one's place, so that a power cut leaves one or the other.
    """
    whole = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, **content}
    with atomic_writer(path, sync=True) as handle:
        torch.save(whole, handle)


def load(folder: Path, *, recipe: str, config: Config) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None where the run was stopped before its first.

    What a process that was killed while it wrote has left beside it is removed.

    Raises:
        UserError: where the folder's run, finished or not, had another recipe or other settings, naming them.
    """
    path = folder / CHECKPOINT
    for half_written in folder.glob(f".{CHECKPOINT}.*.tmp"):
        half_written.unlink(missing_ok=True)
    found = read_checkpoint(path) if path.is_file() else None
    stored = found if found is not None else read_settings(folder)
    if stored is None:
        return None
    if stored["recipe"] != recipe:
        raise UserError(f"{folder} is a run of {stored['recipe']}, not of {recipe}; give another --out")
    changed = _changed(_with_defaults(stored["config"], config), config.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}), which cannot go on with these; give "
            "another --out, or delete the folder"
        )
    return found


def check_unused(folder: Path) -> None:
    """Raises UserError where the folder already holds a run."""
    for name in (CHECKPOINT, SETTINGS):
        if (folder / name).exists():
            raise UserError(f"{folder} already holds a run; go on with it by --resume, or give another --out")


def write_settings(folder: Path, *, recipe: str, preset: str | None, config: Config) -> None:
    """The resolved settings, for people and for ``--resume``."""
    content = {"recipe": recipe, "preset": preset, "config": config.model_dump(mode="json")}
    write_text(folder / SETTINGS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What ``write_settings`` wrote, or None. Raises UserError where the file is damaged."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete {folder} and start again") from None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict) or "recipe" not in content:
        raise UserError(f"{path}: not the settings of a run; give another --out")
    return content


class Log:
    """``log.jsonl``: one line of JSON a record, on disk as soon as it is written.

    Args:
        path: the file.
        step: the step that the run goes on from. Later lines, and a line cut short, are dropped, so that no step is
            logged twice.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        kept = []
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._handle = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._handle.write(json.dumps(record, allow_nan=False) + "\n")
        self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def _with_defaults(stored: Mapping[str, Any], config: Config) -> Mapping[str, Any]:
    """Settings with those that an older vlbench did not have yet, and so did as their defaults do."""
    try:
        return type(config).model_validate(stored).model_dump(mode="json")
    except ValueError:  # one that is gone: the comparison names it
        return stored


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = flatten(before), flatten(now)
    return [
        f"{key}: {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in FREE_ON_RESUME
    ]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
