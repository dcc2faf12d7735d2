"""What ``vlbench eval`` says at its end: one line a task, and what was encoded for all of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlbench.core.types import Estimate, Result
from vlbench.store.results import ResultStore

if TYPE_CHECKING:
    from vlbench.adapters.encoder import EncoderStats


@dataclass(frozen=True)
class Done:
    """One finished task."""

    result: Result
    reused: bool


def print_summary(
    done: Sequence[Done], failed: Sequence[tuple[str, str]], *, store: ResultStore, stats: EncoderStats
) -> None:
    """A table of the finished tasks, the encoder's counts, and a line on stderr for every failed one."""
    from tabulate import tabulate

    if done:
        rows = [_table_row(item, store) for item in done]
        headers = ("task", "metric", "value [95%]", "chance", "n", "s", "stored")
        print()
        aligned = ("left", "left", "left", "right", "right", "right", "left")
        print(tabulate(rows, headers, colalign=aligned, disable_numparse=True))
    rate = f" at {stats.images_per_second:,.0f} images/s" if stats.images_per_second else ""
    print(f"\nimages: {stats.images_encoded:,} encoded{rate}, {stats.images_reused:,} from the feature store")
    if stats.texts_encoded or stats.texts_reused:
        print(f"texts: {stats.texts_encoded:,} encoded, {stats.texts_reused:,} from the feature store")
    for task, line in failed:
        print(f"FAILED {task}: {line}", file=sys.stderr)


def _table_row(item: Done, store: ResultStore) -> tuple[str, ...]:
    result = item.result
    headline = result.estimates[result.metric]
    chance = "" if result.chance is None else f"{100 * result.chance:.1f}"
    path = store.path(result.model.name, result.task, result.task_version)
    seconds = "reused" if item.reused else f"{sum(result.seconds.values()):.1f}"
    return (result.task, result.metric, percent(headline), chance, f"{headline.n:,}", seconds, str(path))


def percent(estimate: Estimate) -> str:
    """The value with its interval, as percentages."""
    return f"{100 * estimate.value:.1f} [{100 * estimate.lo:.1f}, {100 * estimate.hi:.1f}]"
