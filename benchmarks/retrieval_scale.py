"""Exact R@1/5/10 in both directions at the size of a web corpus, with the memory and the time that they take.

    python benchmarks/retrieval_scale.py --small                                2,000 images, 10,000 captions: seconds
    python benchmarks/retrieval_scale.py --images 100000 --texts 500000 --width 512

Embeddings are random with clusters: an image is its cluster's centre plus noise, a caption is its image plus noise.
A sample of queries of each direction is ranked again in float64 by brute force; every rank must be equal. Peak memory
is that of the whole process, the embeddings and all libraries included.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from vlbench.adapters.common.classification import unit
from vlbench.adapters.common.exact_ranks import TIE, ranks

CLUSTER = 50
"""Images around one centre: candidates that are hard to tell from the right one."""
CHUNK = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--texts", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--noise", type=float, default=5.0, help="of a caption, as a multiple of its image's length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checked", type=int, default=200, help="queries of each direction ranked again in float64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="2,000 images and 10,000 captions")
    args = parser.parse_args()
    n_images, n_texts = (2_000, 10_000) if args.small else (args.images, args.texts)

    libraries = peak_gib()
    image_NE, text_ME, owner_M = embeddings(n_images, n_texts, args.width, noise=args.noise, seed=args.seed)
    start, cpu_start = time.perf_counter(), time.process_time()
    to_image_M, to_text_N = ranks(image_NE, text_ME, owner_M=owner_M, device=args.device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = peak_gib()
    print(f"{n_images:,} images x {n_texts:,} captions, width {args.width}, {torch.get_num_threads()} CPU threads:")
    rate = 2e-9 * n_images * n_texts * args.width / seconds
    print(f"  {seconds:,.1f} s ({rate:,.0f} GFLOP/s), {cpu_seconds:,.1f} s of processor time on all cores together")
    print(f"  peak memory {peak:.2f} GiB, {libraries:.2f} of it before the data")
    for name, found in (("image_retrieval (text to image)", to_image_M), ("text_retrieval (image to text)", to_text_N)):
        recalls = ", ".join(f"R@{k} {100 * (found <= k).mean():.2f}" for k in (1, 5, 10))
        print(f"  {name}: {recalls}, median rank {np.median(found):,.0f}")
    wrong = check(image_NE, text_ME, owner_M, (to_image_M, to_text_N), count=args.checked)
    print(f"  {args.checked} queries of each direction against float64: {wrong} ranks differ")
    raise SystemExit(bool(wrong))


def embeddings(n_images: int, n_texts: int, width: int, *, noise: float, seed: int) -> tuple[np.ndarray, ...]:
    """``image_NE``, ``text_ME`` (float32, not of unit length) and ``owner_M``, made chunk by chunk."""
    rng = np.random.default_rng(seed)
    owner_M = np.concatenate([np.arange(n_images), rng.integers(0, n_images, n_texts - n_images)])
    image_NE = np.empty((n_images, width), dtype=np.float32)
    text_ME = np.empty((n_texts, width), dtype=np.float32)
    centres = rng.standard_normal((n_images // CLUSTER + 1, width), dtype=np.float32)
    for begin in range(0, n_images, CHUNK):
        rows = np.arange(begin, min(begin + CHUNK, n_images))
        image_NE[rows] = centres[rows // CLUSTER] + rng.standard_normal((len(rows), width), dtype=np.float32)
    for begin in range(0, n_texts, CHUNK):
        rows = slice(begin, min(begin + CHUNK, n_texts))
        text_ME[rows] = rng.standard_normal((rows.stop - rows.start, width), dtype=np.float32)
        text_ME[rows] *= noise * np.float32(2**0.5)  # an image's coordinates have the variance 2
        text_ME[rows] += image_NE[owner_M[rows]]
    return image_NE, text_ME, owner_M


def check(
    image_NE: np.ndarray, text_ME: np.ndarray, owner_M: np.ndarray, found: tuple[np.ndarray, np.ndarray], *, count: int
) -> int:
    """How many of ``count`` sampled queries of each direction have another rank in float64."""
    rng = np.random.default_rng(1)
    texts = rng.choice(len(text_ME), min(count, len(text_ME)), replace=False)
    images = rng.choice(len(image_NE), min(count, len(image_NE)), replace=False)
    by_text = oracle(text_ME[texts], image_NE, owner_M[texts][:, None] == np.arange(len(image_NE)))
    by_image = oracle(image_NE[images], text_ME, images[:, None] == owner_M)
    return int((by_text != found[0][texts]).sum() + (by_image != found[1][images]).sum())


def oracle(query_QE: np.ndarray, candidate_XE: np.ndarray, right_QX: np.ndarray) -> np.ndarray:
    """Pessimistic rank of the best right candidate of each query, from all scores in float64."""
    score_QX = np.empty(right_QX.shape)
    for begin in range(0, len(candidate_XE), CHUNK):
        rows = slice(begin, begin + CHUNK)
        score_QX[:, rows] = unit(query_QE) @ unit(candidate_XE[rows]).T
    best_Q1 = np.where(right_QX, score_QX, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((score_QX >= best_Q1 - TIE) & ~right_QX).sum(axis=1)


def peak_gib() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
