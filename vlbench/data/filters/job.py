"""One call of the filter: what is asked for, where its state lies, and whether a restart may go on from it.

State files are written whole or not at all, under ``DST/.state``; what is there is done. So a killed call goes on
where it was, and its output is that of a call that was never killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlbench.core.errors import UserError
from vlbench.core.files import write_text
from vlbench.core.fingerprint import fingerprint
from vlbench.data.filters.settings import FilterConfig
from vlbench.data.filters.shards import Shard
from vlbench.data.filters.tables import Table

STATE_VERSION = 1
STATE, REPORT = ".state", "report.json"
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class EvaluationSet:
    """The images of one evaluation set."""

    spec: str
    split: str
    size: int
    ids: str
    """Fingerprint of the ids, by which a changed set is known."""


@dataclass(frozen=True)
class Job:
    """What every process of one call knows."""

    spec: str
    shards: tuple[Shard, ...]
    target: Path
    config: FilterConfig
    memory: int
    """Bytes that merging one range of keys may take, in each process."""
    removed: str | None = None
    """``jsonl`` or ``parquet``: list the removed samples, in this form."""
    against: tuple[EvaluationSet, ...] = ()
    """What near-duplicates are looked for in; empty where that rule is off."""

    @property
    def state(self) -> Path:
        """Where the state files are."""
        return self.target / STATE

    @cached_property
    def tables(self) -> dict[str, Table]:
        """What is counted for the rules that are on."""
        table = {
            "images": ("many-texts", self.config.max_texts),
            "texts": ("shared-text", self.config.max_images),
            "ngrams": ("rare-ngram", None),
        }
        return {
            name: Table(name, self.state, len(self.shards), limit)
            for name, (rule, limit) in table.items()
            if self.config.uses(rule)  # type: ignore[arg-type]  # the rules are written out above
        }

    def scanned(self, shard: int) -> Path:
        """What is known of a shard's samples; once it is there, the shard's runs are as well."""
        return self.state / "scan" / f"{shard:06}.samples.npz"

    def neighbours(self, shard: int) -> Path:
        """Which samples of a shard are near-duplicates of what."""
        return self.state / "near" / f"{shard:06}.npz"

    def judged(self, shard: int) -> Path:
        """A shard's part of the report; once it is there, so is the shard."""
        return self.state / "judged" / f"{shard:06}.json"

    def removed_part(self, shard: int) -> Path:
        """A shard's part of the list of removed samples."""
        return self.state / "removed" / f"{shard:06}.jsonl"

    @property
    def fingerprint(self) -> str:
        """What a finished run is known by: the description, without the times of the files."""
        said = self.description()
        return fingerprint(said | {"shards": {name: size for name, (size, _) in said["shards"].items()}})

    def description(self) -> dict[str, Any]:
        """What must be the same for a restart to go on."""
        return {
            "version": STATE_VERSION,
            "source": self.spec,
            "removed": self.removed,
            "settings": self.config.model_dump(mode="json"),
            "against": [asdict(each) for each in self.against],
            "shards": {shard.name: _stamp(shard.path) for shard in self.shards},
        }


@contextlib.contextmanager
def opened_state(job: Job) -> Iterator[None]:
    """Begin the job in its folder, or go on with it, alone.

    Raises:
        UserError: where the folder is not empty and holds no run of ours, holds one that was asked for otherwise or
            whose source has changed since, or is at work in another process.
    """
    check_place(job)
    job.state.mkdir(parents=True, exist_ok=True)
    with _alone(job):
        kept = job.state / "call.json"
        new = job.description()
        if kept.is_file():
            old = json.loads(kept.read_text(encoding="utf-8"))
            changed = _changes(old, new, job)
            if changed:
                raise UserError(
                    f"{job.target}: {changed} since this run was begun; put it back to go on, or delete the folder to "
                    "begin anew"
                )
        write_text(kept, json.dumps(new, indent=1, ensure_ascii=False) + "\n")
        yield


def check_place(job: Job) -> None:
    """Refuse an output folder that is not for this. Raises UserError."""
    target = job.target.resolve()
    inside = [shard for shard in job.shards if (target / shard.name) == shard.path.resolve()]
    if inside or target in {shard.path.resolve().parent for shard in job.shards}:
        raise UserError(f"{job.target}: source and destination are the same folder; name another one")
    if target.exists() and not target.is_dir():
        raise UserError(f"{job.target}: a file; name a folder to write to")
    if (target / STATE / "call.json").is_file() or not target.is_dir():
        return
    if any(path.name != STATE for path in target.iterdir()):
        raise UserError(f"{job.target}: not empty, and not begun by this command; name a new folder")


def finished_report(job: Job) -> dict[str, Any] | None:
    """The report of the same job, where it was finished before. Raises UserError where it was another."""
    path = job.target / REPORT
    if (job.state / "call.json").is_file() or not path.is_file():
        return None
    try:
        report = dict(json.loads(path.read_text(encoding="utf-8")))
        same = report["call"] == job.fingerprint
    except (ValueError, KeyError, TypeError):
        return None  # somebody else's file: check_place will say that the folder is not empty
    if not same:
        raise UserError(f"{job.target}: holds the finished run of another call or source; name a new folder")
    return report


def _changes(old: dict[str, Any], new: dict[str, Any], job: Job) -> str:
    """The first thing that differs, in words, or ``""``."""
    if old["version"] != new["version"]:
        return f"the version of the state files was {old['version']} and is {new['version']}"
    if old["source"] != new["source"]:
        return f"the source was {old['source']!r} and is {new['source']!r}"
    was, now = ({"list_removed": said["removed"], **said["settings"]} for said in (old, new))
    for key in now:
        if was.get(key) != now[key]:
            return f"--{key.replace('_', '-')} was {was.get(key)!r} and is {now[key]!r}"
    for before, after in zip(old["against"], new["against"]):
        if before != after:
            return f"the evaluation set {after['spec']} has changed"
    gone, added = old["shards"].keys() - new["shards"].keys(), new["shards"].keys() - old["shards"].keys()
    if gone or added:
        return f"shard {min(gone)} has gone" if gone else f"shard {min(added)} was added"
    for number, shard in enumerate(job.shards):
        # A shard that was not read yet may change: a cut one is got again after the complaint about it.
        if old["shards"][shard.name] != new["shards"][shard.name] and job.scanned(number).is_file():
            return f"{shard.path} has changed"
    return ""


def _stamp(path: Path) -> list[int]:
    """By which a changed file is known: its size and time of change."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Hold the folder's lock. Worker processes share it, so that those of a killed call are waited for."""
    descriptor = os.open(job.state / "lock", os.O_RDWR | os.O_CREAT)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{job.target}: another vlbench is at work on this folder; wait for it") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)
