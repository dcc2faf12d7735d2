"""The spec ``shapes:PART[?root=DIR&seed=0]``: the embedded world, made on first use and read by the real readers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.paths import cache_dir
from vlbench.core.types import Source
from vlbench.data.shapes.world import GROUPS, PARTS, VERSION
from vlbench.data.shapes.write import write_world
from vlbench.data.sources import Reader, list_splits, open_source
from vlbench.data.spec import DataSpec

_READ_BY = {"labels": "imagefolder", "coco": "coco"} | {part: part for part in GROUPS["finetune"]}
"""The other parts are webdataset shards."""
_DEFAULT_PART = "pairs"


def default_root(seed: int = 0) -> Path:
    """Where the world of a seed lies unless another place is named."""
    return cache_dir() / "shapes" / f"{VERSION}-seed{seed}"


def real_spec(spec: DataSpec) -> DataSpec:
    """The spec of the files behind ``spec``, which are made now if they are not there.

    Raises:
        UserError: for an unknown part, a seed that is not a whole number, or a root that holds something else.
    """
    part = spec.path or _DEFAULT_PART
    if part not in PARTS:
        raise UserError(f"data {spec.text!r}: {unknown('part of shapes', part, PARTS)}")
    seed_text = spec.options.get("seed", "0")
    if not seed_text.isdecimal():
        raise UserError(f"data {spec.text!r}: seed must be a whole number, not {seed_text!r}")
    seed = int(seed_text)
    named = spec.options.get("root")
    if named:
        root = write_world(Path(named).expanduser(), seed=seed)
        if not (root / part).is_dir():
            raise UserError(f"data {spec.text!r}: {root} is a world without {part!r}; name a new folder to make it in")
    else:
        group = next(group for group, parts in GROUPS.items() if part in parts)
        root = write_world(default_root(seed) / group, seed=seed, parts=GROUPS[group])
    kind = _READ_BY.get(part, "wds")
    return replace(spec, kind=kind, path=str(root / part), options={}, text=f"{kind}:{root / part}")


def make_meanwhile(part: str = _DEFAULT_PART) -> None:
    """Start making the part's group in another process where it is not there yet, and go on.

    For a caller that is about to import torch, which takes one core several seconds and this nothing of it. Whoever
    opens the data first waits at the lock; where the process fails, the data are made then.
    """
    group = next(group for group, parts in GROUPS.items() if part in parts)
    if not (default_root() / group).exists():
        words = "import sys; from vlbench.data import sources; sources.list_splits(sys.argv[1])"
        call = [sys.executable, "-c", words, f"shapes:{part}"]
        subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _open(spec: DataSpec, split: str | None) -> Source:
    return open_source(real_spec(spec), split)


def _splits(spec: DataSpec) -> tuple[str, ...]:
    return list_splits(real_spec(spec))


def _present(spec: DataSpec) -> bool:
    return True


READER = Reader(
    name="shapes",
    open=_open,
    splits=_splits,
    help=f"the embedded world: shapes[:{'|'.join(PARTS)}]",
    options={"root": "folder of the world, made there if it is absent", "seed": "which world"},
    present=_present,
)
