"""Peak memory and time of a contrastive loss, forward and backward, with and without blocks of rows.

    python benchmarks/blocked_loss.py                                                  16,384 pairs on the CPU
    python benchmarks/blocked_loss.py --device cuda --batch 131072 --block 1024

Either way runs in a process of its own, the blocked one first. On the CPU its peak is the process's largest resident
size less that with the embeddings in place; on a GPU, torch's largest allocation less the same. Gradients are included
in both, and are compared where both ran. A whole matrix that does not fit is said not to; on a CPU, where the kernel
may end other processes before this one, give --max-plain-gib.

Exit status: 0; 1 where the two differ by more than 1e-5, relatively, or the blocked loss could not be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from vlbench.train.losses import align_loss, clip_loss, unicl_loss

LOSSES = {
    "clip": lambda u, v, s, labels, block: clip_loss(u, v, s, block=block),
    "unicl": lambda u, v, s, labels, block: unicl_loss(u, v, labels, s, block=block),
    "align": lambda u, v, s, labels, block: align_loss(u, v, 1 / s, block=block),
}
DIFFER = 1e-5
"""From which relative difference on the two are not the same loss."""
NO_MEMORY = 3
"""Exit status of a process that was refused memory."""


class DoesNotFit(Exception):
    """One way needs more memory than there is."""


def main(words: Sequence[str] | None = None) -> int:
    """Measure both and compare. Returns the exit status: see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=list(LOSSES), default="clip")
    parser.add_argument("--batch", type=int, default=16_384, help="pairs")
    parser.add_argument("--dim", type=int, default=512, help="width of the joint space")
    parser.add_argument("--block", type=int, default=256, help="rows of logits held at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--max-plain-gib", type=float, help="memory beyond the embeddings that the whole matrix may take"
    )
    parser.add_argument("--alone", choices=["blocked", "plain"], help="measure one, here, and print JSON")
    parser.add_argument("--keep", help="with --alone: a file for the gradients")
    given = sys.argv[1:] if words is None else list(words)
    args = parser.parse_args(given)
    if args.alone:
        return alone(args)

    with tempfile.TemporaryDirectory() as folder:
        try:
            blocked = in_process("blocked", given, Path(folder))
        except (DoesNotFit, RuntimeError) as error:
            print(f"blocked: {error}")
            return 1
        clock = "processor time" if args.device == "cpu" else "wall time"
        print(f"{args.loss}, {args.batch:,} pairs of width {args.dim}, float32, on {blocked['device']}:")
        print(f"  blocked ({args.block} rows a block): {said(blocked, args.batch, clock)}", flush=True)
        try:
            plain = in_process("plain", given, Path(folder))
        except DoesNotFit as error:
            print(f"  plain (whole matrix): does not fit: {error}")
            print("  gradients: not compared, the whole matrix's are not there")
            return 0
        except RuntimeError as error:
            print(f"  plain (whole matrix): {error}")
            return 1
        print(f"  plain (whole matrix): {said(plain, args.batch, clock)}")
        print(f"  blocked / plain: memory {blocked['peak'] / max(1, plain['peak']):.3f}, ", end="")
        print(f"time {blocked['seconds'] / plain['seconds']:.2f}")
        apart = differences(*(torch.load(Path(folder, way)) for way in ("blocked", "plain")))
        each = ", ".join(f"{name} {by:.1e}" for name, by in apart.items())
        print(f"  largest difference, relative to the largest entry: {each}")
        if not all(by <= DIFFER for by in apart.values()):  # so that a NaN differs too
            print(f"  they are not the same: more than {DIFFER:.0e}")
            return 1
        return 0


