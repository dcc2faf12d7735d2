"""The folder of one fine-tuning: where it is, who holds it, and what lies in it.

In the folder::

    lr-0.001/        a run as of pretraining (config.json, log.jsonl, ckpt.pt), judged.jsonl, best.safetensors
    weights.safetensors    the chosen weights: plain tensors
    assets.safetensors     what the recipe learnt of the data (an answer vocabulary), where it did
    tuned.json       what was chosen and why; written last, so that a folder that has it is finished
    begun-anew       where a caller wanted it trained again: what is there is of that call (``conduct.Conduct``)
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save as to_safetensors

from vlbench.core.config import Config
from vlbench.core.errors import UserError
from vlbench.core.files import atomic_writer, write_text
from vlbench.core.fingerprint import fingerprint
from vlbench.core.names import slug
from vlbench.core.paths import cache_dir
from vlbench.finetune.conduct import BEGUN_ANEW, Conduct
from vlbench.models.weights import read_weights
from vlbench.train.checkpoint import CHECKPOINT, LOG
from vlbench.train.run_config import FREE_ON_RESUME

FINETUNE_VERSION = 2
"""Part of every work folder's name: raised by changes that move what a fine-tuning learns."""
WEIGHTS, ASSETS, TUNED = "weights.safetensors", "assets.safetensors", "tuned.json"
BEST, JUDGED, LOCK = "best.safetensors", "judged.jsonl", ".lock"


def work_folder(arch: str, *, backbone: str, adapter: str, config: Config, data_key: str) -> Path:
    """Where the fine-tuning of one backbone on one task lives in the cache; the same for the same question.

    Whatever the model is called: two of the same weights are one question, and share the folder.

    Args:
        arch: the backbone's architecture, for people.
        backbone: its fingerprint.
        adapter: the adapter's name.
        config: resolved settings. What moves no weights (workers, checkpoints, the log) leaves the folder the same.
        data_key: fingerprint of all that is learnt from and chosen on.
    """
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_ON_RESUME}
    key = [FINETUNE_VERSION, backbone, adapter, settings, data_key]
    return cache_dir() / "finetune" / f"{slug(arch)}-{slug(adapter)}-{fingerprint(key)}"


def read_judgements(folder: Path) -> list[dict[str, Any]]:
    """Step and value of each judgement of a run, in order."""
    path = folder / JUDGED
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def write_judgements(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Instead of those that a run has."""
    write_text(folder / JUDGED, "".join(json.dumps(line) + "\n" for line in lines))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], **facts: Any) -> None:
    """Tensors by name, each of its own memory; it survives a power cut before what is written after it does."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_writer(path, sync=True) as handle:
        handle.write(to_safetensors(own, metadata={name: str(value) for name, value in facts.items()}))


def read_assets(folder: Path) -> dict[str, bytes]:
    """What the recipe learnt of the data."""
    path = folder / ASSETS
    return {name: tensor.numpy().tobytes() for name, tensor in read_weights(path).items()} if path.is_file() else {}


def seconds_of(run: Path) -> float:
    """Spent on the training steps of a run."""
    lines = (run / LOG).read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["seconds"])


@contextlib.contextmanager
def held(folder: Path, conduct: Conduct) -> Iterator[None]:
    """The folder against other processes; empty where the caller wants it trained again.

    Raises:
        UserError: where it cannot be made, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {error.filename or folder} cannot be made: {error.strerror}") from None
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use: another process fine-tunes the same there; wait for its end") from None
    try:
        if conduct.anew and folder not in conduct.folders:
            if conduct.forgets or not (folder / BEGUN_ANEW).is_file():
                _empty(folder)
            (folder / BEGUN_ANEW).touch()
        yield
    finally:
        lock.release()


def _empty(folder: Path) -> None:
    """Delete all but the lock. First what says that the rest is of use: a kill on the way must leave none of it."""
    for path in (folder / BEGUN_ANEW, folder / TUNED, *folder.glob(f"lr-*/{CHECKPOINT}")):
        path.unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
