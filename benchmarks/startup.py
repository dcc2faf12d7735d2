"""How soon the command line answers, and that it loads no torch: ``python benchmarks/startup.py``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CALLS = (
    ["--help"],
    ["list", "tasks"],
    ["list", "recipes"],
    ["show", "task", "linear/shapes"],
    ["leaderboard", "--check"],
)
REPEATS = 7


def main() -> None:
    """Print the least and the median wall time of each call."""
    for words in CALLS:
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "vlbench", *words], capture_output=True, check=False)
            seconds.append(time.perf_counter() - start)
        call = " ".join(["vlbench", *words])
        print(f"{call:<36} least {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s of {REPEATS}")


if __name__ == "__main__":
    main()
