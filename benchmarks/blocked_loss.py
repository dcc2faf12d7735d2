"""Peak memory and time of a contrastive loss, forward and backward, with and without blocks of rows.

    python benchmarks/blocked_loss.py                                                  16,384 pairs on the CPU
    python benchmarks/blocked_loss.py --device cuda --batch 65536 --block 1024

Either way runs in a process of its own, one after the other. On the CPU its peak is the process's largest resident
size less that with the embeddings in place; on a GPU, torch's largest allocation less the same. Gradients are included
in both. The values and the norms of all gradients must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from vlbench.train.losses import align_loss, clip_loss, unicl_loss

LOSSES = {
    "clip": lambda u, v, s, labels, block: clip_loss(u, v, s, block=block),
    "unicl": lambda u, v, s, labels, block: unicl_loss(u, v, labels, s, block=block),
    "align": lambda u, v, s, labels, block: align_loss(u, v, 1 / s, block=block),
}


def main() -> int:
    """Measure both and compare. Returns 1 where they disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=list(LOSSES), default="clip")
    parser.add_argument("--batch", type=int, default=16_384, help="pairs")
    parser.add_argument("--dim", type=int, default=512, help="width of the joint space")
    parser.add_argument("--block", type=int, default=256, help="rows of logits held at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", choices=["plain", "blocked"], help="measure one, here, and print JSON")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args)))
        return 0

    found = {}
    for way in ("plain", "blocked"):
        call = [sys.executable, __file__, *sys.argv[1:], "--alone", way]
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{way}: failed with {done.returncode}; not enough memory?")
            return 1
        found[way] = json.loads(done.stdout)
    plain, blocked = found["plain"], found["blocked"]
    clock = "processor time" if args.device == "cpu" else "wall time"
    print(f"{args.loss}, {args.batch:,} pairs of width {args.dim}, float32, on {blocked['device']}:")
    for way, seen in found.items():
        rows = "whole matrix" if way == "plain" else f"{args.block} rows a block"
        each = 1e6 * seen["seconds"] / args.batch
        print(f"  {way} ({rows}): peak {seen['peak'] / 2**20:,.0f} MiB, {seen['seconds']:.2f} s of {clock}, ", end="")
        print(f"{each:.1f} us a pair")
    print(f"  blocked / plain: memory {blocked['peak'] / plain['peak']:.3f}, ", end="")
    print(f"time {blocked['seconds'] / plain['seconds']:.2f}")
    apart = max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(plain["numbers"], blocked["numbers"], strict=True))
    print(f"  value and norms of gradients differ by {apart:.1e} at most, relatively")
    return int(apart > 1e-4)


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Peak bytes beyond the embeddings, seconds, and the value with the norms of the gradients."""
    device = torch.device(args.device)
    block = args.block if args.alone == "blocked" else None
    warm_up = embeddings(64, args.dim, device)
    step(args.loss, warm_up, block)
    given = embeddings(args.batch, args.dim, device)
    before = peak(device)
    # On the CPU the time of all cores together, which other processes of the machine disturb less.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    value = step(args.loss, given, block)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    most = peak(device) - before
    norms = [tensor.grad.norm().item() for tensor in given if tensor.grad is not None]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {"peak": most, "seconds": seconds, "numbers": [value, *norms], "device": name}


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


if __name__ == "__main__":
    sys.exit(main())