def in_process(way: str, given: Sequence[str], folder: Path) -> dict[str, Any]:
    """What ``measure`` finds of one way in a process of its own, its gradients in a file of that name in ``folder``.

    Raises:
        DoesNotFit: where it was refused memory, or ended as the kernel ends what has taken too much.
        RuntimeError: where it failed for another reason, with its last line.
    """
    call = [sys.executable, __file__, *given, "--alone", way, "--keep", str(folder / way)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == NO_MEMORY:
        raise DoesNotFit(last)
    if done.returncode == -signal.SIGKILL:
        raise DoesNotFit("its process was killed (SIGKILL), as the kernel does where memory ends")
    if done.returncode:
        raise RuntimeError(f"failed with {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def said(seen: dict[str, Any], batch: int, clock: str) -> str:
    """One way's memory and time."""
    each = 1e6 * seen["seconds"] / batch
    return f"peak {seen['peak'] / 2**20:,.0f} MiB, {seen['seconds']:.2f} s of {clock}, {each:.1f} us a pair"


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the value and each gradient: the largest difference of two entries over the largest entry of ``other``.

    An entry's own size is no measure: among millions some are as good as 0, by cancellation, in either way.
    """
    apart = {}
    for name, right in other.items():
        wrong_by = (one[name].double() - right.double()).abs().max()
        apart[name] = (wrong_by / right.double().abs().max().clamp_min(1e-30)).item()
    return apart


def alone(args: argparse.Namespace) -> int:
    """Measure one way here. Where it fails, one line on stderr, and ``NO_MEMORY`` where memory was refused."""
    try:
        found, gradients = measure(args)
    except Exception as error:
        words = " ".join((str(error).splitlines() or ["out of memory"])[0].split())
        refused = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in words
        words = words.rpartition("DefaultCPUAllocator: ")[2] if refused else f"{type(error).__name__}: {words}"
        print(words, file=sys.stderr)
        return NO_MEMORY if refused else 1
    if args.keep:
        torch.save(gradients, args.keep)
    print(json.dumps(found))
    return 0


def measure(args: argparse.Namespace) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Peak bytes beyond the embeddings and seconds; and the value with the gradients."""
    device = torch.device(args.device)
    block = args.block if args.alone == "blocked" else None
    warm_up = embeddings(64, args.dim, device)
    step(args.loss, warm_up, block)
    given = embeddings(args.batch, args.dim, device)
    if args.alone == "plain" and args.max_plain_gib is not None:
        allow(int(args.max_plain_gib * 2**30), device)
    before = peak(device)
    # On the CPU the time of all cores together, which other processes of the machine disturb less.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    value = step(args.loss, given, block)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    most = peak(device) - before
    found = {"value": torch.tensor(value)}
    for name, tensor in zip(("images", "texts", "logit scale"), given, strict=True):
        assert tensor.grad is not None, f"the loss has no gradient by the {name}"
        found[name] = tensor.grad.cpu()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {"peak": most, "seconds": seconds, "device": name}, found


def allow(more: int, device: torch.device) -> None:
    """Let this process have so many bytes more than it has."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (torch.cuda.memory_reserved(device) + more) / whole), device
        )
        return
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


def embeddings(batch: int, dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Unit-norm images and texts that resemble each other, and a logit scale.

    Made in place: a peak that is passed here would hide as much of the loss's.
    """
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(batch, dim, generator=generator, device=device)
    texts = torch.randn(batch, dim, generator=generator, device=device).add_(images)
    for side in (images, texts):
        side.div_(torch.linalg.vector_norm(side, dim=1, keepdim=True)).requires_grad_()
    return images, texts, torch.tensor(14.3, device=device, requires_grad=True)


def step(loss: str, given: tuple[torch.Tensor, ...], block: int | None) -> float:
    """Forward and backward; a quarter of the pairs have one of 100 labels. Returns the value."""
    rows = torch.arange(len(given[0]), device=given[0].device)
    value = LOSSES[loss](*given, torch.where(rows % 4 == 0, rows % 100, -1), block)
    value.backward()
    return value.item()


def peak(device: torch.device) -> int:
    """The most bytes held so far; what is held now where the device's count can be set back."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    # Not getrusage's: that begins at the size of the process which started this one.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
