"""Coarse-to-fine search of a grid on held-out data: the sweep of CLIP (A.3), ELEVATER and CLIP_benchmark.

Every sixteenth value first, then the neighbours of the best at half the distance each time, until they are next to it.
Several searches run side by side, so that what they want to try can be fitted in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Point: TypeAlias = tuple[int, int]
"""A search (a learning rate, say) and an index into its grid."""


@dataclass(frozen=True)
class Searched:
    """The best of all searches."""

    best: Point
    quality: Any
    tried: int
    at_edge: bool
    """Whether the best index is the first or the last of its grid."""


def coarse_to_fine(
    n_values: int,
    evaluate: Callable[[Sequence[Point]], Sequence[Any]],
    *,
    stride: int,
    searches: int = 1,
    give_up: Callable[[Any, Any], bool] | None = None,
) -> Searched:
    """Search ``searches`` grids of ``n_values`` each.

    Args:
        n_values: values of a grid.
        evaluate: quality of every point asked for, numbers or tuples of them, higher is better; called once a round,
            for no point twice.
        stride: distance of the first values tried, halved from round to round.
        searches: how many grids.
        give_up: of the qualities of two values ``stride`` apart, whether no larger value need be tried. The first
            round then goes value by value.

    Returns:
        The best point of all; where several are, the one tried first in the first search.
    """
    tried: dict[Point, Any] = {}
    peaks: list[int] = [0] * searches

    def attempt(wanted: Sequence[Point]) -> None:
        fresh = [point for point in dict.fromkeys(wanted) if point not in tried and 0 <= point[1] < n_values]
        if not fresh:
            return
        tried.update(zip(fresh, evaluate(fresh), strict=True))
        for search, index in fresh:
            # A tie leaves the peak where it was.
            if tried[search, index] > tried[search, peaks[search]]:
                peaks[search] = index

    if give_up is None:
        attempt([(search, index) for search in range(searches) for index in range(0, n_values, stride)])
    else:
        for search in range(searches):
            for index in range(0, n_values, stride):
                attempt([(search, index)])
                if index and give_up(tried[search, index - stride], tried[search, index]):
                    break
    while stride := stride // 2:
        attempt([(search, peaks[search] + side) for search in range(searches) for side in (-stride, stride)])
    best = max(range(searches), key=lambda search: (tried[search, peaks[search]], -search))
    point = (best, peaks[best])
    return Searched(point, tried[point], len(tried), n_values > 1 and point[1] in (0, n_values - 1))
