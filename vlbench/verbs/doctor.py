"""``vlbench doctor``: what works on this machine, what is missing, and what to do about it."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from vlbench import __version__
from vlbench.core.cards import dataset_cards, model_cards, task_cards
from vlbench.core.errors import UserError
from vlbench.core.paths import cache_dir, data_root

OK, NOTE, BAD = "ok", "note", "BAD"
_OPTIONAL = {
    "matplotlib": "plots",
    "transformers": "hf: models and SigLIP's texts",
    "sentencepiece": "the tokenizers of some hf: models",
    "protobuf": "the tokenizers of some hf: models",
    "webdataset": "only the tests need it",
    "detectron2": "a second detection engine, built from its source",
}


def run(args: argparse.Namespace) -> int:
    """Print one line a finding. Returns 1 where something is broken, 0 otherwise."""
    checks: tuple[Callable[[], list[tuple[str, str]]], ...] = (
        _python,
        _packages,
        _torch,
        _cards,
        lambda: _folders(Path(args.data_root) if args.data_root else data_root()),
    )
    broken = 0
    for check in checks:
        for state, line in check():
            broken += state == BAD
            print(f"{state:>4}  {line}")
    print(f"\n{'everything needed works' if not broken else f'{broken} to mend'}")
    return int(broken > 0)


def _python() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [(OK, f"vlbench {__version__}, Python {platform.python_version()}, {platform.system()}, {cores} cores")]


def _packages() -> list[tuple[str, str]]:
    """Each declared dependency against what is installed, from the package's own metadata."""
    found = []
    for requirement in metadata.requires("vlbench") or []:
        name, _, marker = requirement.partition(";")
        if "extra" in marker:
            continue
        package = re.split(r"[<>=!~ \[]", name.strip(), maxsplit=1)[0]
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            found.append((BAD, f"{package} is missing: pip install '{name.strip()}'"))
            continue
        least = re.search(r">=\s*([\d.]+)", name)
        if least and _numbers(version) < _numbers(least.group(1)):
            found.append((BAD, f"{package} {version} is too old: pip install '{name.strip()}'"))
        else:
            found.append((OK, f"{package} {version}"))
    for package, what in _OPTIONAL.items():
        try:
            found.append((OK, f"{package} {metadata.version(package)} (optional)"))
        except metadata.PackageNotFoundError:
            found.append((NOTE, f"{package} is not installed (optional: {what})"))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _torch() -> list[tuple[str, str]]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return [(BAD, f"torch does not load: {error}")]
    waiting = os.environ.get("OMP_WAIT_POLICY", "unset")
    found = [
        (
            OK,
            f"torch computes with {torch.get_num_threads()} threads, OMP_WAIT_POLICY={waiting}",
        )
    ]
    try:
        ops = importlib.import_module("torchvision.ops")
        ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
        found.append((OK, "torchvision's operators load"))
    except Exception as error:
        found.append((BAD, f"torchvision's operators do not load ({error}): install torch and torchvision together"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found.append((OK, f"cuda:{index} {device.name}, {device.total_memory / 2**30:.0f} GiB"))
    else:
        found.append((NOTE, "no CUDA device: everything runs on the CPU"))
    return found


def _cards() -> list[tuple[str, str]]:
    try:
        return [(OK, f"{len(task_cards())} task cards and {len(model_cards())} reference models read")]
    except UserError as error:
        return [(BAD, str(error))]


def _folders(root: Path) -> list[tuple[str, str]]:
    from vlbench.verbs.selection import find_data

    cache, found = cache_dir(), []
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache):
            free = shutil.disk_usage(cache).free / 2**30
        found.append((OK if free > 2 else NOTE, f"cache {cache} is writable, {free:.0f} GiB free"))
    except OSError as error:
        found.append((BAD, f"cache {cache} cannot be written ({error}): set VLBENCH_CACHE to a folder that can"))
    cards = dataset_cards().values()
    present = sum(find_data(card, root) is not None for card in cards)
    found.append((OK, f"{present} of {len(cards)} data sets present under {root} (vlbench list datasets)"))
    return found
