"""``vlbench demo``: the whole loop on the embedded world, in one folder.

Makes the world, pretrains a supervised, a CLIP and a UniCL backbone on the same budget, measures them and a
random-weight network of the same architecture on every task of the ``smoke`` suite, and writes a leaderboard. What an
earlier call finished is used again, where it had the same settings.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from vlbench.verbs.calls import evaluate, pretrain

RECIPES = ("supervised", "clip", "unicl")


def run(args: argparse.Namespace) -> int:
    """Run the loop under ``args.out``. Returns 1 where a task failed."""
    from vlbench.data.sources import open_source
    from vlbench.verbs import leaderboard

    out, results, status = Path(args.out), str(Path(args.out) / "results"), 0
    start = time.perf_counter()
    pairs = open_source("shapes:pairs")
    print(f"[demo] the world: {len(pairs)} image-text pairs, ready after {time.perf_counter() - start:.0f} s")

    checkpoints = {}
    for recipe in RECIPES:
        print(f"\n[demo] pretrain {recipe}")
        # --resume also means: a finished run of the same settings is used again.
        checkpoints[recipe] = pretrain(recipe=recipe, out=str(out / "runs" / recipe), steps=args.steps, resume=True)
    for recipe, checkpoint in checkpoints.items():
        print(f"\n[demo] evaluate {recipe}")
        status |= evaluate(model=str(checkpoint), name=recipe, tasks="smoke", results=results)
    print("\n[demo] evaluate a random-weight network of the same architecture")
    status |= evaluate(model=str(checkpoints["clip"]), weights="random", name="random", tasks="smoke", results=results)
    print()
    status |= leaderboard.run(argparse.Namespace(results=results, check=False))
    board = Path(results) / "LEADERBOARD.md"
    print(f"\n{board.read_text(encoding='utf-8')}")
    print(f"[demo] {board} after {time.perf_counter() - start:.0f} s")
    print(f"[demo] next: vlbench compare unicl clip --results {results}")
    return status
