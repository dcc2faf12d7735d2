"""What a result records of the machine and the software it was measured with."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from vlbench import __version__
from vlbench.core.errors import UserError

_PACKAGES = (
    *("torch", "torchvision", "timm", "open_clip_torch", "transformers", "tokenizers"),
    *("numpy", "scipy", "pillow", "faster-coco-eval", "detectron2"),
)

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def choose_device(name: str | None) -> str:
    """``name``, or CUDA where there is one and none was named. Raises UserError for a device that is not there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def choose_workers(count: int | None, *, sharing: int = 1) -> int:
    """``count``, or one process for each core that this one may use, eight at most.

    ``sharing`` processes on this machine do the same: each takes its part of the cores, one at least.
    """
    return count if count is not None else max(1, min(8, len(os.sched_getaffinity(0)) // sharing))


def keep_freed_memory() -> None:
    """Let the C library keep the memory that torch frees, for the tensors of the next batch.

    By default glibc maps every large tensor anew and gives it back when it is freed, so that each batch faults in
    hundreds of megabytes page by page: about a fifth of a small model's training time on a CPU. No number changes.
    Elsewhere than on glibc nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def describe(device: str) -> dict[str, Any]:
    """``device``, ``device_name``, ``threads`` of torch."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"
    return {"device": device, "device_name": name, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions of Python, vlbench and the packages that compute features."""
    found = {"vlbench": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this checkout, with ``-dirty`` where tracked files differ; None for an installed wheel.

    Stored results are no part of what measures: writing one must not make the next one look unclean.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # else git would answer for a repository that merely holds the environment
        return None
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    return f"{head}-dirty" if changed else head


def reset_peak_memory(device: str) -> None:
    """Start counting GPU memory anew; a process's own peak cannot be reset."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: str) -> float:
    """Peak memory in MiB: allocated on the GPU since the last reset, else of this process since its start."""
    if device.startswith("cuda"):
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
